"""Reads model files in the format GGUF, version 3: as much of it as unquantised, Q4_1 and Q8_0 tensors need.

The layout is that of the GGUF specification in the ggml repository (docs/gguf.md), all numbers little-endian:

    "GGUF" version:u32 tensors:u64 entries:u64  entry…  tensor info…  padding  data
    entry        key:string type:u32 value
    tensor info  name:string dimensions:u32 (size:u64)… type:u32 offset:u64
    string       length:u64 bytes
    array        type:u32 length:u64 value…
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"GGUF", 3
DEFAULT_ALIGNMENT = 32  # bytes; tensor data starts at a multiple of it

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class GGUFError(ValueError):
    """A file that cannot be read as GGUF; the message says what is wrong with it."""


@dataclass(frozen=True)
class Encoding:
    """How a tensor type keeps numbers: in blocks of `values` numbers and `size` bytes.

    Args:
        name: what ggml calls it.
        values: numbers in a block.
        size: bytes of a block.
        decode: uint8 (blocks, size) → float32 (blocks, values).
    """

    name: str
    values: int
    size: int
    decode: Callable[[Bytes], Floats]


def _decode_f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4")


def _decode_q4_1(blocks: Bytes) -> Floats:
    """`scale · q + minimum`: two float16, then 16 bytes whose low halves are the first 16 q, the high ones the rest."""
    scale, minimum = _half(blocks[:, 0:2]), _half(blocks[:, 2:4])
    quants = np.concatenate([blocks[:, 4:] & 0x0F, blocks[:, 4:] >> 4], axis=1)  # (blocks, 32)
    return quants * scale + minimum


def _decode_q8_0(blocks: Bytes) -> Floats:
    """`scale · q`: a float16, then 32 signed bytes."""
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8) * _half(blocks[:, 0:2])


def _half(pairs: Bytes) -> Floats:
    """Bytes of float16 numbers as float32, (blocks, 1)."""
    return np.ascontiguousarray(pairs).view("<f2").astype(np.float32)


ENCODINGS = {
    0: Encoding("F32", 1, 4, _decode_f32),
    3: Encoding("Q4_1", 32, 20, _decode_q4_1),
    8: Encoding("Q8_0", 32, 34, _decode_q8_0),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is still in the file.

    Args:
        shape: sizes in the order of numpy, the fastest-moving last.
        encoding: how it is kept.
        data: its bytes.
    """

    shape: tuple[int, ...]
    encoding: Encoding
    data: Bytes

    def decode(self) -> Floats:
        """Return the numbers, float32 of `shape`, in memory of their own."""
        blocks = self.data.reshape(-1, self.encoding.size)
        return np.array(self.encoding.decode(blocks), dtype=np.float32).reshape(self.shape)


@dataclass(frozen=True)
class GGUF:
    """An opened file.

    Args:
        metadata: its entries, by key.
        tensors: its tensors, by name; nothing is decoded yet.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> GGUF:
    """Open a GGUF file: read its entries and check where its tensors are.

    Raises:
        GGUFError: if it is another kind of file, another version, truncated, or holds tensors of a type not read here.
    """
    if path.stat().st_size == 0:
        raise GGUFError(f"{path} is empty")
    reader = _Reader(path, np.asarray(np.memmap(path, dtype=np.uint8, mode="r")))
    if reader.take(4, "the magic number").tobytes() != MAGIC:
        raise GGUFError(f"{path} is not a GGUF file: it does not start with {MAGIC.decode()}")
    if (version := reader.number("<u4", "the version")) != VERSION:
        raise GGUFError(f"{path} is GGUF version {version}; version {VERSION}, little-endian, is read here")
    tensor_count, entry_count = reader.number("<u8", "the counts"), reader.number("<u8", "the counts")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = reader.string("a key")
        metadata[key] = reader.value(reader.number("<u4", key), key)
    infos = [reader.tensor_info() for _ in range(tensor_count)]
    reader.align(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    start = reader.position
    tensors = {}
    for name, shape, encoding, offset in infos:
        reader.position = start + offset
        size = prod(shape) // encoding.values * encoding.size
        tensors[name] = Tensor(shape, encoding, reader.take(size, f"tensor {name}"))
    return GGUF(metadata, tensors)


class _Reader:
    """A position in the file that cannot leave it."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, size: int, what: str) -> Bytes:
        end = self.position + size
        if end > len(self.data):
            raise GGUFError(
                f"{self.path} is truncated: {what} needs bytes up to {end:,}, the file ends at {len(self.data):,}"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, dtype: str, what: str) -> int:
        return int(self.take(np.dtype(dtype).itemsize, what).view(dtype)[0])

    def string(self, what: str) -> str:
        length = self.number("<u8", what)
        try:
            return self.take(length, what).tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{self.path}: {what} is not UTF-8 text: {error}") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            element, length = self.number("<u4", key), self.number("<u8", key)
            if element in _SCALARS:
                return self._scalars(element, length, key)
            return [self.value(element, key) for _ in range(length)]
        return self._scalars(kind, 1, key)[0]

    def _scalars(self, kind: int, count: int, key: str) -> list[Any]:
        if kind not in _SCALARS:
            raise GGUFError(f"{self.path}: the entry {key} is of an unknown type, {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return list(self.take(count * dtype.itemsize, key).view(dtype).tolist())

    def tensor_info(self) -> tuple[str, tuple[int, ...], Encoding, int]:
        name = self.string("a tensor's name")
        # ggml puts the fastest-moving size first.
        sizes = [self.number("<u8", name) for _ in range(self.number("<u4", name))]
        kind, offset = self.number("<u4", name), self.number("<u8", name)
        encoding = ENCODINGS.get(kind)
        if encoding is None:
            known = ", ".join(f"{e.name} ({number})" for number, e in ENCODINGS.items())
            raise GGUFError(f"{self.path}: tensor {name} is of type {kind}; the types read here are {known}")
        if sizes and sizes[0] % encoding.values:
            raise GGUFError(f"{self.path}: tensor {name} has rows of {sizes[0]}, no multiple of {encoding.values}")
        return name, tuple(reversed(sizes)), encoding, offset

    def align(self, alignment: Any) -> None:
        if not isinstance(alignment, int) or alignment < 1:
            raise GGUFError(f"{self.path}: general.alignment is {alignment!r}, not a number of bytes")
        self.position += -self.position % alignment
