"""Stores deltas in 8, 4 or 1 bits with a scale for each column.

Adapters sit in flat minima and stand coarse rounding: with one bit an adapter keeps most of what it learnt (Jie et al.,
arXiv 2307.16867). Here trained deltas are rounded after the training, column by column:

    8 bits   δ ≈ c·q, q in −127…127, c = max|δ| / 127
    4 bits   δ ≈ c·q, q in −7…7, c the best of a few clippings of max|δ| / 7 in squared error
    1 bit    δ ≈ c·sign(δ), c = mean|δ|, which is the best c in squared error

A compressed layer is one tensor of bytes, `<module>.paca_packed`, little-endian: bits (uint8), rows (uint32), columns
(uint32), then column numbers (uint32 each), scales (float32 each), and for each column its codes, the first in the
lowest bits, each column starting at a byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paca.errors import AdapterError

BITS = (8, 4, 1)
PACKED = ".paca_packed"
_HEAD = struct.Struct("<BII")
_CLIPPINGS = torch.linspace(0.4, 1.0, 25)


@dataclass(frozen=True)
class Quantised:
    """Rounded deltas: `scale·code` for each entry."""

    codes: Tensor  # (out, r) int8
    scale: Tensor  # (r,) float32
    bits: int

    def values(self) -> Tensor:
        """Return the deltas that the codes stand for, (out, r) float32."""
        return self.codes.float() * self.scale


def quantise(delta: Tensor, bits: int) -> Quantised:
    """Round deltas (out, r) to `bits` bits; a column of zeros stays zero.

    Raises:
        ValueError: for another number of bits, or deltas that are not finite.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; found {bits}")
    delta = delta.detach().cpu().float()
    if not torch.isfinite(delta).all():
        raise AdapterError("the deltas are not finite: the training diverged, and there is nothing to compress")
    largest = delta.abs().amax(0)
    if bits == 1:
        scale = delta.abs().mean(0)
        return Quantised(torch.where(delta < 0, -1, 1).to(torch.int8), scale, bits)
    levels = 2 ** (bits - 1) - 1
    if bits == 8:
        return Quantised(_codes(delta, largest / levels, levels), largest / levels, bits)
    best, least = largest / levels, torch.full_like(largest, math.inf, dtype=torch.float64)
    for clipping in _CLIPPINGS:
        scale = clipping * largest / levels
        error = (_codes(delta, scale, levels) * scale - delta).double().square().sum(0)  # float32 would underflow
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return Quantised(_codes(delta, best, levels), best, bits)


def _codes(delta: Tensor, scale: Tensor, levels: int) -> Tensor:
    return (delta / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-levels, levels).to(torch.int8)


def pack(index: Tensor, quantised: Quantised) -> Tensor:
    """Write one layer's columns as bytes, (n,) uint8."""
    rows, columns = quantised.codes.shape
    codes = quantised.codes.t().contiguous().numpy()  # a column's codes side by side
    if quantised.bits == 8:
        body = codes.view(np.uint8)
    elif quantised.bits == 4:
        nibbles = np.pad(codes.view(np.uint8) & 0x0F, ((0, 0), (0, rows % 2)))
        body = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
    else:
        body = np.packbits(codes > 0, axis=1, bitorder="little")
    head = _HEAD.pack(quantised.bits, rows, columns)
    numbers = index.cpu().numpy().astype("<u4").tobytes()
    data = head + numbers + quantised.scale.numpy().astype("<f4").tobytes() + body.tobytes()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def unpack(data: Tensor) -> tuple[Tensor, Quantised]:
    """Read column numbers, (r,) int64, and codes from what `pack` wrote.

    Raises:
        AdapterError: if the bytes are too few, or are none of ours.
    """
    raw = data.cpu().numpy().tobytes()
    if len(raw) < _HEAD.size:
        raise AdapterError(f"compressed columns take at least {_HEAD.size} bytes, found {len(raw)}")
    bits, rows, columns = _HEAD.unpack_from(raw)
    width = -(-rows * bits // 8)  # bytes of one column
    wanted = _HEAD.size + columns * (8 + width)
    if bits not in BITS or len(raw) != wanted:
        raise AdapterError(
            f"compressed columns of {bits} bits and {columns} x {rows} take {wanted} bytes, found {len(raw)}"
        )
    numbers = np.frombuffer(raw, "<u4", columns, _HEAD.size).astype(np.int64)
    scale = np.frombuffer(raw, "<f4", columns, _HEAD.size + 4 * columns).astype(np.float32)
    body = np.frombuffer(raw, np.uint8, offset=_HEAD.size + 8 * columns).reshape(columns, width)
    if bits == 8:
        codes = body.view(np.int8)
    elif bits == 4:
        nibbles = np.stack([body & 0x0F, body >> 4], axis=2).reshape(columns, -1)[:, :rows].astype(np.int8)
        codes = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
    else:
        codes = np.unpackbits(body, axis=1, count=rows, bitorder="little").astype(np.int8) * 2 - 1
    quantised = Quantised(torch.from_numpy(codes.T.copy()), torch.from_numpy(scale), bits)
    return torch.from_numpy(numbers), quantised


def expanded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors with every compressed layer as the usual two, `paca_delta` and `paca_indices`.

    Raises:
        AdapterError: naming the layer that is damaged.
    """
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.endswith(PACKED):
            plain[key] = tensor
            continue
        module = key.removesuffix(PACKED)
        try:
            index, quantised = unpack(tensor)
        except AdapterError as error:
            raise AdapterError(f"{module}: {error}") from None
        plain[f"{module}.paca_delta"] = quantised.values().to(tensor.device)
        plain[f"{module}.paca_indices"] = index.to(tensor.device)
    return plain
