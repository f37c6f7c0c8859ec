"""Starts the trained columns of a quantised base from the values that its checkpoint has for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from paca.layer import PacaLayer
from paca.quantised import QuantisedWeight

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def start_from_checkpoint(layers: Iterable[PacaLayer], adapter: str, checkpoint: str) -> None:
    """Set Δ so that a new adapter's columns hold the checkpoint's own values, rounded to the model's dtype.

    Quantising loses most in few columns' worth of bytes; these get it back. Δ stays relative to the dequantised
    weight, so such an adapter is saved, converted and merged as any other.

    Args:
        layers: those to look at; only quantised ones change.
        adapter: the adapter's name.
        checkpoint: a folder, or a name on the hub, with the model in safetensors and not quantised.

    Raises:
        ValueError: if the checkpoint lacks a weight, or has it in another shape or quantised.
    """
    waiting = {layer.name: layer for layer in layers if isinstance(layer.adapted, QuantisedWeight)}
    for name, weight in _weights(checkpoint, list(waiting)):
        layer = waiting.pop(name)
        if weight.shape != (layer.out_features, layer.in_features) or not weight.is_floating_point():
            raise ValueError(
                f"{checkpoint} has {name}.weight as {weight.dtype} {tuple(weight.shape)}, needed are floating-point "
                f"values of shape {(layer.out_features, layer.in_features)}; use start_from='loaded'"
            )
        delta, index = layer.paca_delta[adapter], layer.paca_indices[adapter]
        original = weight.index_select(1, index.cpu()).to(layer.adapted.dtype).to(delta.device, delta.dtype)
        delta.copy_((original - layer.base_columns(adapter).to(delta.dtype)) / layer.scaling[adapter])
    if waiting:
        raise ValueError(
            f"{checkpoint} has no weight for {next(iter(waiting))} ({len(waiting)} layers); use start_from='loaded'"
        )


def _weights(checkpoint: str, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Read the weights of some layers, one at a time."""
    files = _files(checkpoint)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in sorted(set(files.values()))}
        for name in names:
            if file := files.get(f"{name}.weight"):
                yield name, opened[file].get_tensor(f"{name}.weight")


def _files(checkpoint: str) -> dict[str, str]:
    """Return which file has which tensor."""
    from transformers.utils.hub import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(checkpoint, _INDEX, **missing) if checkpoint else None
    if index is not None:
        parts: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        paths = {part: str(cached_file(checkpoint, part)) for part in sorted(set(parts.values()))}
        return {key: paths[part] for key, part in parts.items()}
    whole = cached_file(checkpoint, _WEIGHTS, **missing) if checkpoint else None
    if whole is None:
        raise ValueError(
            f"start_from='checkpoint' reads the base's own values, but {checkpoint or 'a model made in memory'} has no "
            f"{_WEIGHTS}; use start_from='loaded'"
        )
    with safe_open(whole, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), str(whole))
