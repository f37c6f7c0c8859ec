"""Several adapters in one batch: each row is computed with the adapter that `adapter_names` gives it.

One weight cannot hold two adapters' columns at once, so each layer goes through the batch's adapters, swaps the columns
of each in, and computes its rows. A row meets exactly the weights that it would meet alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from paca import freshness
from paca.layer import BASE, PacaLayer


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str], beams: int = 1) -> Iterator[None]:
    """Let every row of a batch use its own adapter inside the block.

    Args:
        model: with PaCA layers, in eval mode.
        adapter_names: one name a row; "__base__" for none.
        beams: rows that beam search makes of each, one after the other.

    Raises:
        ValueError: if an adapter does not exist or is merged, or the model trains.
    """
    layers = [module for module in model.modules() if isinstance(module, PacaLayer)]
    known = {name for layer in layers for name in layer.paca_delta}
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names must be a list with one name for each row, found {adapter_names!r}")
    if missing := sorted(set(adapter_names) - known - {BASE}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(missing)}; there are {sorted(known)}"
        )
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval() first.")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    rows = [name for name in adapter_names for _ in range(beams)]
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's own wrapper of modules_to_save
                handle = module.register_forward_pre_hook(partial(_name_rows, rows), with_kwargs=True)
                hooks.callback(handle.remove)
        hooks.callback(_leave, layers)
        for layer in layers:
            layer.adapted.restore()
            layer.row_adapters = tuple(adapter_names), tuple(rows)
        yield


@torch.no_grad()
def _leave(layers: Sequence[PacaLayer]) -> None:
    with freshness.one_write():
        for layer in layers:
            layer.row_adapters = None
            layer.sync()


def _name_rows(rows: list[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": rows}
