"""What each method keeps for its backward, as closed forms. h: hidden, kv: width of keys, f: ffn, H: heads, r: rank."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paca
from paca.bench.contestant import Contestant
from paca.bench.kept import count_kept
from paca.bench.methods import parse_methods
from paca.bench.result import Kept
from paca.bench.shapes import SHAPES

SHAPE = SHAPES["tiny"]
H, KV, F, HEADS = SHAPE.hidden, SHAPE.hidden // SHAPE.heads * SHAPE.kv_heads, SHAPE.ffn, SHAPE.heads
R = 8
# Two norms keep a float32 copy and one number; attention q, k, v, its output and a log-sum; the MLP gate, its silu, up.
FLOOR = 2 * (4 * H + 4) + (4 * H + 4 * KV + 4 * HEADS) + 6 * F
EXTRA = {
    f"paca-r{R}": 8 * R,  # one gather for q, k, v; one for o; one for gate, up; one for down
    f"paca-unshared-r{R}": 14 * R,  # one gather for each of the seven
    f"lora-nocast-r{R}": 2 * (2 * H + F) + 14 * R,  # the inputs of q/k/v, gate/up and down, and seven times x·Aᵀ
    f"lora-r{R}": 4 * (6 * H + F) + 28 * R,  # each of the seven inputs cast to float32, and x·Aᵀ in float32
}


def _kept(name: str, dtype: torch.dtype = torch.bfloat16) -> Kept:
    contestant = Contestant(parse_methods(name)[-1], SHAPE, dtype, paca.get_backend(), seed=0)
    return count_kept(contestant.forward, contestant.model, contestant.last_layer)


@pytest.fixture(scope="module")
def floor() -> Kept:
    return _kept("floor")


def test_the_frozen_floor_keeps_what_its_closed_form_says(floor: Kept) -> None:
    assert floor.layer == FLOOR * SHAPE.tokens_per_step


@pytest.mark.parametrize("name", EXTRA)
def test_above_the_floor_a_method_keeps_exactly_its_closed_form(name: str, floor: Kept) -> None:
    kept = _kept(name)
    assert kept.layer - floor.layer == EXTRA[name] * SHAPE.tokens_per_step
    assert kept.total - floor.total == EXTRA[name] * SHAPE.tokens_per_step * SHAPE.layers


@pytest.mark.parametrize("rank", [1, 5, 48])
def test_paca_keeps_r_channels_of_each_distinct_input_at_any_rank(rank: int, floor: Kept) -> None:
    tokens = SHAPE.tokens_per_step * SHAPE.layers
    assert _kept(f"paca-r{rank}").total - floor.total == 4 * rank * 2 * tokens
    assert _kept(f"paca-unshared-r{rank}").total - floor.total == 7 * rank * 2 * tokens


def test_full_fine_tuning_keeps_every_input_and_what_the_norms_multiply(floor: Kept) -> None:
    inputs = 2 * (2 * H + F)
    normed = 2 * 2 * H
    assert _kept("full").layer - floor.layer == (inputs + normed) * SHAPE.tokens_per_step


def _count(forward: Any) -> int:
    return count_kept(forward, nn.Module(), nn.Identity()).total


def test_a_saved_view_counts_with_all_that_it_keeps_alive() -> None:
    x, w = torch.ones(10, 100), torch.ones(10, 1, requires_grad=True)
    assert _count(lambda: (x.clone()[:, :1] * w).sum()) == x.nbytes


def test_a_tensor_saved_twice_counts_once() -> None:
    w = torch.ones(50, requires_grad=True)

    def forward() -> Tensor:
        y = w.detach() + 1
        return (y * w).sum() + (y.view(5, 10) * w.view(5, 10)).sum()

    assert _count(forward) == w.nbytes


def test_the_models_own_parameters_and_buffers_do_not_count() -> None:
    model = nn.Linear(30, 30)
    x = torch.ones(2, 30, requires_grad=True)
    model.requires_grad_(False)
    assert count_kept(partial(model, x), model, model).total == 0


class _Parking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.parked = [x.clone()]
        return x * 2

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:  # type: ignore[override]
        return gy * 2


def test_a_tensor_that_a_function_holds_without_telling_autograd_counts() -> None:
    x = torch.ones(40, requires_grad=True)
    assert _count(lambda: _Parking.apply(x).sum()) == x.nbytes


def test_what_was_counted_is_freed() -> None:
    """Or a benchmark of many methods would hold the activations of them all."""
    x, layer, kept = torch.randn(4, 4, requires_grad=True), nn.Linear(4, 4), []

    def forward() -> Tensor:
        y = layer(x).tanh()  # keeps its own output
        kept.append(weakref.ref(y))
        return y.square()

    assert count_kept(forward, layer, layer).total > 0
    gc.collect()
    (y,) = kept
    assert y() is None
