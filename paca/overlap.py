"""What adapters change and where they meet: norms of updates by layer, shared columns, and interference.

SHiRA (arXiv 2406.13175) explains by the overlap of sparse updates why several adapters can be fused: where they touch
different weights, neither disturbs the other. Here the unit is a column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from paca.errors import AdapterError
from paca.saved import SavedAdapter, SavedLayer


@dataclass(frozen=True)
class LayerChange:
    """One layer's part of an adapter."""

    name: str
    columns: int  # trained
    width: int | None  # inputs of the layer, if the file says
    parameters: int
    norm: float  # ‖s·Δ‖_F
    largest: int  # the column whose update is largest
    idle: int  # columns whose update is zero


@dataclass(frozen=True)
class Overlap:
    """Where two adapters meet in one layer, or in all of them together.

    Attributes:
        shared: columns that both train.
        first, second: columns that each trains.
        by_chance: shared columns to expect of independent random choices; None if the widths are not recorded.
        cosine: ⟨U₁, U₂⟩ / (‖U₁‖·‖U₂‖) of the whole updates: 0 where they do not interfere, 1 where they do the same.
    """

    name: str
    shared: int
    first: int
    second: int
    by_chance: float | None
    cosine: float


def changes(adapter: SavedAdapter) -> list[LayerChange]:
    """List what an adapter changes, layer by layer, in the order of the file's names."""
    made = []
    for name, layer in adapter.layers.items():
        norms = layer.update().double().square().sum(0)  # (r,)
        made.append(
            LayerChange(
                name,
                columns=len(layer.index),
                width=adapter.width(name),
                parameters=layer.delta.numel(),
                norm=math.sqrt(float(norms.sum())),
                largest=int(layer.index[norms.argmax()]),
                idle=int((norms == 0).sum()),
            )
        )
    return made


def overlap(first: SavedAdapter, second: SavedAdapter) -> list[Overlap]:
    """Compare two adapters of one base model: an entry for each layer that either trains, and one for all, "total".

    Raises:
        AdapterError: if one is a mask and the other is not, or a layer has another number of outputs in the second than
            in the first.
    """
    if first.config.masked != second.config.masked:
        raise AdapterError("one adapter trains single entries, the other columns: a mask and columns do not meet")
    entries: list[Overlap] = []
    sums = torch.zeros(3, dtype=torch.float64)  # ⟨U₁, U₂⟩, ‖U₁‖², ‖U₂‖²
    nothing = SavedLayer(torch.empty(0, dtype=torch.long), torch.empty(0, 0), 1.0)
    for name in dict.fromkeys([*first.layers, *second.layers]):
        one, two = first.layers.get(name, nothing), second.layers.get(name, nothing)
        if name in first.layers and name in second.layers and len(one.delta) != len(two.delta):
            raise AdapterError(
                f"{name} has {len(one.delta)} outputs in one adapter and {len(two.delta)} in the other: they are for "
                "different models"
            )
        shared, product = _meet(one, two)
        squares = [float(layer.update().double().square().sum()) for layer in (one, two)]
        sums += torch.tensor([product, *squares], dtype=torch.float64)
        width = first.width(name) or second.width(name)
        chance = None if width is None else len(one.index) * len(two.index) / width
        entries.append(Overlap(name, shared, len(one.index), len(two.index), chance, _cosine(product, *squares)))
    chances = [entry.by_chance for entry in entries if entry.by_chance is not None]
    total = Overlap(
        "total",
        sum(entry.shared for entry in entries),
        sum(entry.first for entry in entries),
        sum(entry.second for entry in entries),
        sum(chances) if len(chances) == len(entries) else None,
        _cosine(*sums.tolist()),
    )
    return [*entries, total]


def overlaps(adapters: Mapping[str, SavedAdapter]) -> dict[tuple[str, str], Overlap]:
    """Compare every two adapters over all layers."""
    return {(a, b): overlap(adapters[a], adapters[b])[-1] for a, b in combinations(adapters, 2)}


def _meet(one: SavedLayer, two: SavedLayer) -> tuple[int, float]:
    """Count shared columns, and return ⟨U₁, U₂⟩: columns that only one trains add nothing to it."""
    where = torch.isin(one.index, two.index)
    if not where.any():
        return 0, 0.0
    other = torch.searchsorted(two.index, one.index[where])
    product: Tensor = one.update()[:, where].double() * two.update()[:, other].double()
    return int(where.sum()), float(product.sum())


def _cosine(inner: float, first: float, second: float) -> float:
    return inner / math.sqrt(first * second) if first and second else 0.0
