"""What a forward remembers of its adapters is what it would find by looking again, whatever happened in between."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import paca
from paca.layer import PacaLayer

SOURCE = str(Path(paca.__file__).parent)
NAMES = ("default", "other")


def model_of() -> tuple[Any, PacaLayer]:
    model = tiny.perturb(tiny.adapted(tiny.mlp(), r=3, task_type=None))
    model.add_adapter("other", tiny.config(r=2, random_seed=7, task_type=None))
    return model, tiny.layers_of(model)[0]


def replace_delta(model: Any, layer: PacaLayer) -> None:
    layer.paca_delta["default"] = nn.Parameter(layer.paca_delta["default"].detach() + 1)


def replace_index(model: Any, layer: PacaLayer) -> None:
    if not layer.merged:
        layer.replace_columns("default", torch.tensor([0, 1, 2]))


def both_active(model: Any, layer: PacaLayer) -> None:
    for each in tiny.layers_of(model):
        each.set_adapter(list(NAMES))


def delete_and_add(model: Any, layer: PacaLayer) -> None:
    if not layer.merged:
        model.set_adapter("default")
        model.delete_adapter("other")
        model.add_adapter("other", tiny.config(r=1, random_seed=9, task_type=None))


def merge(model: Any, layer: PacaLayer) -> None:
    if layer.merged:
        model.unmerge_adapter()
    else:
        model.merge_adapter()


CHANGES: dict[str, Callable[[Any, PacaLayer], object]] = {
    "set_adapter": lambda model, layer: layer.merged or model.set_adapter("other"),
    "set_adapter back": lambda model, layer: layer.merged or model.set_adapter("default"),
    "both": both_active,
    "active by hand": lambda model, layer: setattr(layer, "_active_adapter", "other"),
    "an unknown name": lambda model, layer: setattr(layer, "_active_adapter", ["default", "unknown"]),
    "scale": lambda model, layer: layer.set_scale("default", 0.5),
    "scale by hand": lambda model, layer: layer.scaling.update(default=layer.scaling["default"] * 2),
    "disabled by hand": lambda model, layer: setattr(layer, "_disable_adapters", not layer._disable_adapters),
    "disabled": lambda model, layer: layer.enable_adapters(enabled=layer.disable_adapters),
    "delta": replace_delta,
    "columns": replace_index,
    "merge": merge,
    "delete and add": delete_and_add,
    "cast": lambda model, layer: model.float(),
    "load": lambda model, layer: layer.merged or model.load_state_dict(model.state_dict()),
}


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=6))
def test_it_is_what_a_new_look_finds(changes: list[str]) -> None:
    model, layer = model_of()
    for change in changes:
        assert list(layer.held_adapters()) == layer._found_adapters()
        CHANGES[change](model, layer)
        assert list(layer.held_adapters()) == layer._found_adapters(), change


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_remembers_nothing_of_its_original(copied: Callable[[Any], Any]) -> None:
    model, _ = model_of()
    model(torch.ones(1, 2, 10))
    twin = tiny.layers_of(copied(model))[0]
    assert twin.held_adapters()[0].delta is twin.paca_delta["default"]


def functions_run(run: Callable[[], object]) -> int:
    """Count calls of this package's Python functions."""
    called = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal called
        called += event == "call" and frame.f_code.co_filename.startswith(SOURCE)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return called


def test_a_forward_costs_the_host_little() -> None:
    """On a fast device a small batch waits for the host: PEFT's LoRA runs about 45 functions a layer."""
    model, _ = model_of()
    layers = len(tiny.layers_of(model))
    x = torch.ones(1, 2, 10, requires_grad=True)
    model(x).sum().backward()

    def evaluate() -> None:
        with torch.no_grad():
            model(x)

    assert functions_run(evaluate) <= 27 * layers
    assert functions_run(lambda: model(x)) <= 35 * layers
