"""What must come out of a layer, in float64, and how far from it a result may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from paca.parity.bounds import columns_bound, product_bound, rounding_bound, sum_of_products_bound
from paca.parity.layouts import Bias

if TYPE_CHECKING:
    from paca.parity.cases import Case


class Truth(NamedTuple):
    """An exact result in float64, the dtype it comes in, and how far a computed one may be from it (None: not)."""

    exact: Tensor
    dtype: torch.dtype
    bound: Tensor | None


def truths(case: Case, adapted: Tensor, adapted_after: Tensor) -> dict[str, Truth]:
    """Compute every result of a case in float64 and bound the error of each.

    Args:
        case: whose inputs to use.
        adapted: the weight that the machine in question computed with, (out, in).
        adapted_after: the same after the optimizer's step. Both are compared with the truth themselves.

    Returns:
        By name: gathered `x[..., index]` (tokens, r), y (tokens, out), grad_input (tokens, in) and the same as the sum
        of the products of `readers`, adapted (out, in), grad_delta (out, r), grad_bias (out,), and adapted_after and
        y_after, what they are after the optimizer's step.
    """
    dtype, index, scale = case.dtype, case.inputs["index"], case.scale
    x, gy, weight, delta, delta_after = (
        case.inputs[key].double() for key in ("x", "gy", "weight", "delta", "delta_after")
    )
    bias = None if case.bias is Bias.NONE else case.inputs["bias"].double()
    wide = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    w, w_after, xs = adapted.double(), adapted_after.double(), x[:, index]
    columns = gy.t() @ xs
    columns_error = product_bound(gy.t(), xs, wide)
    scaled_error = abs(scale) * columns_error + rounding_bound(abs(scale) * (columns.abs() + columns_error), wide)
    ones = torch.ones(1, len(gy), dtype=torch.float64)
    found = {
        "gathered": Truth(xs, dtype, None),
        "y": _output(x, w, bias, dtype),
        "grad_input": Truth(gy @ w, dtype, product_bound(gy, w, dtype)),
        "grad_input_sum": Truth(gy @ w, dtype, sum_of_products_bound(readers(gy, w), dtype)),
        "adapted": Truth(columns_exact(case, after=False), dtype, _columns_bound(weight, index, delta, scale, dtype)),
        "grad_delta": Truth(scale * columns, wide, scaled_error),
        "grad_bias": Truth((ones @ gy)[0], dtype, product_bound(ones, gy, dtype)[0]),
        "adapted_after": Truth(
            columns_exact(case, after=True), dtype, _columns_bound(weight, index, delta_after, scale, dtype)
        ),
        "y_after": _output(x, w_after, bias, dtype),
    }
    exact_only = case.tier == "bitwise"
    return {
        key: truth._replace(bound=None) if exact_only else truth
        for key, truth in found.items()
        if key in case.output_names
    }


def readers(gy: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Make three layers that read the same input from one: gy (tokens, out) and weight (out, in) of each.

    The sum of their products is `gy @ weight`. The first is of other tokens; the last takes it away again, with its
    outputs in reverse. So neither the first nor the last may be left out, and none may stand in for another.
    """
    others = gy.roll(1, 0)
    return [(others, weight), (gy, weight), (others.flip(1), -weight.flip(0))]


def columns_exact(case: Case, after: bool) -> Tensor:
    """Return the adapted weight in float64, unrounded."""
    weight, index = case.inputs["weight"].double(), case.inputs["index"]
    delta = case.inputs["delta_after" if after else "delta"].double()
    return weight.index_add(1, index, case.scale * delta)


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Truth:
    """Return x Wᵀ + b; a bias may be added to a product that was rounded."""
    if bias is None:
        return Truth(x @ weight.t(), dtype, product_bound(x, weight.t(), dtype))
    return Truth(x @ weight.t() + bias, dtype, product_bound(x, weight.t(), dtype, plus=bias, roundings=2))


def _columns_bound(weight: Tensor, index: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Bound the error of an adapted weight: none outside the trained columns."""
    bound = torch.zeros_like(weight)
    bound[:, index] = columns_bound(weight[:, index], delta, scale, dtype)
    return bound
