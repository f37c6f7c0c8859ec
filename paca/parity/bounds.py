"""How far a correct result may be from the exact one: the bounds of the bounded tier.

N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., SIAM 2002. Lemma 3.1: n roundings, in any
order, change a result by a factor 1 + θ with |θ| ≤ γ_n = n·u / (1 - n·u). Eq. (3.5): a computed inner product of length
n is within γ_n·|x|ᵀ|y| of the exact one, whatever the order of the sum; so is each element of a matrix product
(section 3.5). Section 2.2: u = 2^-p for rounding to nearest, 2^(1-p) for chopping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paca.parity.formats import unit_roundoff

# Sums are formed in float32. Tensor cores and their like chop instead of rounding, so u is that of chopping.
ACCUMULATOR_ROUNDOFF = 2 * unit_roundoff(torch.float32)


def gamma(n: int, u: float) -> float:
    """Return γ_n = n·u / (1 - n·u).

    Raises:
        ValueError: if n·u ≥ 1; the bound says nothing then.
    """
    if n * u >= 1:
        raise ValueError(f"a sum of {n} terms with unit roundoff {u} has no bound")
    return n * u / (1 - n * u)


def product_bound(a: Tensor, b: Tensor, dtype: torch.dtype, plus: Tensor | None = None, roundings: int = 1) -> Tensor:
    """Bound |computed - exact| for `a @ b (+ plus)`, summed in float32 and then rounded to `dtype`.

    Args:
        a: (m, k) float64.
        b: (k, n) float64.
        plus: what is added to the product, broadcast to (m, n).
        dtype: of the result.
        roundings: how often the result may be rounded to `dtype`: 2 where a bias may be added to a rounded product.

    Returns:
        (m, n) float64.
    """
    magnitude = a.abs() @ b.abs()
    if plus is not None:
        magnitude = magnitude + plus.abs()
    summed = gamma(a.shape[1] + (plus is not None), ACCUMULATOR_ROUNDOFF) * magnitude
    product = a @ b
    largest = product.abs() if plus is None else torch.maximum(product.abs(), (product + plus).abs())
    return summed + roundings * rounding_bound(largest + summed, dtype)


def sum_of_products_bound(factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Bound |computed - exact| for the sum of `a @ b` over all (a, b), added in their order.

    The terms are summed in float32; each product, and each sum so far, may be rounded to `dtype`.

    Args:
        factors: (m, k) and (k, n) float64 of each product; k may differ.
        dtype: of the result.

    Returns:
        (m, n) float64.
    """
    products = [a @ b for a, b in factors]
    magnitude = torch.stack([a.abs() @ b.abs() for a, b in factors]).sum(0)
    summed = gamma(sum(len(b) for _, b in factors), ACCUMULATOR_ROUNDOFF) * magnitude
    total, error = torch.zeros_like(magnitude), summed
    for number, product in enumerate(products):
        total = total + product
        error = error + rounding_bound(product.abs() + summed, dtype)
        if number:
            error = error + rounding_bound(total.abs() + error, dtype)
    return error


def rounding_bound(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound the error of rounding to `dtype` once; below the normal numbers it is absolute."""
    return unit_roundoff(dtype) * exact.abs() + float(torch.finfo(dtype).smallest_normal) * unit_roundoff(dtype)


def columns_bound(base: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Bound the error of the written columns `base + scale·delta`: two operations in float32, then one rounding."""
    inner = gamma(2, ACCUMULATOR_ROUNDOFF) * (base.abs() + abs(scale) * delta.abs())
    return inner + rounding_bound((base + scale * delta).abs() + inner, dtype)
