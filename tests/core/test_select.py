"""Rule 7: the same columns everywhere."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paca import select
from paca.select import best_columns, checked_columns, random_columns, shared_name, weight_norms

widths = st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(widths, st.integers(0, 2**40), st.text(max_size=20))
def test_columns_are_sorted_distinct_and_in_range(width, seed, name):
    n, r = width
    index = random_columns(n, r, seed, name)
    assert index.dtype == torch.int64
    assert len(index) == r
    assert index.tolist() == sorted(set(index.tolist()))
    assert 0 <= int(index[0]) <= int(index[-1]) < n


@given(widths, st.integers(0, 2**40))
def test_a_smaller_rank_draws_a_subset(width, seed):
    n, r = width
    small, large = random_columns(n, max(1, r // 2), seed, "a"), random_columns(n, r, seed, "a")
    assert set(small.tolist()) <= set(large.tolist())


def test_columns_depend_on_seed_and_name_and_on_nothing_else():
    first = random_columns(1000, 16, 0, "layer")
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(first, random_columns(1000, 16, 0, "layer"))
    assert not torch.equal(first, random_columns(1000, 16, 1, "layer"))
    assert not torch.equal(first, random_columns(1000, 16, 0, "other"))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_columns(50, 5, 0, "layer")
    assert torch.equal(torch.rand(3), expected)


def test_another_process_draws_the_same_columns():
    code = (
        "import runpy, sys; draw = runpy.run_path(sys.argv[1])['random_columns']\n"
        "print(draw(4096, 64, 7, 'a.mlp.up_proj').tolist())"
    )
    command = [sys.executable, "-c", code, select.__file__]  # without PEFT, so sooner
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert random_columns(4096, 64, 7, "a.mlp.up_proj").tolist() == json.loads(out)


def test_every_column_is_as_likely_as_any_other():
    drawn = torch.zeros(20)
    for seed in range(2000):
        drawn[random_columns(20, 5, seed, "layer")] += 1
    expected = 2000 * 5 / 20
    chi_squared = float(((drawn - expected) ** 2 / expected).sum())
    assert chi_squared < 43.8  # 0.1 % of fair draws exceed it (19 degrees of freedom)


def test_layers_that_read_the_same_input_draw_under_one_name():
    attention = "model.layers.0.self_attn"
    names = {shared_name(f"{attention}.{leaf}") for leaf in ("q_proj", "k_proj", "v_proj")}
    assert names == {f"{attention}.q_proj"}
    assert shared_name(f"{attention}.o_proj") == f"{attention}.o_proj"
    assert shared_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.gate_proj"
    assert shared_name("model.layers.1.mlp.up_proj") != shared_name("model.layers.0.mlp.up_proj")


def test_the_best_columns_are_the_largest_or_the_smallest_ties_to_the_lower_number():
    scores = torch.tensor([1.0, 5.0, 3.0, 5.0, 0.0, 5.0])
    assert best_columns(scores, 2).tolist() == [1, 3]
    assert best_columns(scores, 2, smallest=True).tolist() == [0, 4]


def test_weight_norms_are_summed_over_layers_with_the_same_input():
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    expected = torch.cat([a, b]).double().norm(dim=0) ** 2
    assert torch.allclose(weight_norms([a, b]), expected)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "non-empty"),
        ([0.5], "whole numbers"),
        ([True, False], "whole numbers"),
        ([[1, 2]], "shape"),
        ([3, -1], r"lie in 0…9, found -1…3"),
        ([10], r"lie in 0…9, found 10…10"),
        ([4, 2, 4], "found 4 more than once"),
    ],
)
def test_columns_chosen_by_hand_are_checked(columns, message):
    with pytest.raises(ValueError, match=message):
        checked_columns(columns, 10, "layer")


def test_columns_chosen_by_hand_are_sorted():
    assert checked_columns([5, 1, 3], 10, "layer").tolist() == [1, 3, 5]
