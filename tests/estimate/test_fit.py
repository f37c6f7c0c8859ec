"""What is said to fit does, and no more would."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import paca
from paca.estimate.fit import (
    ALLOCATOR_SHARE,
    CONTEXT_BYTES,
    TOKENS,
    Device,
    _largest,
    devices,
    largest_batch,
    longest_sequence,
    needed,
)
from paca.estimate.methods import METHODS
from paca.estimate.step import Model, Work, footprint

GIB = 2**30


@settings(max_examples=200, deadline=None)
@given(
    fixed=st.integers(0, 60 * GIB),
    each=st.integers(1, GIB),
    more=st.sampled_from([0, 1000, 10**6]),
    size=st.integers(2, 80),
    most=st.integers(1, 3000),
)
def test_the_search_finds_the_border(fixed: int, each: int, more: int, size: int, most: int) -> None:
    device, asked = Device("any", size * GIB), []

    def peak(n: int) -> int:
        asked.append(n)
        return fixed + each * n + more * n * n

    found = _largest(peak, device, most)
    assert 0 <= found <= most
    assert found == 0 or device.holds(peak(found))
    assert found == most or not device.holds(peak(found + 1))
    assert len(asked) < 32  # a step on shapes takes part of a second


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("80GB", [80]), ("24gb, 48GiB", [24, 48]), ("140.5", [140.5]), ("96G", [96])],
)
def test_sizes_are_read(text: str, sizes: list[float]) -> None:
    assert [device.bytes for device in devices(text)] == [size * GIB for size in sizes]


@pytest.mark.parametrize("text", ["", "H100", "80TB", "0GB", "-1GB", "80GB,"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; give one such as 80GB"):
        devices(text)


@pytest.fixture(scope="module")
def model() -> Model:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    adapter = paca.PacaConfig(r=8, paca_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return Model(config, "causal_lm", torch.bfloat16, adapter)


def work_of(sequences: int, length: int) -> Work:
    return Work(sequences, length, False, False, False, False, "adamw_torch_fused")


def room_for(peak: int) -> Device:
    return Device("just enough", round(peak * (1 + ALLOCATOR_SHARE)) + CONTEXT_BYTES)


@pytest.mark.parametrize("name", ["lora", "qpaca"])
def test_the_longest_sequence_and_the_largest_batch_fit_exactly(model: Model, name: str) -> None:
    method = METHODS[name]
    peak: Callable[[int, int], int] = lambda n, t: footprint(model, method, work_of(n, t)).peak  # noqa: E731
    assert longest_sequence(model, method, work_of, 2, room_for(peak(2, 7 * TOKENS)), 4096) == 7 * TOKENS
    assert largest_batch(model, method, work_of, 100, room_for(peak(5, 100))) == 5


def test_the_model_limits_sequences_and_too_small_a_device_holds_none(model: Model) -> None:
    method = METHODS["paca"]
    assert longest_sequence(model, method, work_of, 1, Device("large", 80 * GIB), 4000) == 4000
    assert longest_sequence(model, method, work_of, 1, Device("small", GIB), 4000) == 0
    assert largest_batch(model, method, work_of, 64, Device("small", GIB)) == 0


def test_a_device_needs_room_for_allocator_and_context_too() -> None:
    assert needed(100 * GIB) == 106 * GIB
    assert Device("106GB", 106 * GIB).holds(100 * GIB)
    assert not Device("105GB", 105 * GIB).holds(100 * GIB)
