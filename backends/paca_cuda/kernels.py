"""The Triton kernels. Importing this module imports Triton, so only a launch does.

All offsets are int64: an activation of 2^31 elements is ordinary at long sequences. Shapes and names are those of
`paca.strategies`; R and BLOCK sizes are powers of two, masks cut them to size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def dtype(of: torch.dtype) -> tl.dtype:
    """Return Triton's name of a dtype."""
    return _DTYPES[of]


@triton.jit
def gather_kernel(
    x,  # (tokens, in)
    index,  # (r,) int64
    out,  # (tokens, r), contiguous
    tokens,
    r,
    x_token_stride,
    x_channel_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store x[t, index[c]] in out[t, c]."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    picked = tl.load(index + channel, mask=channel < r, other=0)
    mask = (token[:, None] < tokens) & (channel[None, :] < r)
    values = tl.load(x + token[:, None] * x_token_stride + picked[None, :] * x_channel_stride, mask=mask)
    tl.store(out + token[:, None] * r + channel[None, :], values, mask=mask)


@triton.jit
def grad_columns_kernel(
    gy,  # (tokens, out)
    xs,  # (tokens, r), of gy's dtype
    grad,  # (out, r) float32, contiguous
    partial,  # (SPLIT, out, r) float32, scratch
    arrived,  # a zero for each block of outputs; zeros again afterwards
    scale,
    tokens,
    n_out,
    gy_token_stride,
    gy_out_stride,
    xs_channel_stride,
    r: tl.constexpr,  # constants, so that rows of 16 bytes are known to be aligned
    xs_token_stride: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Store scale · gyᵀ xs in grad, the tokens split over SPLIT programs.

    The last program to arrive at a block of outputs adds the parts up in their order, so that the same inputs give the
    same bits, in one launch.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    out = block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    channel = tl.arange(0, R)
    tokens_a_part = tl.cdiv(tl.cdiv(tokens, BLOCK_TOKENS), SPLIT) * BLOCK_TOKENS
    first = part * tokens_a_part
    last = tl.minimum(first + tokens_a_part, tokens)
    total = tl.zeros((BLOCK_OUT, R), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        token = (start + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        gy_block = tl.load(
            gy + token[:, None] * gy_token_stride + out[None, :] * gy_out_stride,
            mask=(token[:, None] < last) & (out[None, :] < n_out),
            other=0.0,
        )  # (BLOCK_TOKENS, BLOCK_OUT)
        xs_block = tl.load(
            xs + token[:, None] * xs_token_stride + channel[None, :] * xs_channel_stride,
            mask=(token[:, None] < last) & (channel[None, :] < r),
            other=0.0,
        )  # (BLOCK_TOKENS, R)
        if WIDEN:  # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
            gy_block, xs_block = gy_block.to(tl.float32), xs_block.to(tl.float32)
        total = tl.dot(tl.trans(gy_block), xs_block, total, input_precision=PRECISION)
    mask = (out[:, None] < n_out) & (channel[None, :] < r)
    place = out[:, None] * r + channel[None, :]
    if SPLIT == 1:
        tl.store(grad + place, total * scale, mask=mask)
    else:
        # Triton passes an n_out of 1 as a constant, which has no methods.
        size = tl.full((), r, tl.int64) * n_out
        tl.store(partial + part * size + place, total, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + block, 1, sem="acq_rel") == SPLIT - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_OUT, R), dtype=tl.float32)
            for other_part in range(SPLIT):
                total += tl.load(partial + other_part * size + place, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(grad + place, total * scale, mask=mask)
            tl.store(arrived + block, 0)


@triton.jit
def rounded(x, TO: tl.constexpr):
    """Round to the nearest, ties to even; float64 becomes a 16-bit number by way of float32, as in torch.

    For bfloat16 by its definition on the bits, because Triton's interpreter rounds otherwise than the hardware does.
    """
    if TO == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, kept, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif TO == tl.float16:
        return x.to(tl.float32).to(tl.float16)
    else:
        return x.to(TO)


# Fields of a row of the table of `write_columns_kernel`.
FIELDS: tl.constexpr = tl.constexpr(12)


@triton.jit
def write_columns_kernel(
    table,  # (weights, FIELDS) int64: addresses, sizes and strides
    scales,  # (weights,) float64
    entries,  # (programs,) int32: which row of the table
    rows,  # (programs,) int64: the first output of the program
    WEIGHT: tl.constexpr,  # dtypes
    DELTA: tl.constexpr,
    PRODUCT: tl.constexpr,  # in which scale·delta is formed
    SUM: tl.constexpr,  # in which base + update is formed
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store in weight[o, index[c]] round(base[o, c] + round(scale·delta[o, c])), for all weights.

    Must be launched with `enable_fp_fusion=False`: a fused multiply-add would skip the inner rounding.
    """
    entry = tl.load(entries + tl.program_id(0))
    row = table + entry * FIELDS
    weight = tl.load(row + 0).to(tl.pointer_type(WEIGHT))
    index = tl.load(row + 1).to(tl.pointer_type(tl.int64))
    base = tl.load(row + 2).to(tl.pointer_type(WEIGHT))
    delta = tl.load(row + 3).to(tl.pointer_type(DELTA))
    n_out, r = tl.load(row + 4), tl.load(row + 5)
    weight_out_stride, weight_in_stride = tl.load(row + 6), tl.load(row + 7)
    base_out_stride, base_channel_stride = tl.load(row + 8), tl.load(row + 9)
    delta_out_stride, delta_channel_stride = tl.load(row + 10), tl.load(row + 11)
    scale = tl.load(scales + entry).to(PRODUCT)

    out = tl.load(rows + tl.program_id(0)) + tl.arange(0, BLOCK_OUT)  # int64
    for start in range(0, r, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        picked = tl.load(index + channel, mask=channel < r, other=0)
        mask = (out[:, None] < n_out) & (channel[None, :] < r)
        before = tl.load(base + out[:, None] * base_out_stride + channel[None, :] * base_channel_stride, mask=mask)
        change = tl.load(delta + out[:, None] * delta_out_stride + channel[None, :] * delta_channel_stride, mask=mask)
        update = rounded(change.to(PRODUCT) * scale, DELTA)
        after = rounded(before.to(SUM) + update.to(SUM), WEIGHT)
        tl.store(weight + out[:, None] * weight_out_stride + picked[None, :] * weight_in_stride, after, mask=mask)
