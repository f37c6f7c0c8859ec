"""Draws the numbers of the bitwise tier: integers whose sums no device can get wrong by rounding.

A linear layer's three contractions must each be exact in float32 in any order, and their results exact in the working
dtype. Small sparse integers would do, but then partial sums fit the working dtype as well, and a device that sums in it
would pass. So large terms are made to cancel: input columns come in pairs i, i' with equal x and opposite weights,
output rows in pairs with equal gy and opposite weights. Partial sums need many more bits than the result, which is left
to a few weights of ±1, one odd pair a token, the bias and the trained columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from paca.parity.formats import SIGNIFICAND_BITS

NARROW_ACCUMULATOR_BITS = 20

RESIDUAL_WEIGHTS = 2  # ±1 that do not cancel, for each row and column where the weight is square
# 12 bits are one more than TF32 keeps, so that rounding an operand to it shows.
WIDE_BITS = 12
NARROW_BITS = 2  # that are left to the other operand, however many tokens there are
SCALE = 2.0  # alpha / r


@dataclass(frozen=True)
class Shape:
    """Sizes of one linear layer and its input, and whether its trained columns are neighbours."""

    tokens: int
    n_in: int
    n_out: int
    rank: int
    neighbours: bool = False


@dataclass(frozen=True)
class Ranges:
    """Largest magnitudes, all powers of two: x in -x…x and so on."""

    x: int
    gy: int
    weight: int  # of the terms that cancel
    bias: int
    delta: int


@dataclass(frozen=True)
class LayerNumbers:
    """What one step of a layer needs, exact in float64 and in the dtype they were drawn for.

    The optimizer moves `delta` to `delta_after`.
    """

    x: Tensor  # (tokens, in)
    gy: Tensor  # (tokens, out)
    weight: Tensor  # (out, in), the pretrained one
    bias: Tensor  # (out,)
    index: Tensor  # (r,) int64, sorted
    delta: Tensor  # (out, r)
    delta_after: Tensor  # (out, r)
    alpha: float  # the update is scaled by alpha / r


def accumulator_bits(dtype: torch.dtype) -> int:
    """Return how many bits of an accumulator the sums of a dtype may use.

    Those of float32 products are formed in float32 everywhere; for products of narrower numbers some bits are left to
    accumulators that keep fewer than float32's 24.
    """
    return SIGNIFICAND_BITS[dtype] if dtype in (torch.float64, torch.float32) else NARROW_ACCUMULATOR_BITS


def admissible_ranges(shape: Shape, dtype: torch.dtype, wide: str = "x") -> Ranges:
    """Derive from the shapes how large numbers may be.

    Every |a||b| summed over the length of its contraction must fit the accumulator, and every result the dtype:

        |y|  ≤ k_row·x + weight + bias + scale·x ≤ 2^p    k: residual weights in a row or column
        |gx| ≤ k_column·gy + weight              ≤ 2^p    p: bits of the dtype's significand

    Args:
        shape: of the layer.
        dtype: that it computes in.
        wide: the operand that gets as many bits as it can use: "x" or "gy".

    Raises:
        ValueError: if the sums of such a shape cannot be exact in this dtype.
    """
    bits = SIGNIFICAND_BITS[dtype]
    accumulator = accumulator_bits(dtype)
    length_in, length_out = _log2(shape.n_in), _log2(shape.n_out)
    length_tokens = _log2(shape.tokens) + int(math.log2(SCALE))
    # A quarter of the output's range each for residual weights, terms of the odd pair, bias and trained columns.
    quarter = bits - 2
    x = quarter - _log2(max(_residual_weights(shape.n_out, shape.n_in), SCALE))
    gy = quarter - _log2(_residual_weights(shape.n_in, shape.n_out))
    weight = quarter
    wide_bits = min(WIDE_BITS, accumulator - length_tokens - NARROW_BITS)
    if wide == "x":
        x = min(x, wide_bits)
        weight = min(weight, accumulator - x - length_in - 1)
        gy = min(gy, accumulator - weight - length_out - 1, accumulator - x - length_tokens)
    else:
        gy = min(gy, wide_bits)
        weight = min(weight, accumulator - gy - length_out - 1)
        x = min(x, accumulator - weight - length_in - 1, accumulator - gy - length_tokens)
    if min(x, gy, weight) < 0:
        raise ValueError(f"{shape} has sums too long to be exact in {dtype}; take smaller sizes")
    return Ranges(2**x, 2**gy, 2**weight, 2 ** min(quarter, weight + 1), max(1, 2 ** (weight - 1)))


def _residual_places(n_in: int, n_out: int) -> int:
    """How many residual weights are placed in one turn; much longer sides are not filled, lest sums get too large."""
    return min(max(n_in, n_out), 2 * min(n_in, n_out))


def _residual_weights(of: int, other: int) -> int:
    """How many residual weights one of `of` rows (or columns) has at most, of `other` columns (or rows)."""
    return RESIDUAL_WEIGHTS * math.ceil(_residual_places(of, other) / of)


def _log2(n: float) -> int:
    return math.ceil(math.log2(max(n, 1)))


def draw(
    shape: Shape, dtype: torch.dtype, generator: Generator, wide: str = "x", bias_trains: bool = False
) -> LayerNumbers:
    """Draw a layer's numbers within their admissible ranges.

    Args:
        shape: of the layer.
        dtype: that it computes in.
        generator: of the random numbers.
        wide: see `admissible_ranges`.
        bias_trains: whether the sum of gy over the tokens, too, must be exact and fit the dtype.
    """
    ranges = admissible_ranges(shape, dtype, wide)
    in_order = torch.randperm(shape.n_in, generator=generator)
    out_order = torch.randperm(shape.n_out, generator=generator)
    x = _paired(_integers((shape.tokens, shape.n_in), ranges.x, generator), in_order)
    gy = _paired(_integers((shape.tokens, shape.n_out), ranges.gy, generator), out_order)
    if bias_trains:  # of an odd number of tokens the last one is left
        half = shape.tokens // 2
        gy[half : 2 * half] = -gy[:half]
    adapted = _cancelling(shape, ranges.weight, in_order, out_order, generator)
    for turn in range(RESIDUAL_WEIGHTS):
        place = torch.arange(_residual_places(shape.n_in, shape.n_out))
        rows, columns = (place + turn) % shape.n_out, place % shape.n_in
        signs = torch.randint(0, 2, (len(place),), generator=generator).double() * 2 - 1
        adapted.index_put_((out_order[rows], in_order[columns]), signs, accumulate=True)
    index = draw_index(shape, generator)
    delta = _integers((shape.n_out, shape.rank), ranges.delta, generator) / SCALE
    weight = adapted.clone()
    weight[:, index] -= SCALE * delta
    # One trained column of each row moves by one step.
    rows = torch.arange(shape.n_out)
    delta_after = delta.clone()
    delta_after[rows, rows % shape.rank] += torch.randint(0, 2, (shape.n_out,), generator=generator).double() * 2 - 1
    bias = _integers((shape.n_out,), ranges.bias, generator)
    return LayerNumbers(x, gy, weight, bias, index, delta, delta_after, SCALE * shape.rank)


def draw_index(shape: Shape, generator: Generator) -> Tensor:
    """Draw which columns train, (r,) int64, sorted."""
    if shape.neighbours:
        first = int(torch.randint(shape.n_in - shape.rank + 1, (1,), generator=generator))
        return torch.arange(first, first + shape.rank)
    return torch.randperm(shape.n_in, generator=generator)[: shape.rank].sort().values


def _integers(size: tuple[int, ...], largest: int, generator: Generator) -> Tensor:
    return torch.randint(-largest, largest + 1, size, generator=generator).double()


def _paired(values: Tensor, order: Tensor) -> Tensor:
    """Make the columns of each pair equal, but for one column a row, which is taken one step towards zero."""
    half = len(order) // 2
    values[:, order[half : 2 * half]] = values[:, order[:half]]
    rows = torch.arange(len(values))
    odd = order[rows % len(order)]
    values[rows, odd] -= values[rows, odd].sign()
    return values


def _cancelling(shape: Shape, largest: int, in_order: Tensor, out_order: Tensor, generator: Generator) -> Tensor:
    """Return a weight whose pairs of columns and of rows cancel; an odd one out has zeros."""
    half_in, half_out = shape.n_in // 2, shape.n_out // 2
    quarter = _integers((half_out, half_in), largest - 1 if largest > 1 else 1, generator)
    weight = torch.zeros(shape.n_out, shape.n_in, dtype=torch.float64)
    block = torch.cat([torch.cat([quarter, -quarter], 1), torch.cat([-quarter, quarter], 1)])
    weight[out_order[: 2 * half_out, None], in_order[: 2 * half_in]] = block
    return weight
