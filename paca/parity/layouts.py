"""The layers that are compared: their sizes, how they are stored, and what of them trains."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from paca.parity.exact import Shape


class Storage(str, Enum):
    """How a layer's weight lies in memory."""

    LINEAR = "linear"  # (out, in)
    CONV1D = "conv1d"  # (in, out), as transformers' Conv1D has it


class Bias(str, Enum):
    """Whether a layer has a bias, and whether it trains."""

    NONE = "none"
    FROZEN = "frozen"
    TRAINED = "trained"


class Layout(NamedTuple):
    """One layer and its input.

    Attributes:
        shape: its sizes.
        lead: the leading sizes of x, whose product is the number of tokens.
        wide: which operand of the exact numbers is the wide one; see `exact.admissible_ranges`.
        storage: of the weight.
        bias: of the layer.
    """

    shape: Shape
    lead: tuple[int, ...]
    wide: str = "x"
    storage: Storage = Storage.LINEAR
    bias: Bias = Bias.FROZEN


# Sums are short where they can be: there the rounding bound is tight, and exact numbers can be large. The first layout
# stands for all where trying each takes too long.
LAYOUTS = {
    "odd": Layout(Shape(tokens=37, n_in=53, n_out=29, rank=5), (37,)),  # sizes that no block divides
    "blocks": Layout(Shape(tokens=64, n_in=64, n_out=48, rank=16), (2, 4, 8), wide="gy"),  # sizes that all blocks do
    "thin": Layout(Shape(tokens=6, n_in=20, n_out=33, rank=1), (2, 3), bias=Bias.NONE),  # y is rounded once only
    "neighbours": Layout(Shape(tokens=30, n_in=48, n_out=36, rank=8, neighbours=True), (5, 6), wide="gy"),
    "conv1d": Layout(Shape(tokens=21, n_in=24, n_out=40, rank=6), (3, 7), storage=Storage.CONV1D, bias=Bias.TRAINED),
    "vector": Layout(Shape(tokens=1, n_in=31, n_out=17, rank=3), ()),
    "empty": Layout(Shape(tokens=0, n_in=9, n_out=7, rank=2), (0, 3), bias=Bias.TRAINED),
    # More tokens than any loop or split over them takes at once.
    "long": Layout(Shape(tokens=2501, n_in=8, n_out=8, rank=2), (2501,), bias=Bias.TRAINED),
}
