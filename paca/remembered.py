"""Remembers which adapters a layer runs with, so that a forward need not look them up.

A look goes through several dictionaries of several modules, and on a fast device the host's time for it would be the
time of a small product. What was found is used again as long as everything that it was made of is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paca.columns import Adapter

if TYPE_CHECKING:
    from paca.layer import PacaLayer


class Remembered:
    """The adapters that a layer was found to run with.

    Args:
        adapters: all active ones, of a layer that is neither merged nor has a schedule (which may choose other columns
            in every step).
    """

    __slots__ = ("_active", "adapters")

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = adapters
        self._active = [adapter.name for adapter in adapters]

    def serves(self, layer: PacaLayer) -> bool:
        """Whether a look would find the same; by identity, so that it costs no operation on a tensor."""
        state = layer.__dict__
        if state["_disable_adapters"] or state["merged_adapters"] or state["schedules"]:
            return False
        active = state["_active_adapter"]
        if active != self._active and [active] != self._active:
            return False
        modules, scaling = state["_modules"], state["scaling"]
        deltas, indices = modules["paca_delta"]._parameters, modules["paca_indices"]._buffers
        for adapter in self.adapters:
            name = adapter.name
            if deltas.get(name) is not adapter.delta or indices.get(name) is not adapter.index:
                return False
            if scaling.get(name) != adapter.scale:
                return False
        return True
