"""Optimizers that own no delta: those that step copies of deltas are followed, others cost nothing."""

from __future__ import annotations

import pytest
import torch
from test_never_stale import FlatCopies, assert_fresh, deltas_of, layers_of, make_model, train_step
from torch import nn

import paca
from paca.columns import AdaptedWeight


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose values were compared, which waits for the device."""
    found: list[str] = []
    holds = AdaptedWeight.holds

    def counted(self: AdaptedWeight, adapters, rows=None, first=0):
        if rows is None:
            found.append(self.name)
        return holds(self, adapters, rows, first)

    monkeypatch.setattr(AdaptedWeight, "holds", counted)
    return found


def step_of(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    module(torch.randn(2, 3)).sum().backward()
    optimizer.step()


def test_another_models_optimizer_costs_no_look(looks):
    model, other = make_model(), nn.Linear(3, 3)
    own, others = torch.optim.AdamW(deltas_of(model), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        train_step(model, own)
        step_of(other, others)
        assert_fresh(model)
    assert looks == []


def test_a_second_optimizer_of_the_same_model_costs_no_look(looks):
    model = make_model()
    biases = [layer.get_base_layer().bias.requires_grad_() for layer in layers_of(model)]
    own, others = torch.optim.SGD(deltas_of(model), lr=0.1), torch.optim.SGD(biases, lr=0.1)
    for _ in range(3):
        train_step(model, own)
        others.step()
        assert_fresh(model)
    assert looks == []


def test_a_frozen_adapter_beside_a_training_costs_no_look(looks):
    teacher, other = make_model(), nn.Linear(3, 3)
    teacher.requires_grad_(False)
    teacher(torch.randn(2, 12))
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        step_of(other, others)
        assert_fresh(teacher)
    assert looks == []


@pytest.mark.parametrize("selection", ["random", "mask_random"])
def test_copies_that_are_stepped_after_an_optimizer_of_the_deltas_are_seen_at_once(looks, selection):
    model = make_model(selection=selection)
    own = torch.optim.SGD(deltas_of(model), lr=0.1)  # lives on, idle
    copies = FlatCopies(deltas_of(model), lr=0.1)
    train_step(model, own)
    for copied, delta in zip(copies.param_groups[0]["params"], deltas_of(model), strict=True):
        copied.data.copy_(delta)
    for _ in range(3):
        train_step(model, copies)
        with torch.no_grad():
            model(torch.randn(3, 12))
        assert sorted(looks) == ["first", "last", "middle"]
        paca.verify(model)
        looks.clear()


def test_gradients_that_no_layer_saw_delay_that_by_one_step():
    """As those of replayed graphs, which run no Python."""
    model = make_model()
    train_step(model, torch.optim.SGD(deltas_of(model), lr=0.1))
    copies = FlatCopies(deltas_of(model), lr=0.1)
    for _ in range(2):
        for layer in layers_of(model):
            layer.steps_per_check = 0
        for delta in deltas_of(model):
            delta.grad = torch.ones_like(delta)
        copies.flush()
    assert_fresh(model)


def test_a_suspicion_outlasts_the_freezing_of_an_adapter():
    model, other = make_model(), nn.Linear(3, 3)
    train_step(model, FlatCopies(deltas_of(model), lr=0.1))
    model.requires_grad_(False)
    step_of(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert_fresh(model)
