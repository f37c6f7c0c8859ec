"""Writes a compressed copy of a saved adapter and says what it lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from paca.compress import PACKED, pack, quantise
from paca.saved import PREFIX, read_adapter, refuse_full, write_adapter


@dataclass(frozen=True)
class Report:
    """What compression did to an adapter.

    Attributes:
        bits: of each stored delta.
        before, after: bytes of the weight file.
        errors: for each layer ‖U − Û‖_F / ‖U‖_F of its update; 0 where both are zero.
        total: the same of all layers together.
    """

    bits: int
    before: int
    after: int
    errors: dict[str, float]
    total: float

    def lines(self) -> list[str]:
        """Return the lines to print."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        return [
            f"{self.bits} bit{'s' if self.bits > 1 else ''} and a scale for each column: {self.before:,} bytes became "
            f"{self.after:,}, {self.before / self.after:.1f} times smaller",
            f"relative error of the update {self.total:.4f}, at most {self.errors[worst]:.4f} in one layer ({worst})",
        ]


def compress(folder: Path, out: Path, bits: int) -> Report:
    """Write an adapter with deltas in fewer bits to a new folder, which PEFT loads after `import paca`.

    Args:
        folder: a saved PaCA adapter.
        out: must not exist, or be empty.
        bits: 8, 4 or 1.

    Raises:
        FileNotFoundError, FileExistsError, AdapterError: if either folder is not as said.
    """
    refuse_full(out)
    saved = read_adapter(folder)
    saved.refuse_mask("compression")
    tensors = dict(saved.others)
    lost, whole = {}, {}
    for name, layer in saved.layers.items():
        quantised = quantise(layer.delta, bits)
        tensors[f"{PREFIX}{name}{PACKED}"] = pack(layer.index, quantised)
        difference = (layer.delta.double() - quantised.values().double()) * layer.scale
        lost[name], whole[name] = float(difference.square().sum()), float(layer.update().double().square().sum())
    write_adapter(saved.config, tensors, out, copied_from=folder)
    return Report(
        bits,
        before=(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        after=(out / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        errors={name: _relative(lost[name], whole[name]) for name in lost},
        total=_relative(sum(lost.values()), sum(whole.values())),
    )


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
