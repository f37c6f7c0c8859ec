"""The bounded tier lets honest rounding pass, in any order, and nothing that is worse."""

from __future__ import annotations

import math

import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paca.parity.bounds import columns_bound, gamma, product_bound, rounding_bound, sum_of_products_bound
from paca.parity.findings import Status
from paca.parity.formats import SIGNIFICAND_BITS, first_difference, ulp_distance, unit_roundoff
from paca.parity.judge import within_bound
from paca.parity.truth import Truth
from paca.strategies import adapted_columns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 70), dtype=st.sampled_from(DTYPES), spread=st.floats(0, 4), seed=st.integers(0, 2**20))
def test_float32_sums_in_any_order_stay_within_the_bound(length, dtype, spread, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) * spread).exp2()

    a, b = draw(5, length).to(dtype), draw(length, 4).to(dtype)
    order = torch.randperm(length, generator=generator).tolist()
    total = torch.zeros(5, 4)
    for k in order:
        total = total + a[:, k, None].float() * b[None, k].float()
    truth = Truth(a.double() @ b.double(), dtype, product_bound(a.double(), b.double(), dtype))
    verdict = within_bound(total.to(dtype), truth, "product")
    assert verdict.status is Status.WITHIN_BOUND
    assert verdict.fraction <= 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    each_rounded=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_products_that_are_added_one_by_one_stay_within_their_bound(lengths, dtype, each_rounded, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype)

    factors = [(draw(5, length), draw(length, 4)) for length in lengths]
    total = torch.zeros(5, 4)
    for a, b in factors:
        product = a.float() @ b.float()
        total = (total + (product.to(dtype).float() if each_rounded else product)).to(dtype).float()
    wide = [(a.double(), b.double()) for a, b in factors]
    exact = sum(a @ b for a, b in wide)
    verdict = within_bound(total.to(dtype), Truth(exact, dtype, sum_of_products_bound(wide, dtype)), "sum")
    assert verdict.status is Status.WITHIN_BOUND


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_result_just_outside_its_bound_fails_and_is_named(dtype):
    a, b = torch.randn(6, 32).to(dtype).double(), torch.randn(32, 5).to(dtype).double()
    truth = Truth(a @ b, dtype, product_bound(a, b, dtype))
    found = (a @ b).to(dtype)
    assert within_bound(found, truth, "product").status is Status.WITHIN_BOUND
    found[2, 3] = truth.exact[2, 3] + 4 * truth.bound[2, 3]
    verdict = within_bound(found, truth, "product")
    assert verdict.status is Status.FAILED
    assert verdict.detail.startswith("product: [2, 3] is ")
    assert "1 of 30 elements" in verdict.detail


@pytest.mark.parametrize(("length", "at_least"), [(2, 0.35), (3, 0.5), (8, 0.75)])
def test_a_sum_that_loses_all_but_its_first_term_by_chopping_nearly_reaches_its_bound(length, at_least):
    a = torch.full((1, length), 2.0**-23 * (1 - 2.0**-10), dtype=torch.float64)  # each less than an ulp of 1
    a[0, 0] = 1
    total = torch.zeros(1)
    for term in a[0]:
        total = planted.chopped(total.double() + term, torch.float32)
    assert float(total) == 1
    bound = product_bound(a, torch.ones(length, 1, dtype=torch.float64), torch.float32)
    assert at_least < float((a.sum() - 1) / bound) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_roundings_lose_nearly_reaches_the_bound_of_that_many(dtype):
    """Half an ulp is added to 1 again and again, and lost as often."""
    one, half = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), unit_roundoff(dtype), dtype=torch.float64)
    assert (one + half).to(dtype) == 1
    factors = [(one, one), (half, one), (half, one)]
    assert 0.6 < float(2 * half / sum_of_products_bound(factors, dtype)) <= 1
    assert 0.9 < float(half / columns_bound(one, half / 4, 4.0, dtype)) <= 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_and_inf_are_outside_every_bound(wrong):
    a, b = torch.randn(3, 8).double(), torch.randn(8, 3).double()
    found = (a @ b).float()
    found[0, 0] = wrong
    assert within_bound(found, Truth(a @ b, torch.float32, product_bound(a, b, torch.float32)), "p").fraction > 1


@pytest.mark.parametrize(
    ("defect", "dtype"),
    [("bfloat16 sums", dtype) for dtype in DTYPES] + [("tf32", torch.float32)],
)
def test_a_numerical_defect_is_outside_the_bound(defect, dtype):
    x, weight = torch.randn(32, 64).to(dtype), torch.randn(48, 64).to(dtype)
    forward = planted.forward_in_bfloat16 if defect == "bfloat16 sums" else planted.forward_tf32
    truth = Truth(
        x.double() @ weight.double().t(), dtype, product_bound(x.double(), weight.double().t(), dtype, roundings=2)
    )
    assert within_bound(forward(x, weight, None), truth, "y").status is Status.FAILED


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 2.0, 2 / 3, 1e-3]), seed=st.integers(0, 2**20))
def test_written_columns_stay_within_their_bound_with_and_without_fused_multiply_add(dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(20, 6, generator=generator).to(dtype)
    delta = torch.randn(20, 6, generator=generator)
    exact = base.double() + scale * delta.double()
    truth = Truth(exact, dtype, columns_bound(base.double(), delta.double(), scale, dtype))
    assert within_bound(adapted_columns(base, delta, scale), truth, "columns").status is Status.WITHIN_BOUND
    fused = exact.float().to(dtype)
    assert within_bound(fused, truth, "columns").status is Status.WITHIN_BOUND


@pytest.mark.parametrize("dtype", list(SIGNIFICAND_BITS))
def test_the_unit_roundoff_is_that_of_the_format(dtype):
    assert unit_roundoff(dtype) == torch.finfo(dtype).eps / 2


def test_gamma_is_highams_and_says_when_it_bounds_nothing():
    assert gamma(3, 2.0**-24) == 3 * 2.0**-24 / (1 - 3 * 2.0**-24)
    with pytest.raises(ValueError, match="no bound"):
        gamma(256, 2.0**-8)


def test_numbers_below_the_normal_ones_have_an_absolute_bound():
    tiny = torch.tensor([2.0**-30], dtype=torch.float64)  # half of the smallest step is 2^-25
    assert abs(float(tiny.half()) - float(tiny)) <= float(rounding_bound(tiny, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_ulp_distance_counts_representable_numbers(dtype):
    one = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=dtype)
    two_up = torch.nextafter(torch.nextafter(one, torch.full_like(one, 9)), torch.full_like(one, 9))
    assert ulp_distance(two_up, one).tolist() == [2, 2, 2, 2]
    across = torch.tensor([-0.0], dtype=dtype), torch.tensor([0.0], dtype=dtype)
    assert ulp_distance(*across).tolist() == [0]
    assert ulp_distance(torch.nextafter(one[2:3], -one[:1]), torch.nextafter(one[2:3], one[:1])).tolist() == [2]


def test_the_first_difference_is_found_in_reading_order():
    expected = torch.zeros(3, 4)
    found = expected.clone()
    found[1, 2] = found[2, 0] = 1.0
    difference = first_difference(found, expected)
    assert difference.index == (1, 2)
    assert (difference.found, difference.expected, difference.count, difference.of) == (1.0, 0.0, 2, 12)
    assert first_difference(expected, -expected) is None
