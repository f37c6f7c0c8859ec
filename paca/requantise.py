"""Merges an adapter into a quantised base that stays quantised, and measures what that costs."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from dataclasses import dataclass
from typing import Any

from peft.utils.quantization_utils import QuantizationBackend, TorchaoBackend, get_quantization_kwargs
from torch import Tensor, nn

from paca.layer import PacaLayer
from paca.quantised import QuantisedWeight


@dataclass(frozen=True)
class Moved:
    """How far re-quantising moved a layer's trained columns from where training had put them."""

    mean: float  # of |re-quantised - trained|, over all their elements
    largest: float
    of_update: (
        float  # norm of that difference / norm of trained - pretrained; 1: as much as was learnt; inf: nothing was
    )

    @classmethod
    def measure(cls, pretrained: Tensor, trained: Tensor, requantised: Tensor) -> Moved:
        """Compare columns, each (out, r)."""
        difference = requantised.double() - trained.double()
        update = (trained.double() - pretrained.double()).norm().item()
        share = difference.norm().item() / update if update else math.inf
        return cls(difference.abs().mean().item(), difference.abs().max().item(), share)


def requantised(
    weight: QuantisedWeight, library: QuantizationBackend, dense: nn.Linear, index: Tensor
) -> tuple[nn.Module, Moved]:
    """Quantise a merged layer as its base was.

    Args:
        weight: the quantised weight that the adapter was trained on.
        library: PEFT's access to its library, which knows how it was quantised.
        dense: the layer with the trained columns.
        index: (u,) int64, those columns.

    Returns:
        The quantised layer, and how far that moved its trained columns.
    """
    holder = _Holder(copy.deepcopy(weight.layer))
    library.set_base_weight(holder, dense.weight.data.clone())
    again = QuantisedWeight(holder.base_layer, weight.name, weight.ops, weight.library, weight.dtype)
    columns = (w.index_select(1, index) for w in (weight.matrix, dense.weight, again.matrix))
    return holder.base_layer, Moved.measure(*columns)


class _Holder:
    """What PEFT's libraries write a weight to."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


def merge_requantised(model: Any) -> tuple[nn.Module, dict[str, Moved]]:
    """Merge the active adapters and quantise the result as the base was.

    `merge_and_unload` keeps trained columns exactly, in 16 bits; this rounds them to the base's format again, with
    their neighbours in each block.

    Args:
        model: a PEFT model on a quantised base; it is taken apart.

    Returns:
        The base model, quantised, with the adapters in it; and by layer how far its trained columns were moved.

    Raises:
        ValueError: if no adapted layer is quantised, or it is not known how.
        TypeError: if a format cannot be dequantised.
    """
    layers = [m for m in model.modules() if isinstance(m, PacaLayer) and _merges(m)]
    quantised = {m.name: m.adapted for m in layers if isinstance(m.adapted, QuantisedWeight)}
    if not quantised:
        raise ValueError(
            "no layer of the active adapters is quantised; merge_and_unload() merges without loss, set_adapter() "
            "activates others"
        )
    base = model.get_base_model()
    libraries = {name: _requantising(weight, base) for name, weight in quantised.items()}
    notes = {note: vars(base)[note] for note in _NOTES if note in vars(base)}
    configured = getattr(getattr(base, "config", None), "quantization_config", None)
    merged: Any = model.merge_and_unload(safe_merge=True)
    moved: dict[str, Moved] = {}
    for name, weight in quantised.items():
        assert weight.chosen is not None  # merging has planned it
        layer, moved[name] = requantised(weight, libraries[name], merged.get_submodule(name), weight.chosen.index)
        merged.set_submodule(name, layer)
    if configured is not None:
        merged.config.quantization_config = configured
    vars(merged).update(notes)
    worst = max(moved, key=lambda name: moved[name].of_update)
    warnings.warn(
        f"re-quantising moved the trained columns of {len(moved)} layers by {_median(moved):.0%} (median) of what "
        f"training had changed them; most in {worst}: {moved[worst].of_update:.0%}. merge_and_unload() keeps them",
        stacklevel=2,
    )
    return merged, moved


def _merges(layer: PacaLayer) -> bool:
    """Whether a merge changes a layer: those that only other adapters train stay as they are."""
    return any(name in layer.paca_delta for name in (*layer.merged_adapters, *layer.active_adapters))


def _requantising(weight: QuantisedWeight, base: nn.Module) -> QuantizationBackend:
    """Return access to a weight's library that can quantise again; torchao's settings are with the model alone."""
    if not isinstance(weight.library, TorchaoBackend):
        return weight.library
    if not (settings := get_quantization_kwargs(base)):
        raise ValueError(
            f"{weight.name} was quantised by torchao, which does not record how, and the model was not loaded with a "
            "TorchAoConfig that would tell; merge with merge_and_unload() and quantise the result"
        )
    return TorchaoBackend(**settings)


# Where transformers notes that a model is quantised, beside its config.
_NOTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def _median(moved: dict[str, Moved]) -> float:
    return statistics.median(layer.of_update for layer in moved.values())
