"""The numbers of the bitwise tier are what they claim to be: no order of summation can change a bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paca
from paca.layer import PacaLayer
from paca.parity.block import draw_block, train_block
from paca.parity.cases import BITWISE, LAYOUTS, Layout, exact_case
from paca.parity.certificate import Certificate, NotExactError
from paca.parity.exact import Shape, admissible_ranges, draw
from paca.parity.formats import is_representable
from paca.parity.replay import run_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn]
shapes = st.builds(
    Shape, tokens=st.integers(1, 40), n_in=st.integers(1, 50), n_out=st.integers(1, 50), rank=st.just(1)
).flatmap(lambda s: st.builds(Shape, st.just(s.tokens), st.just(s.n_in), st.just(s.n_out), st.integers(1, s.n_in)))


def shuffled_sum(terms: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum over the last axis in `dtype`, one addition at a time, pairs drawn at random: any order and any tree."""
    parts = list(terms.to(dtype).unbind(-1))
    while len(parts) > 1:
        i, j = torch.randperm(len(parts), generator=generator)[:2].tolist()
        parts[i] = parts[i] + parts[j]
        del parts[j]
    return parts[0]


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), wide=st.sampled_from(["x", "gy"]), seed=st.integers(0, 2**20))
def test_every_step_of_a_layer_is_proved_exact(shape, dtype, wide, seed):
    case = exact_case("case", Layout(shape, (shape.tokens,), wide), dtype, torch.Generator().manual_seed(seed))
    backend = paca.set_backend("cpu")
    for residency in ("resident", "swap"):
        with Certificate() as certificate:
            found = run_layer(case, backend, residency)
        assert certificate.operations > 20
        for name, value in found.items():
            assert torch.equal(value, case.inputs["weight"] if name == "restored" else case.expected[name])


@settings(max_examples=25, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES + FP8), wide=st.sampled_from(["x", "gy"]), seed=st.integers(0, 2**20))
def test_every_order_of_summation_gives_the_same_bits(shape, dtype, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = draw(shape, dtype, generator, wide)
    weight = numbers.weight.index_add(1, numbers.index, numbers.delta * numbers.alpha / shape.rank)
    for values in (numbers.x, numbers.gy, numbers.weight, numbers.bias, weight):
        assert is_representable(values, dtype)
    for a, b, of_output in [
        (numbers.x[0], weight, dtype),
        (numbers.gy[0], weight.t(), dtype),
        (numbers.gy.t()[0], numbers.x.t(), torch.float32),
    ]:
        terms = a * b  # (results, length)
        exact = terms.sum(-1)
        assert is_representable(exact, of_output)
        for _ in range(3):
            assert torch.equal(shuffled_sum(terms, generator).double(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["odd", "blocks"])
def test_partial_sums_do_not_fit_the_working_dtype(layout, dtype):
    """Otherwise a device that sums in it would give the right bits, too."""
    numbers = draw(LAYOUTS[layout].shape, dtype, torch.Generator().manual_seed(0), LAYOUTS[layout].wide)
    weight = numbers.weight.index_add(1, numbers.index, 2 * numbers.delta)
    terms = numbers.x[0] * weight
    narrow = shuffled_sum(terms, torch.Generator().manual_seed(0), dtype)
    assert not torch.equal(narrow.double(), terms.sum(-1))


@pytest.mark.parametrize(("layout", "operand"), [("odd", "x"), ("blocks", "gy")])
def test_float32_operands_have_more_bits_than_tf32_keeps(layout, operand):
    numbers = draw(LAYOUTS[layout].shape, torch.float32, torch.Generator().manual_seed(0), LAYOUTS[layout].wide)
    odd = getattr(numbers, operand) % 2 == 1
    assert bool((odd & (getattr(numbers, operand).abs() > 2**11)).any())


@pytest.mark.parametrize("dtype", DTYPES + FP8)
def test_longer_sums_leave_smaller_numbers_until_none_are_left(dtype):
    short = admissible_ranges(Shape(8, 8, 8, 1), dtype)
    long = admissible_ranges(Shape(8, 512, 8, 1), dtype)
    assert long.x * long.weight <= short.x * short.weight
    with pytest.raises(ValueError, match="too long to be exact"):
        admissible_ranges(Shape(8, 2**24, 8, 1), dtype)


def test_a_layer_that_is_not_exact_is_not_certified():
    generator = torch.Generator().manual_seed(0)
    case = exact_case("case", LAYOUTS["odd"], torch.bfloat16, generator)
    case.inputs["x"].copy_(torch.randn(case.inputs["x"].shape, generator=generator))
    with pytest.raises(NotExactError, match=r"addmm.* rounds to torch\.bfloat16"), Certificate(accumulator_bits=53):
        run_layer(case, paca.set_backend("cpu"), "resident")


def test_sums_that_only_happen_to_be_exact_are_not_certified():
    a = torch.tensor([[2.0**24, 1.0, -(2.0**24)]])  # 1 is lost, or not, as the order will have it
    with pytest.raises(NotExactError, match="26 bits, more than the 24"), Certificate():
        a @ torch.ones(3, 1)
    with Certificate(accumulator_bits=2):
        torch.ones(1, 3) @ torch.ones(3, 1)


@pytest.mark.parametrize("seed", range(2))
def test_training_the_block_is_proved_exact_in_every_dtype(seed):
    numbers, backend = draw_block(seed), paca.set_backend("cpu")
    results = []
    for dtype in [torch.float64, *DTYPES]:
        with Certificate() as certificate:
            results.append(train_block(numbers, dtype, backend))
        assert certificate.operations > 500
    for found in results[1:]:  # all numbers are the same in all dtypes
        assert all(torch.equal(found[name], results[0][name]) for name in results[0])


def test_the_block_trains_every_layer_in_every_step():
    seen = []

    def look(step, block):
        layers = [module for module in block.modules() if isinstance(module, PacaLayer)]
        seen.append([layer.paca_delta["default"].detach().clone() for layer in layers])

    train_block(draw_block(), torch.bfloat16, paca.set_backend("cpu"), observe=look)
    assert len(seen) == 5
    for before, after in itertools.pairwise(seen):
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_layout_is_drawn_in_the_bitwise_tier():
    for name, layout in LAYOUTS.items():
        for dtype in DTYPES:
            case = exact_case(name, layout, dtype, torch.Generator().manual_seed(0))
            assert case.tier == BITWISE
            assert all(bool(case.inputs[key].any()) for key in ("x", "gy", "weight", "delta"))
