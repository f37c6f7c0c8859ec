"""Switching adapters writes the columns that differ, and undoes them bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import paca
from paca import strategies
from paca.layer import PacaLayer


class ElementsWritten(TorchDispatchMode):
    """Counts the elements that `index_copy_` and `scatter_` write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.index_copy_.default, torch.ops.aten.scatter_.src):
            self.elements += args[3].numel()
        return func(*args, **(kwargs or {}))


def with_adapters(base: torch.nn.Module, **seeds: int) -> Any:
    """The model with one trained adapter for each name, drawn by its seed."""
    model: Any = None
    for number, (name, seed) in enumerate(seeds.items()):
        config = tiny.config(random_seed=seed, task_type=None, target_modules=["first", "last"])
        if isinstance(base, tiny.LlamaForCausalLM):
            config = tiny.config(random_seed=seed)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        tiny.perturb(model, name, seed=number)
    return model


def written_by_a_switch(model: Any, name: str) -> int:
    with ElementsWritten() as counter:
        model.set_adapter(name)
    return counter.elements


def test_a_switch_writes_only_the_columns_that_the_old_or_the_new_adapter_trains() -> None:
    model = with_adapters(tiny.llama(), x=1, y=2)
    deltas = {name: sum(layer.paca_delta[name].numel() for layer in tiny.layers_of(model)) for name in ("x", "y")}
    assert written_by_a_switch(model, "y") == deltas["x"] + deltas["y"]  # the old ones restored, the new ones written
    assert written_by_a_switch(model, "y") == 0


def test_adapters_of_one_seed_train_the_same_columns_so_that_nothing_is_restored_between_them() -> None:
    model = with_adapters(tiny.llama(), x=1, y=1)
    assert written_by_a_switch(model, "y") == sum(layer.paca_delta["y"].numel() for layer in tiny.layers_of(model))


def test_all_layers_of_a_model_are_written_in_one_call() -> None:
    calls: list[int] = []
    original = strategies.write_index_copy
    model = with_adapters(tiny.llama(), x=1, y=2)
    counting = paca.Ops(write_columns=lambda writes: calls.append(len(writes)) or original(writes))
    for layer in tiny.layers_of(model):
        layer.adapted.ops = counting
    model.set_adapter("y")
    assert calls == [len(tiny.layers_of(model))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pretrained_bits_come_back_after_a_thousand_random_switches(dtype: torch.dtype) -> None:
    base = tiny.mlp().to(dtype)
    pretrained = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = with_adapters(base, x=1, y=2, z=2)
    rows = torch.randn(5, 10, dtype=dtype)
    alone = {}
    for name in ("x", "y", "z"):
        model.set_adapter(name)
        alone[name] = model(rows)
    choices = random.Random(0)
    for _ in range(1000):
        name = choices.choice(["x", "y", "z", ["x", "y"], ["x", "y", "z"], "base"])
        if name == "base":
            with model.disable_adapter():
                assert tiny.same_bits(in_memory(model), pretrained)
        else:
            model.base_model.set_adapter(name)
        if isinstance(name, str) and name in alone:
            assert torch.equal(model(rows), alone[name])
    assert not tiny.same_bits(in_memory(model), pretrained)
    with model.disable_adapter():
        assert tiny.same_bits(in_memory(model), pretrained)
    assert tiny.same_bits(dict(model.unload().named_parameters()), pretrained)


def in_memory(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in tiny.weights_of(model).items()}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_a_weight_always_holds_the_active_adapters_on_the_pretrained_values(
    column_sets: list[set[int]], order: random.Random
) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(8, 3))
    pretrained = base[0].weight.detach().clone()
    names = [f"n{number}" for number in range(len(column_sets))]
    model: Any = None
    for name, columns in zip(names, column_sets, strict=True):
        config = paca.PacaConfig(
            r=len(columns), paca_alpha=len(columns), target_modules=["0"], columns={"0": sorted(columns)}
        )
        model = get_peft_model(base, config, adapter_name=name) if model is None else model
        if name not in model.peft_config:
            model.add_adapter(name, config)
    layer = next(module for module in model.modules() if isinstance(module, PacaLayer))
    with torch.no_grad():
        for delta in layer.paca_delta.values():
            delta.normal_()
    for _ in range(8):
        active = order.sample(names, order.randint(1, len(names)))
        model.base_model.set_adapter(active)
        wanted = pretrained + sum(layer.get_delta_weight(name) for name in active)
        torch.testing.assert_close(layer.base_layer.weight, wanted, atol=1e-6, rtol=0)
        untouched = torch.ones(8, dtype=torch.bool)
        for name in active:
            untouched[layer.paca_indices[name]] = False
        assert torch.equal(layer.base_layer.weight[:, untouched], pretrained[:, untouched])
    with model.disable_adapter():
        assert torch.equal(layer.base_layer.weight, pretrained)
