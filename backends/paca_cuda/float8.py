"""GEMMs in float8 for the frozen part of a weight, which is quantised once; the trained columns stay as they are.

    Y  = Q(X) Q(F)ᵀ + X[..., index] W'[:, index]ᵀ + b
    dX = Q(dY) Q(F),  dX[..., index] = dY W'[:, index]

F is the weight with zeros for its trained columns. Q rounds to float8_e4m3fn, with a scale for each row of a product's
left matrix and for each column of its right one. The columns of the right one are rows of the weight in Y and columns
of it in dX, so F is quantised twice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger("paca")

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_MULTIPLE = 16  # of which both sizes of a weight must be, for the tensor cores
OLDEST_DEVICE = (8, 9)  # compute capability: Ada


def why_no_float8() -> str | None:
    """Say why the current device cannot multiply float8, or None if it can or if there is no device to ask."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability()
    if found >= OLDEST_DEVICE:
        return None
    return (
        f"it needs a device of compute capability {OLDEST_DEVICE[0]}.{OLDEST_DEVICE[1]} or newer (Ada, Hopper, "
        f"Blackwell), found {found[0]}.{found[1]}"
    )


@dataclass(frozen=True)
class Float8Products:
    """A layer's two products.

    Attributes:
        index: (r,) int64, the trained columns.
        by_rows: F, (out, in) float8, and the scales of its rows, (out, 1) float32.
        by_columns: Fᵀ, (in, out) float8, and the scales of its rows, (in, 1) float32.
    """

    index: Tensor
    by_rows: tuple[Tensor, Tensor]
    by_columns: tuple[Tensor, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept beside the weight."""
        return *self.by_rows, *self.by_columns

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return Y, (…, out), in the dtype of `x`; `weight` holds the trained columns."""
        if not x.numel():
            return F.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        y = _product(rows, *self.by_rows)
        y.addmm_(rows.index_select(1, self.index), self._columns(weight, x.dtype).t())
        if bias is not None:
            y += bias
        return y.reshape(*x.shape[:-1], len(weight))

    def grad_input(self, gy: Tensor, weight: Tensor) -> Tensor:
        """Return dX, (…, in), in the dtype of `gy`."""
        if not gy.numel():
            return gy @ weight
        rows = gy.reshape(-1, gy.shape[-1])
        gx = _product(rows, *self.by_columns)
        gx.index_copy_(1, self.index, rows @ self._columns(weight, gy.dtype))
        return gx.reshape(*gy.shape[:-1], weight.shape[1])

    def _columns(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.index_select(1, self.index).to(dtype)


def float8_products(weight: Tensor, index: Tensor) -> Float8Products | None:
    """Quantise a weight, (out, in), without its columns `index`; None where a size does not suit the tensor cores."""
    if any(size % _MULTIPLE for size in weight.shape):
        logger.warning(
            "paca: a layer of %d inputs and %d outputs keeps its ordinary GEMMs: in float8 both sizes must be "
            "multiples of %d",
            weight.shape[1],
            weight.shape[0],
            _MULTIPLE,
        )
        return None
    frozen = weight.index_fill(1, index, 0.0)
    return Float8Products(index, quantised_rows(frozen), quantised_rows(frozen.t()))


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (rows, n) in float8 and scales (rows, 1) in float32, x ≈ q·scale; the largest of a row becomes 448.

    A row that holds an inf or nan becomes nan, so that a loss scaler sees it.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    scale = (largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).to(torch.float8_e4m3fn).contiguous(), scale


def _product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Return x·(q·scale)ᵀ, (tokens, n), in the dtype of `x`.

    Made in bfloat16, the one dtype that all supported torches and devices write here; sums are float32, or the tensor
    cores' own, whose lost bits are far below those that float8 has lost already.
    """
    xq, x_scale = quantised_rows(x)
    made = torch._scaled_mm(xq, q.t(), x_scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return made.to(x.dtype)
