"""The GGUF reader gives the numbers that the format's definition says, and refuses what it cannot read."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from paca.quickstart.gguf import GGUFError, read_gguf

TEXT, UINT32, FLOAT32, ARRAY, UINT64 = 8, 4, 6, 9, 10
F32, Q4_1, Q8_0, Q6_K = 0, 3, 8, 14


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def strings(*values):
    return struct.pack("<IQ", TEXT, len(values)) + b"".join(map(text, values))


def info(name, sizes, kind, offset):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def gguf(entries=(), infos=(), data=b"", version=3, alignment=32):
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(entries)) + b"".join((*entries, *infos))
    return head + b"\0" * (-len(head) % alignment) + data


@pytest.fixture
def save(tmp_path):
    def save(content):
        path = tmp_path / "tiny.gguf"
        path.write_bytes(content)
        return path

    return save


def by_hand(block, kind):
    """One block, number by number, as ggml defines it."""
    scale = np.frombuffer(block[:2], "<f2")[0].astype(np.float32)
    if kind == Q8_0:
        return [np.float32(struct.unpack("b", block[2 + i : 3 + i])[0]) * scale for i in range(32)]
    minimum = np.frombuffer(block[2:4], "<f2")[0].astype(np.float32)
    low = [np.float32(block[4 + i] & 15) * scale + minimum for i in range(16)]
    high = [np.float32(block[4 + i] >> 4) * scale + minimum for i in range(16)]
    return low + high


def random_blocks(kind, count):
    rng = np.random.default_rng(0)
    halves = 1 if kind == Q8_0 else 2
    quants = 32 if kind == Q8_0 else 16
    return [
        rng.standard_normal(halves).astype("<f2").tobytes() + rng.integers(0, 256, quants, dtype=np.uint8).tobytes()
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_quantised_blocks_decode_to_the_numbers_of_the_definition(save, kind):
    blocks = random_blocks(kind, 6)
    file = read_gguf(save(gguf(infos=[info("w", (64, 3), kind, 0)], data=b"".join(blocks))))
    expected = np.array([by_hand(block, kind) for block in blocks], dtype=np.float32).reshape(3, 64)
    weight = file.tensors["w"].decode()
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, expected)


def test_plain_tensors_keep_their_order_and_every_tensor_is_found_at_its_offset(save):
    first, second = np.arange(6, dtype="<f4"), np.arange(10, 18, dtype="<f4")
    data = first.tobytes() + b"\0" * 8 + second.tobytes()
    infos = [info("second", (2, 4), F32, 32), info("first", (3, 2), F32, 0)]
    file = read_gguf(save(gguf(infos=infos, data=data)))
    np.testing.assert_array_equal(file.tensors["first"].decode(), first.reshape(2, 3))
    np.testing.assert_array_equal(file.tensors["second"].decode(), second.reshape(4, 2))


def test_metadata_of_every_shape_is_read(save):
    entries = [
        entry("name", TEXT, text("tiny é")),
        entry("count", UINT32, struct.pack("<I", 7)),
        entry("ratio", FLOAT32, struct.pack("<f", 0.5)),
        entry("words", ARRAY, strings("a", "", "bc")),
        entry("numbers", ARRAY, struct.pack("<IQ3Q", UINT64, 3, 1, 2, 2**40)),
    ]
    metadata = read_gguf(save(gguf(entries))).metadata
    assert metadata == {"name": "tiny é", "count": 7, "ratio": 0.5, "words": ["a", "", "bc"], "numbers": [1, 2, 2**40]}


def test_the_alignment_that_a_file_states_is_used(save):
    entries = [entry("general.alignment", UINT32, struct.pack("<I", 128))]
    data = np.array([3.0], dtype="<f4").tobytes()
    file = read_gguf(save(gguf(entries, [info("w", (1,), F32, 0)], data, alignment=128)))
    assert file.tensors["w"].decode().tolist() == [3.0]


def test_a_file_cut_anywhere_is_called_truncated(save):
    entries = [entry("name", TEXT, text("tiny")), entry("words", ARRAY, strings("a", "bc"))]
    whole = gguf(entries, [info("w", (32, 2), Q8_0, 0)], b"".join(random_blocks(Q8_0, 2)))
    read_gguf(save(whole))
    for length in range(1, len(whole)):
        with pytest.raises(GGUFError, match="is truncated"):
            read_gguf(save(whole[:length]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 something else entirely", "is not a GGUF file"),
        (gguf(version=2), "is GGUF version 2"),
        (gguf(infos=[info("w", (256,), Q6_K, 0)], data=b"\0" * 210), r"tensor w is of type 14.*Q4_1 \(3\)"),
        (gguf(infos=[info("w", (48,), Q4_1, 0)], data=b"\0" * 40), "rows of 48, no multiple of 32"),
        (gguf([entry("odd", 99, b"")]), "the entry odd is of an unknown type, 99"),
        (gguf([entry("name", TEXT, struct.pack("<Q", 2) + b"\xff\xfe")]), "name is not UTF-8"),
        (gguf([entry("general.alignment", UINT32, struct.pack("<I", 0))]), "general.alignment is 0"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(save, content, message):
    with pytest.raises(GGUFError, match=message):
        read_gguf(save(content))
