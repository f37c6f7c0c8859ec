"""Ranks columns by what flows through them: one pass over a few batches before the adapter is made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from paca.config import PacaConfig
from paca.entries import best_entries
from paca.layer import in_out_features
from paca.model import PacaModel, rank_of
from paca.select import MEASURED, best_columns, shared_name


def calibrate(
    model: nn.Module,
    config: PacaConfig,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> PacaConfig:
    """Choose columns by `config.selection` on real data.

    Scores per column j of a layer, summed over batches (and over layers that read the same input, if `share_columns`):
    `activation_norm_*`: Σ x_j² over tokens; `gradient_norm`: ‖dW[:, j]‖² of each batch's gradient. A dW is formed for
    one layer at a time, reduced to its column norms and dropped. A mask's entries are scored by |g| or |w·g|,
    where g is the sum of all batches' gradients; it is kept of every weight, in float32 in host memory. The model is
    left as it was.

    Args:
        model: the base model, before `get_peft_model`.
        config: its `selection` must be one of the measured kinds.
        batches: mappings for `model(**batch)`, or whatever `loss` takes; each is moved nowhere.
        loss: `loss(model, batch)`; by default `model(**batch).loss`. Only `gradient_norm` needs a loss.

    Returns:
        A copy of the config with `columns` set.

    Raises:
        ValueError: if the selection needs no calibration, no layer is targeted, or there is no batch.
    """
    if config.selection not in MEASURED:
        raise ValueError(
            f"selection={config.selection!r} needs no calibration; the measured ones are {', '.join(MEASURED)}"
        )
    targets = PacaModel.targets(model, config)
    PacaModel.check_fits(model, config, calibrates=True)
    if adapted := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise ValueError(f"calibrate needs the base model, before get_peft_model: {adapted[0]} has an adapter already")
    if not targets:
        raise ValueError(f"there is nothing to calibrate: no layer matches target_modules={config.target_modules!r}")
    scores = {name: _no_score(module, config.masked) for name, module in targets.items()}
    gradients = config.selection == "gradient_norm" or config.masked
    compute = loss or (lambda model, batch: model(**batch).loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    hooks: list[RemovableHandle] = []
    seen = 0
    try:
        model.eval().requires_grad_(False)
        hooks += [module.register_forward_hook(_observer(scores[name], gradients)) for name, module in targets.items()]
        for batch in tqdm(batches, desc="calibrating", leave=False):
            seen += 1
            if gradients:
                with torch.enable_grad():
                    compute(model, batch).backward()
            else:
                with torch.no_grad():
                    model(**batch) if isinstance(batch, Mapping) else compute(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
    if not seen:
        raise ValueError("calibrate needs at least one batch, found none")
    chosen = copy.deepcopy(config)
    chosen.columns = {}
    if config.masked:
        for name, module in targets.items():
            weight: Tensor = module.weight  # type: ignore[assignment]
            sensitivity = (
                scores[name] * weight.detach().cpu().float() if config.selection == "mask_snip" else scores[name]
            )
            count = rank_of(config, name) * in_out_features(module)[1]
            chosen.columns[name] = best_entries(sensitivity.abs(), count).tolist()
        return chosen
    for name in targets:
        together = [
            other for other in targets if other == name or (config.share_columns and _same_input(targets, name, other))
        ]
        total = torch.stack([scores[other] for other in together]).sum(0)
        columns = best_columns(total, rank_of(config, name), smallest=config.selection == "activation_norm_small")
        chosen.columns[name] = columns.tolist()
    return chosen


def _no_score(module: nn.Module, masked: bool) -> Tensor:
    """Zeros for each column, (in,) float64, or for each entry in the weight's own layout, float32; on the CPU."""
    if masked:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return torch.zeros(weight.shape)
    return torch.zeros(in_out_features(module)[0], dtype=torch.float64)


def _same_input(targets: Mapping[str, nn.Module], name: str, other: str) -> bool:
    return (
        shared_name(name) == shared_name(other)
        and in_out_features(targets[name])[0] == in_out_features(targets[other])[0]
    )


def _observer(score: Tensor, gradients: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Make a forward hook that adds one layer's column norms, or its gradient, to `score` on the CPU."""

    def observe(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        if not gradients:
            score.add_(x.double().square().sum(0).cpu())
            return
        if not y.requires_grad:
            y.requires_grad_(True)  # everything is frozen: the first targeted layer starts the graph

        def add_gradient(gy: Tensor) -> None:
            dw = gy.reshape(-1, gy.shape[-1]).t() @ x.to(gy.dtype)  # (out, in), of this layer alone
            if score.dim() == 1:
                score.add_(dw.double().square().sum(0).cpu())
            else:
                score.add_((dw.t() if isinstance(module, Conv1D) else dw).float().cpu())

        y.register_hook(add_gradient)

    return observe
