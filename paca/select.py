"""Which input columns of a weight are trained.

Columns are drawn or ranked on the CPU and kept sorted, so that they are the same on every device, rank and restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2s

import torch
from torch import Tensor

# Modules that read the same tensor in the models we know. Sharing their columns lets one gather serve them all. Layers
# outside a row draw on their own; a row that does not fit a model costs nothing, because the gather is only shared when
# the inputs really are the same tensor.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("q", "k", "v"),
)

SELECTIONS = (
    "random",
    "weight_norm",
    "activation_norm_large",
    "activation_norm_small",
    "gradient_norm",
    "s2ft",
    "largest_change",
    "mask_random",
    "mask_magnitude",
    "mask_gradient",
    "mask_snip",
)
# These train single entries of the weights (`paca.masked`).
MASKS = ("mask_random", "mask_magnitude", "mask_gradient", "mask_snip")
# These rank columns or entries by a score that needs data: `paca.calibrate` measures it.
MEASURED = ("activation_norm_large", "activation_norm_small", "gradient_norm", "mask_gradient", "mask_snip")


def shared_name(module_name: str) -> str:
    """Return the name under which a module draws its columns: that of the first sharing its input.

    >>> shared_name("model.layers.0.self_attn.v_proj")
    'model.layers.0.self_attn.q_proj'
    """
    parent, dot, leaf = module_name.rpartition(".")
    row = next((row for row in SHARED_INPUT if leaf in row), (leaf,))
    return f"{parent}{dot}{row[0]}"


def random_columns(in_features: int, r: int, seed: int, name: str) -> Tensor:
    """Draw `r` of `in_features` columns uniformly without replacement, as in the paper; (r,) int64, sorted.

    The generator is seeded with `seed` and `name`, so a module's columns depend on nothing else; a smaller `r` draws a
    subset.
    """
    return torch.randperm(in_features, generator=generator_for(seed, name), device="cpu")[:r].sort().values


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on a seed and a name, and on nothing else."""
    digest = blake2s(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def best_columns(scores: Tensor, r: int, *, smallest: bool = False) -> Tensor:
    """Return the `r` columns with the largest (or smallest) of `scores` (in,).

    (r,) int64, sorted; of equal scores the lower number wins.
    """
    return scores.cpu().double().argsort(descending=not smallest, stable=True)[:r].sort().values


def weight_norms(weights: Sequence[Tensor]) -> Tensor:
    """Sum the squared column norms of weights (out, in) that read the same input; (in,) float64."""
    return torch.stack([w.detach().cpu().double().square().sum(0) for w in weights]).sum(0)


def checked_columns(columns: Sequence[int] | Tensor, in_features: int, name: str) -> Tensor:
    """Return columns that somebody else chose, sorted, as (r,) int64.

    Raises:
        ValueError: if one is out of range, occurs twice, or is no whole number.
    """
    index = torch.as_tensor(columns, device="cpu")
    if index.is_floating_point() or index.dtype == torch.bool or index.dim() != 1 or not index.numel():
        found = f"{index.dtype} of shape {tuple(index.shape)}"
        raise ValueError(f"{name}: columns must be a non-empty list of whole numbers, found {found}")
    index = index.long().sort().values
    if index[0] < 0 or index[-1] >= in_features:
        raise ValueError(f"{name}: columns must lie in 0…{in_features - 1}, found {int(index[0])}…{int(index[-1])}")
    if (repeated := index[1:][index[1:] == index[:-1]]).numel():
        raise ValueError(f"{name}: columns must differ, found {int(repeated[0])} more than once")
    return index
