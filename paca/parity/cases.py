"""The layers that are compared: their numbers, what must come out, and how far from it a result may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paca.parity.bounds import columns_bound, product_bound, rounding_bound
from paca.parity.exact import Shape, draw
from paca.parity.formats import name_of
from paca.strategies import adapted_columns

BITWISE, BOUNDED, TRAJECTORY = "bitwise", "bounded", "trajectory"
TIERS = (BITWISE, BOUNDED, TRAJECTORY)


class Layout(NamedTuple):
    """A shape, how its tokens are laid out, and which operand of the exact numbers is the wide one."""

    shape: Shape
    lead: tuple[int, ...]
    wide: str


# Sizes that no block divides, sizes that all do, and a single column. Sums are short on purpose: that is where the
# rounding bound is tight, and exact numbers can be large.
LAYOUTS = {
    "odd": Layout(Shape(tokens=37, n_in=53, n_out=29, rank=5), (37,), "x"),
    "blocks": Layout(Shape(tokens=64, n_in=64, n_out=48, rank=16), (2, 4, 8), "gy"),
    "thin": Layout(Shape(tokens=6, n_in=20, n_out=33, rank=1), (2, 3), "x"),
}
INPUTS = ("x", "gy", "weight", "bias", "index", "delta", "delta_after")
OUTPUTS = ("gathered", "y", "grad_input", "adapted", "grad_delta", "adapted_after", "y_after")


@dataclass(frozen=True)
class Case:
    """One layer, one dtype, one tier.

    Attributes:
        name: e.g. "bitwise/odd/bfloat16".
        tier: "bitwise" or "bounded".
        dtype: that the layer computes in.
        lead: the leading sizes of x, whose product is the number of tokens.
        alpha: the update is scaled by alpha / r.
        inputs: by the names in INPUTS: x (tokens, in), gy (tokens, out), weight (out, in), bias (out,) in `dtype`;
            index (r,) int64; delta and delta_after (out, r) float32.
        expected: by the names in OUTPUTS; what the recording machine computed. In the bitwise tier that is what
            every machine must.
    """

    name: str
    tier: str
    dtype: torch.dtype
    lead: tuple[int, ...]
    alpha: float
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return self.alpha / len(self.inputs["index"])


class Truth(NamedTuple):
    """An exact result in float64, the dtype it comes in, and how far a computed one may be from it (None: not)."""

    exact: Tensor
    dtype: torch.dtype
    bound: Tensor | None


def new_cases(dtype: torch.dtype, seed: int = 0) -> Iterator[Case]:
    """Make the cases of a dtype, all layouts in both tiers; the same on every machine with this version of torch."""
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        yield exact_case(f"{BITWISE}/{name}/{name_of(dtype)}", layout, dtype, generator)
        yield real_case(f"{BOUNDED}/{name}/{name_of(dtype)}", layout, dtype, generator)


def exact_case(name: str, layout: Layout, dtype: torch.dtype, generator: torch.Generator) -> Case:
    """Make a case of the bitwise tier."""
    numbers = draw(layout.shape, dtype, generator, layout.wide)
    inputs = {key: _stored(getattr(numbers, key), key, dtype) for key in INPUTS}
    case = Case(name, BITWISE, dtype, layout.lead, numbers.alpha, inputs, {})
    adapted = (_columns_exact(case, after) for after in (False, True))
    expected = {key: truth.exact.to(truth.dtype) for key, truth in truths(case, *adapted).items()}
    return Case(name, BITWISE, dtype, layout.lead, numbers.alpha, inputs, expected)


def real_case(name: str, layout: Layout, dtype: torch.dtype, generator: torch.Generator) -> Case:
    """Make a case of the bounded tier; its results are correctly rounded ones until a machine records its own."""
    shape = layout.shape
    sizes = {
        "x": (shape.tokens, shape.n_in),
        "gy": (shape.tokens, shape.n_out),
        "weight": (shape.n_out, shape.n_in),
        "bias": (shape.n_out,),
        "delta": (shape.n_out, shape.rank),
        "delta_after": (shape.n_out, shape.rank),
    }
    drawn = {key: torch.randn(size, generator=generator, dtype=torch.float64) for key, size in sizes.items()}
    for key in ("delta", "delta_after"):  # on a grid, so that an optimizer's step from one to the other is exact
        drawn[key] = (drawn[key] * 2**12).round() / 2**12
    drawn["index"] = torch.randperm(shape.n_in, generator=generator)[: shape.rank].sort().values
    inputs = {key: _stored(drawn[key], key, dtype) for key in INPUTS}
    alpha = shape.rank * 2 / 3  # a scale that rounds
    case = Case(name, BOUNDED, dtype, layout.lead, alpha, inputs, {})
    adapted = [adapted_weight(case, after) for after in (False, True)]
    expected = {key: truth.exact.to(truth.dtype) for key, truth in truths(case, *adapted).items()}
    return Case(name, BOUNDED, dtype, layout.lead, alpha, inputs, expected)


def adapted_weight(case: Case, after: bool) -> Tensor:
    """Return the weight with its adapted columns, before or after the optimizer's step, as the CPU writes it."""
    base = case.inputs["weight"][:, case.inputs["index"]]
    columns = adapted_columns(base, case.inputs["delta_after" if after else "delta"], case.scale)
    return case.inputs["weight"].index_copy(1, case.inputs["index"], columns)


def truths(case: Case, adapted: Tensor, adapted_after: Tensor) -> dict[str, Truth]:
    """Compute every result of a case in float64 and bound the error of each.

    Args:
        case: whose inputs to use.
        adapted: the weight that the machine in question computed with, (out, in).
        adapted_after: the same after the optimizer's step. Both are compared with the truth themselves.
    """
    dtype, index, scale = case.dtype, case.inputs["index"], case.scale
    x, gy, weight, bias, delta, delta_after = (
        case.inputs[key].double() for key in ("x", "gy", "weight", "bias", "delta", "delta_after")
    )
    wide = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    w, w_after, xs = adapted.double(), adapted_after.double(), x[:, index]
    columns = gy.t() @ xs
    columns_error = product_bound(gy.t(), xs, wide)
    scaled_error = abs(scale) * columns_error + rounding_bound(abs(scale) * (columns.abs() + columns_error), wide)
    found = {
        "gathered": Truth(xs, dtype, None),
        "y": Truth(x @ w.t() + bias, dtype, product_bound(x, w.t(), dtype, plus=bias, roundings=2)),
        "grad_input": Truth(gy @ w, dtype, product_bound(gy, w, dtype)),
        "adapted": Truth(_columns_exact(case, after=False), dtype, _columns_bound(weight, index, delta, scale, dtype)),
        "grad_delta": Truth(scale * columns, wide, scaled_error),
        "adapted_after": Truth(
            _columns_exact(case, after=True), dtype, _columns_bound(weight, index, delta_after, scale, dtype)
        ),
        "y_after": Truth(x @ w_after.t() + bias, dtype, product_bound(x, w_after.t(), dtype, plus=bias, roundings=2)),
    }
    if case.tier == BITWISE:
        return {key: Truth(truth.exact, truth.dtype, None) for key, truth in found.items()}
    return found


def _columns_exact(case: Case, after: bool) -> Tensor:
    """Return the adapted weight in float64, unrounded."""
    weight, index = case.inputs["weight"].double(), case.inputs["index"]
    delta = case.inputs["delta_after" if after else "delta"].double()
    return weight.index_add(1, index, case.scale * delta)


def _columns_bound(weight: Tensor, index: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Bound the error of an adapted weight: none outside the trained columns."""
    bound = torch.zeros_like(weight)
    bound[:, index] = columns_bound(weight[:, index], delta, scale, dtype)
    return bound


def _stored(values: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """Round to the dtype that an input comes in."""
    if key == "index":
        return values
    return values.to(torch.float32 if key.startswith("delta") else dtype)
