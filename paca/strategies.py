"""Every plain-torch way of doing PaCA's five tensor steps, for any device.

Functions of one kind share one signature and return the same values; a backend picks one of each kind, a user may pick
another. Shapes: `x` is (…, in), `weight` (out, in), `y` and `gy` (…, out), `index` (r,), `xs = x[..., index]` (…, r),
columns and deltas (out, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens that a low-precision gradient converts to float32 at a time: the copies stay in cache and never reach the size
# of `gy`.
TOKENS_PER_BLOCK = 2048
# From so many tokens on the overlay of a quantised weight is the cheaper form. On a CPU both cost about the same there,
# in NF4 and int8, with gradients and without (docs/backends.md); other devices have not been measured.
OVERLAY_FROM_TOKENS = 256


def gather_index_select(x: Tensor, index: Tensor) -> Tensor:
    """Pick channels by number."""
    return x.index_select(-1, index)


def gather_slices(x: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Pick channels by slices, one for each run of neighbours; a copy, so that `x` itself is not kept.

    Args:
        x: (…, in).
        runs: first and last + 1 of each run, known on the host.
    """
    return torch.cat([x[..., first:end] for first, end in runs], dim=-1)


def gather_one_hot(x: Tensor, index: Tensor) -> Tensor:
    """Pick channels by a product with a 0/1 matrix: the gather of devices that are good at GEMMs only.

    Exact for finite `x`: each sum has one non-zero term. An inf or nan in a channel that is *not* picked spreads,
    because 0·inf is nan.
    """
    pick = F.one_hot(index, x.shape[-1]).to(x.dtype)  # (r, in)
    return x @ pick.t()


def forward_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Y = X Wᵀ + b."""
    return F.linear(x, weight, bias)


def grad_input_matmul(gy: Tensor, weight: Tensor) -> Tensor:
    """DX = dY W."""
    return gy @ weight


def grad_input_addmm(gys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of all dY W, each product added to the sum by its GEMM; (…, in)."""
    lead = gys[0].shape[:-1]
    total = _tokens(gys[0]) @ weights[0]
    for gy, weight in zip(gys[1:], weights[1:], strict=True):
        total.addmm_(_tokens(gy), weight)
    return total.reshape(*lead, weights[0].shape[1])


def grad_columns_thin_first(gy: Tensor, xs: Tensor, scale: float = 1.0) -> Tensor:
    """Return s·dYᵀ Xs as (Xsᵀ dY)ᵀ, summed in float32 (float64 stays float64).

    With the r rows first the product reads `gy` in the order it lies in memory: 0.6 to 0.9 of the time of dYᵀ Xs on a
    CPU.
    """
    gy, xs = _tokens(gy), _tokens(xs)
    if gy.dtype in (torch.float32, torch.float64):
        return _scaled(xs.t() @ gy, scale).t()
    if (
        torch.compiler.is_compiling()
    ):  # the compiler fuses the casts; a loop would fix the number of tokens in the graph
        return _scaled(xs.t().float() @ gy.float(), scale).t()
    total = torch.zeros(xs.shape[1], gy.shape[1], dtype=torch.float32, device=gy.device)
    for xs_block, gy_block in zip(xs.split(TOKENS_PER_BLOCK), gy.split(TOKENS_PER_BLOCK), strict=True):
        total.addmm_(xs_block.t().float(), gy_block.float())
    return _scaled(total, scale).t()


def grad_columns_matmul(gy: Tensor, xs: Tensor, scale: float = 1.0) -> Tensor:
    """Return s·dYᵀ Xs as it is written, summed in float32 (float64 stays float64)."""
    gy, xs = _tokens(gy), _tokens(xs)
    wide = torch.promote_types(gy.dtype, torch.float32)
    return _scaled(gy.t().to(wide) @ xs.to(wide), scale)


def _scaled(total: Tensor, scale: float) -> Tensor:
    """Multiply the finished sum, which nobody else holds."""
    return total if scale == 1.0 else total.mul_(scale)


def _tokens(x: Tensor) -> Tensor:
    """Flatten all but the last axis; a vector is one token."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])


@dataclass(frozen=True)
class ColumnWrite:
    """One weight's columns to be written: `weight[:, index] = round(base + scale·delta)`."""

    weight: Tensor  # (out, in), may be a transposed view
    index: Tensor  # (r,) int64
    base: Tensor  # (out, r), the pretrained columns in the weight's dtype
    delta: Tensor  # (out, r)
    scale: float
    first: int | None = None  # of columns that lie side by side, where that is known

    def values(self) -> Tensor:
        """What the columns become, (out, r)."""
        return adapted_columns(self.base, self.delta, self.scale)


def adapted_columns(base: Tensor, delta: Tensor, scale: float) -> Tensor:
    """Return `base + scale·delta` in the base's dtype, (out, r).

    The product is rounded in the delta's dtype, the sum is formed in the wider of both and rounded once: the same bits
    as a LoRA merge of the same update, and what every backend must return.
    """
    update = delta if scale == 1.0 else delta * scale
    return (base + update).to(base.dtype)


def write_index_copy(writes: Sequence[ColumnWrite]) -> None:
    """Write columns with `index_copy_`, one call a weight; a slice without an index."""
    for write in writes:
        if write.first is not None:
            write.weight.narrow(1, write.first, len(write.index)).copy_(write.values())
        else:
            write.weight.index_copy_(1, write.index, write.values())


def write_scatter(writes: Sequence[ColumnWrite]) -> None:
    """Write columns with `scatter_`, one call a weight, row by row."""
    for write in writes:
        write.weight.scatter_(1, write.index.expand(len(write.weight), -1), write.values())


@dataclass(frozen=True)
class ColumnSwitch:
    """One weight's change of adapters: pretrained values go back to the old one's columns, the new one's are written.

    Either may be missing. Columns of both get the new one's values.
    """

    old: ColumnWrite | None
    new: ColumnWrite | None
    apart: bool  # whether they have no column in common


def switch_scatter(switches: Sequence[ColumnSwitch]) -> None:
    """Restore and write columns with `scatter_`, both in one pass over the rows where they are apart.

    Each row of a weight is in another page of memory, so that looking a row up costs more than writing some values.
    """
    for old, new, apart in ((switch.old, switch.new, switch.apart) for switch in switches):
        if old is not None and new is not None and apart:
            index, values = torch.cat([old.index, new.index]), torch.cat([old.base, new.values()], dim=1)
            new.weight.scatter_(1, index.expand(len(values), -1), values)
            continue
        if old is not None:
            old.weight.scatter_(1, old.index.expand(len(old.base), -1), old.base)
        if new is not None:
            write_scatter([new])


class Form(str, Enum):
    """How a layer with a quantised weight and trained columns makes its product."""

    OVERLAY = "overlay"  # one GEMM with the dequantised weight, the trained columns put in
    SPLIT = "split"  # the library's own kernel, and the trained columns' part by itself


def form_exact(dequantises: bool, trains: bool, tokens: int) -> Form:
    """Choose the cheaper form of those whose untrained output has the library's own bits.

    The split always has; the overlay has, where the library multiplies a dequantised weight too.

    Args:
        dequantises: whether the library's training forward dequantises the weight and multiplies.
        trains: whether a gradient is wanted; without one, libraries have kernels that do not dequantise.
        tokens: rows of the product.
    """
    return form_fastest(dequantises, trains, tokens) if dequantises and trains else Form.SPLIT


def form_overlay(dequantises: bool, trains: bool, tokens: int) -> Form:
    """Choose one GEMM always: the weight's precision, where the library would round activations too."""
    return Form.OVERLAY


def form_split(dequantises: bool, trains: bool, tokens: int) -> Form:
    """Choose the library's own kernel always."""
    return Form.SPLIT


def form_fastest(dequantises: bool, trains: bool, tokens: int) -> Form:
    """Choose the cheaper form, whatever the library itself does: its output may differ from the library's by rounding.

    Putting columns into a weight costs the same for any number of tokens, a product of their own grows with it.
    """
    return Form.OVERLAY if tokens >= OVERLAY_FROM_TOKENS else Form.SPLIT


def write_index_put(writes: Sequence[ColumnWrite]) -> None:
    """Write columns with `index_put_`, one call a weight."""
    for write in writes:
        write.weight.t().index_put_((write.index,), write.values().t())


def run_at_once() -> None:
    """There is no graph to end: the device runs each operation when it is given."""
