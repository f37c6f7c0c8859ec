"""The CUDA backend's own ways of doing PaCA's tensor steps; shapes and names as in `paca.strategies`."""

from __future__ import annotations

import torch
from torch import Tensor


def grad_columns_cublas(gy: Tensor, xs: Tensor, scale: float = 1.0) -> Tensor:
    """Return s·dYᵀ Xs from one GEMM that reads its low-precision inputs as they are and sums and writes float32."""
    gy, xs = as_tokens(gy), as_tokens(xs)
    if gy.is_cuda and gy.dtype in (torch.bfloat16, torch.float16):
        total = torch.mm(gy.t(), xs.to(gy.dtype), out_dtype=torch.float32)
    else:
        wide = torch.promote_types(gy.dtype, torch.float32)
        total = torch.mm(gy.t().to(wide), xs.to(wide))
    return total if scale == 1.0 else total.mul_(scale)


def as_tokens(x: Tensor) -> Tensor:
    """Flatten all but the last axis; a vector is one token."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
