"""What a floating-point format can hold, and how far apart two of its numbers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Bits of the significand, the leading one included: every integer up to 2^bits is exact.
SIGNIFICAND_BITS = {
    torch.float64: 53,
    torch.float32: 24,
    torch.float16: 11,
    torch.bfloat16: 8,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 3,
}

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def name_of(dtype: torch.dtype) -> str:
    """Return "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ValueError: if it is none of those that are compared.
    """
    known = {name_of(dtype): dtype for dtype in SIGNIFICAND_BITS}
    if name not in known:
        raise ValueError(f"no dtype named {name!r}; known: {', '.join(known)}")
    return known[name]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to nearest, 2^-bits."""
    return 2.0 ** -SIGNIFICAND_BITS[dtype]


def is_representable(exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number of a float64 tensor survives the way to the dtype and back."""
    return torch.equal(exact.to(dtype).double(), exact)


def ulp_distance(found: Tensor, expected: Tensor) -> Tensor:
    """Count the representable numbers from one to the other, elementwise, int64; 0 for -0 and +0.

    Both are of one dtype. A nan is as far from everything as its bits say.
    """
    a, b = _ordinal(found), _ordinal(expected)
    return (a - b).abs()


def _ordinal(x: Tensor) -> Tensor:
    """Number the values of a dtype in their order, 0 for both zeros."""
    bits = x.contiguous().view(_SAME_SIZE[x.element_size()])
    magnitude = (bits & torch.iinfo(bits.dtype).max).long()
    return torch.where(bits < 0, -magnitude, magnitude)


@dataclass(frozen=True)
class Difference:
    """Where two tensors first differ, and how much."""

    index: tuple[int, ...]
    found: float
    expected: float
    ulps: int  # at that element
    count: int  # of elements that differ
    of: int  # elements in all

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index))
        return (
            f"[{where}] is {self.found:.9g}, expected {self.expected:.9g}, {self.ulps} ulp apart; "
            f"{self.count} of {self.of} elements differ"
        )


def first_difference(found: Tensor, expected: Tensor) -> Difference | None:
    """Compare bits; None if they are the same. The sign of a zero does not count: it depends on the order of a sum.

    Both are of one shape and dtype, on the CPU.
    """
    apart = ulp_distance(found, expected)
    differing = apart.nonzero()
    if not len(differing):
        return None
    index = tuple(differing[0].tolist())
    return Difference(
        index, float(found[index]), float(expected[index]), int(apart[index]), len(differing), found.numel()
    )
