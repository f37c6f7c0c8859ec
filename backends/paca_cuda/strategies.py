"""The CUDA backend's own ways of doing PaCA's tensor steps; shapes and names as in `paca.strategies`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paca.strategies import ColumnSwitch, ColumnWrite, write_index_copy
from paca_cuda.ops import grad_columns, mm_float32


def gather_triton(x: Tensor, index: Tensor) -> Tensor:
    """Pick channels by one Triton kernel."""
    return torch.ops.paca.gather(x, index)  # type: ignore[no-any-return]


def grad_columns_cublas(gy: Tensor, xs: Tensor, scale: float = 1.0) -> Tensor:
    """Return s·dYᵀ Xs from one GEMM of cuBLAS; another launch multiplies by a scale that is not 1."""
    return mm_float32(_tokens(gy), _tokens(xs), scale)


def grad_columns_triton(gy: Tensor, xs: Tensor, scale: float = 1.0) -> Tensor:
    """Return s·dYᵀ Xs from the Triton kernel, its tiling tuned to the shape; float64 and r > 256 go to cuBLAS."""
    return _grad_columns(gy, xs, scale, only_triton=True)


def grad_columns_tuned(gy: Tensor, xs: Tensor, scale: float = 1.0) -> Tensor:
    """Return s·dYᵀ Xs from the fastest of cuBLAS and the Triton kernel's tilings, measured once a shape and device."""
    return _grad_columns(gy, xs, scale, only_triton=False)


def _grad_columns(gy: Tensor, xs: Tensor, scale: float, only_triton: bool) -> Tensor:
    """Call the kernel as an operator, or, in a backward that nothing records, as the function that it is.

    Going through an operator written in Python takes the host about as long as all else that a layer does in backward.
    """
    gy, xs = _tokens(gy), _tokens(xs)
    if type(gy) is Tensor and gy.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        made: Tensor = grad_columns(gy, xs, scale, only_triton)
        return made
    return torch.ops.paca.grad_columns(gy, xs, scale, only_triton)  # type: ignore[no-any-return]


def switch_multi_tensor(switches: Sequence[ColumnSwitch]) -> None:
    """Restore each weight's columns, then write those of all weights in one launch."""
    for old in (switch.old for switch in switches):
        if old is not None:
            old.weight.index_copy_(1, old.index, old.base)
    write_multi_tensor([switch.new for switch in switches if switch.new is not None])


def write_multi_tensor(writes: Sequence[ColumnWrite]) -> None:
    """Write the columns of all weights in one launch; a single weight, or none, needs none of this."""
    if len(writes) <= 1:
        write_index_copy(writes)
        return
    weights = [write.weight for write in writes]
    torch.ops.paca.write_columns(
        weights,
        [write.index for write in writes],
        [write.base for write in writes],
        [write.delta for write in writes],
        [write.scale for write in writes],
    )
    torch.autograd.graph.increment_version(weights)  # as an in-place operation of torch's own would


def _tokens(x: Tensor) -> Tensor:
    """Flatten all but the last axis; a vector is one token."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
