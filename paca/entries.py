"""Which entries of a weight an unstructured mask trains (SHiRA, arXiv 2406.13175), and their names in a file.

An entry's number is its place in the weight as its layer has it, row by row: row · width + column. As many entries
train as `r` columns have, r·out in each layer. A file has, for each layer, `paca_mask_indices` (k,) int32 (int64 beyond
2³¹ entries), sorted, and `paca_mask_delta` (k,).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paca.select import generator_for

DELTA, INDICES = "paca_mask_delta", "paca_mask_indices"
_INSIDE = {DELTA: "paca_delta", INDICES: "paca_indices"}  # one row, whose columns are the entries


def random_entries(total: int, count: int, seed: int, name: str) -> Tensor:
    """Draw `count` of `total` entries uniformly without replacement, by seed and name alone; (count,) int64, sorted.

    Drawn with replacement until enough differ: a permutation of all entries would take as much memory as the weight.
    """
    generator = generator_for(seed, f"mask of {name}")
    picked = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(picked) < count:
        drawn = torch.cat([picked, torch.randint(total, (count,), generator=generator, device="cpu")])
        order = torch.arange(len(drawn), device="cpu")
        numbers, place = drawn.unique(return_inverse=True)
        first = torch.full_like(numbers, len(drawn)).scatter_reduce_(0, place, order, "amin")
        picked = drawn[first.sort().values][:count]  # in the order they were drawn in: the smallest are not preferred
    return picked.sort().values


def best_entries(scores: Tensor, count: int) -> Tensor:
    """Return the `count` entries with the largest of `scores`; (count,) int64, sorted; of equal ones the first win."""
    scores = scores.detach().cpu().float().flatten()
    least = scores.kthvalue(len(scores) - count + 1).values
    better = (scores > least).nonzero().flatten()
    equal = (scores == least).nonzero().flatten()[: count - len(better)]
    return torch.cat([better, equal]).sort().values


def padded(index: Tensor, multiple: int) -> Tensor:
    """Add the lowest entries that are missing until the number of entries is a multiple; (k,) sorted, to (k',)."""
    missing = -len(index) % multiple
    low = torch.arange(len(index) + missing, device=index.device)
    return torch.cat([index, low[~torch.isin(low, index)][:missing]]).sort().values


def to_file(tensors: Mapping[str, Tensor], adapter: str = "") -> dict[str, Tensor]:
    """Return an adapter's tensors with those of its masks as they lie in a file.

    Args:
        tensors: all layers' `paca_delta`, (1, k), and `paca_indices`, (k,), and others.
        adapter: what ends the keys.
    """
    ending = f".{adapter}" if adapter else ""
    stored = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removesuffix(ending).rpartition(".")
        if kind == "paca_delta":
            stored[f"{module}.{DELTA}{ending}"] = tensor.flatten()
        elif kind == "paca_indices":
            small = not tensor.numel() or int(tensor.max()) < 2**31
            stored[f"{module}.{INDICES}{ending}"] = tensor.to(torch.int32 if small else torch.int64)
        else:
            stored[key] = tensor
    return stored


def from_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `to_file`; tensors of columns pass."""
    plain = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        if kind == DELTA:
            tensor = tensor.reshape(1, -1)
        elif kind == INDICES:
            tensor = tensor.long()
        plain[f"{module}.{_INSIDE[kind]}" if kind in _INSIDE else key] = tensor
    return plain


def holds_masks(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's tensors, named as in its file, are those of masks."""
    return any(key.endswith(f".{DELTA}") for key in tensors)
