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
from paca.parity.cases import BITWISE, exact_case
from paca.parity.certificate import Certificate, NotExactError
from paca.parity.exact import Shape, accumulator_bits, admissible_ranges, draw
from paca.parity.formats import is_representable
from paca.parity.layouts import LAYOUTS, Bias, Layout, Storage
from paca.parity.operations import OPERATIONS, run_operation
from paca.parity.recording import TOGETHER
from paca.parity.training_step import RESTORED, run_layer
from paca.strategies import TOKENS_PER_BLOCK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn]
sizes = st.tuples(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50))  # tokens, in, out
shapes = sizes.flatmap(lambda size: st.builds(Shape, *map(st.just, size), st.integers(1, size[1]), st.booleans()))
layouts = st.builds(
    lambda shape, wide, storage, bias: Layout(shape, (shape.tokens,), wide, storage, bias),
    shapes,
    st.sampled_from(["x", "gy"]),
    st.just(Storage.LINEAR),
    st.sampled_from(Bias),
) | st.builds(
    lambda shape, wide, bias: Layout(shape, (1, shape.tokens), wide, Storage.CONV1D, bias),
    shapes,
    st.sampled_from(["x", "gy"]),
    st.sampled_from([Bias.FROZEN, Bias.TRAINED]),
)


def shuffled_sum(terms: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum over the last axis in `dtype`, one addition at a time, pairs drawn at random: any order and any tree."""
    parts = list(terms.to(dtype).unbind(-1))
    while len(parts) > 1:
        i, j = torch.randperm(len(parts), generator=generator)[:2].tolist()
        parts[i] = parts[i] + parts[j]
        del parts[j]
    return parts[0]


@settings(max_examples=30, deadline=None)
@given(layout=layouts, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
def test_every_step_of_a_layer_is_proved_exact(layout, dtype, seed):
    case = exact_case("case", layout, dtype, torch.Generator().manual_seed(seed))
    backend = paca.set_backend("cpu")
    with Certificate(24 if dtype == torch.float32 else 20) as certificate:
        found = [run_layer(case, backend, *how) for how in [("resident",), ("swap",), ("resident", True)]]
        found += [run_operation(case, field, backend) for field in OPERATIONS if field != "grad_input_sum"]
        found += [OPERATIONS["grad_input_sum"].run(case, TOGETHER, torch.device("cpu"))]
    assert certificate.operations > 60
    for results in found:
        for name, value in results.items():
            wanted = case.inputs["weight"] if name == RESTORED else case.expected[name]
            assert value.dtype == wanted.dtype
            assert torch.equal(value.reshape(wanted.shape), wanted)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES + FP8), wide=st.sampled_from(["x", "gy"]), seed=st.integers(0, 2**20))
def test_every_order_of_summation_gives_the_same_bits(shape, dtype, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = draw(shape, dtype, generator, wide, bias_trains=True)
    weight = numbers.weight.index_add(1, numbers.index, numbers.delta * numbers.alpha / shape.rank)
    for values in (numbers.x, numbers.gy, numbers.weight, numbers.bias, weight):
        assert is_representable(values, dtype)
    if not shape.tokens:
        return
    for a, b, of_output in [
        (numbers.x[0], weight, dtype),
        (numbers.gy[0], weight.t(), dtype),
        (numbers.gy.t()[0], numbers.x.t(), torch.float32),
        (numbers.gy.t(), torch.ones(shape.tokens), dtype),
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


def test_narrow_sums_leave_room_for_accumulators_of_20_bits():
    assert [accumulator_bits(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [24, 20, 20]


LOST = torch.tensor([[2.0**24, 1.0, -(2.0**24)]])  # 1 is lost, or not, as the order will have it
ONES = torch.ones(3, 1)
aten = torch.ops.aten


@pytest.mark.parametrize(
    "sum_of_three",
    [
        lambda: aten.mm(LOST, ONES),
        lambda: aten.bmm(LOST[None], ONES[None]),
        lambda: aten.addmm(torch.zeros(1, 1), LOST, ONES),
        lambda: aten.addmm(torch.zeros(1, 1), LOST, -ONES, alpha=-1, beta=-1),
        lambda: torch.zeros(1, 1).addmm_(LOST, ONES),
        lambda: aten.addmm(LOST[:, :1], LOST[:, 1:], ONES[:2]),
        lambda: aten.baddbmm(torch.zeros(1, 1, 1), LOST[None], ONES[None]),
        lambda: aten.dot(LOST[0], ONES[:, 0]),
        lambda: aten.mv(LOST, ONES[:, 0]),
        lambda: aten.sum(LOST),
        lambda: LOST.sum(-1),
        lambda: aten.index_add(torch.zeros(1, 1), 1, torch.zeros(3, dtype=torch.int64), LOST),
        lambda: torch.zeros(1, 1).index_add_(1, torch.zeros(3, dtype=torch.int64), LOST),
        lambda: torch.nn.functional.linear(LOST, ONES.t()),
    ],
    ids=range(14),
)
def test_no_sum_whose_order_matters_is_certified(sum_of_three):
    with pytest.raises(NotExactError, match="bits, more than the 24"), Certificate():
        sum_of_three()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda: LOST.mean(), "none of the operations that can be proved exact"),
        (lambda: LOST.cumsum(1), "none of the operations that can be proved exact"),
        (lambda: torch.nn.functional.softmax(LOST, -1), "none of the operations that can be proved exact"),
        (lambda: paca_ops_of_its_own(), "none of the operations that can be proved exact"),
        (lambda: aten.addmm(ONES, ONES, ONES[:1], alpha=3), "alpha or beta other than 1"),
        (lambda: ONES / 3, "rounds to torch.float32"),
        (lambda: (ONES + 2.0**-9).bfloat16(), "rounds to torch.bfloat16"),
        (lambda: ONES * 3 * (2 / 3), "0.6666666666666666, which rounds to torch.float32"),
        (lambda: ONES * 2.0**60 - ONES, "more bits than float64 has"),
        (lambda: ONES * 2.0**60 + 1, "more bits than float64 has"),
        (lambda: torch.add(-3 * ONES, ONES * (2**23 + 1), alpha=3), "an alpha of 3, no power of two"),
        (lambda: torch.zeros(1, 3).index_copy(1, torch.tensor([0, 0]), ONES[None, :2, 0]), "writes one place twice"),
        (lambda: torch.zeros(1, 3).scatter_(1, torch.tensor([[0, 0]]), ONES[None, :2, 0]), "writes one place twice"),
    ],
)
def test_what_nobody_proved_is_not_certified(operation, message):
    with pytest.raises(NotExactError, match=message), Certificate():
        operation()


def paca_ops_of_its_own():
    """Call a custom operation, which the certificate cannot look into."""
    library = torch.library.Library("parity_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    return torch.ops.parity_test.twice(ONES)


def test_what_cannot_round_is_certified():
    with Certificate() as certificate:
        torch.tensor([1, 2]).sum()
        torch.ones(2, 1, dtype=torch.int64) @ torch.ones(1, 2, dtype=torch.int64)
        torch.zeros(2, 3).scatter_(1, torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2))
        torch.add(ONES, ONES, alpha=-(2.0**-5))
        torch.empty(0, 3) + 1
    assert certificate.operations > 4


def test_sums_that_only_happen_to_be_exact_are_not_certified():
    with pytest.raises(NotExactError, match="26 bits, more than the 24"), Certificate():
        LOST @ ONES
    with Certificate(accumulator_bits=2):
        torch.ones(1, 3) @ torch.ones(3, 1)


@pytest.mark.parametrize("seed", range(2))
def test_training_the_block_is_proved_exact_in_every_dtype(seed):
    numbers, backend = draw_block(seed), paca.set_backend("cpu")
    results = []
    for dtype in [torch.float64, *DTYPES]:
        with Certificate(20) as certificate:
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
            of_tokens = ("x", "gy") if layout.shape.tokens else ()
            assert all(bool(case.inputs[key].any()) for key in (*of_tokens, "weight", "delta"))
            trains_bias = layout.bias is Bias.TRAINED and layout.shape.tokens
            assert not trains_bias or bool(case.expected["grad_bias"].any())


def test_layers_of_every_kind_are_drawn():
    drawn = LAYOUTS.values()
    assert {layout.storage for layout in drawn} == set(Storage)
    assert {layout.bias for layout in drawn} == set(Bias)
    assert {len(layout.lead) for layout in drawn} == {0, 1, 2, 3}
    assert any(layout.shape.tokens == 0 for layout in drawn)
    assert any(layout.shape.tokens > TOKENS_PER_BLOCK for layout in drawn)
    assert any(layout.shape.neighbours and layout.shape.rank > 1 for layout in drawn)
    assert all(torch.Size(layout.lead).numel() == layout.shape.tokens for layout in drawn)
