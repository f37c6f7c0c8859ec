"""A write that is made again without a plan is what a new plan would make, whatever happened in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models as tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import paca
from paca.columns import AdaptedWeight
from paca.errors import StaleColumnsError
from paca.layer import PacaLayer
from paca.strategies import adapted_columns


def other_weight(layer: PacaLayer) -> None:
    weight = layer.get_base_layer().weight
    layer.get_base_layer().weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def other_memory(layer: PacaLayer) -> None:
    weight = layer.get_base_layer().weight
    weight.data = weight.data.clone()


def other_delta_memory(layer: PacaLayer) -> None:
    delta = layer.paca_delta["default"]
    delta.data = torch.randn_like(delta)


def delta_in_float64(layer: PacaLayer) -> None:
    delta = layer.paca_delta["default"]
    delta.data = delta.data.double()


def delta_in_place(layer: PacaLayer) -> None:
    layer.paca_delta["default"].data.normal_()


def other_columns(layer: PacaLayer) -> None:
    layer.replace_columns("default", torch.tensor([0, 1, 2]))


def other_delta(layer: PacaLayer) -> None:
    layer.paca_delta["default"] = nn.Parameter(torch.randn_like(layer.paca_delta["default"]))


CHANGES: list[Callable[[PacaLayer], object]] = [
    other_weight,
    other_memory,
    other_delta_memory,
    delta_in_float64,
    delta_in_place,
    other_columns,
    other_delta,
    lambda layer: layer.set_scale("default", 0.5),
    lambda layer: layer.bfloat16(),
    lambda layer: layer.float(),
    lambda layer: layer.get_base_layer().double(),
    lambda layer: layer.merge() if not layer.merged else layer.unmerge(),
    lambda layer: layer.enable_adapters(layer.disable_adapters),
]


OTHER_MEMORY, OTHER_DELTA_MEMORY, IN_PLACE = (
    CHANGES.index(change) for change in (other_memory, other_delta_memory, delta_in_place)
)
MERGE, CAST = 11, 10  # of these: merge or unmerge; cast the layer below alone


def layer_of(conv1d: bool = False) -> PacaLayer:
    """Return a layer, or one with a weight that is laid out (in, out)."""
    base = tiny.mlp()
    if conv1d:
        base.first = Conv1D(16, 10)  # type: ignore[assignment]
    return tiny.layers_of(tiny.perturb(tiny.adapted(base, r=3, task_type=None)))[0]


def assert_written(layer: PacaLayer) -> None:
    """Compare the weight with what its delta asks for, found without any plan."""
    base, columns = layer.get_base_layer(), layer.adapted.columns
    assert columns is not None
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    wanted = adapted_columns(columns.base, layer.paca_delta["default"].detach(), layer.scaling["default"])
    assert torch.equal(weight.index_select(1, layer.paca_indices["default"]), wanted)


@settings(max_examples=80, deadline=None)
@given(changes=st.lists(st.sampled_from(range(len(CHANGES))), min_size=1, max_size=6), conv1d=st.booleans())
@example(changes=[MERGE, CAST, MERGE], conv1d=False)
@example(changes=[OTHER_MEMORY, IN_PLACE], conv1d=True)
@example(changes=[OTHER_DELTA_MEMORY], conv1d=False)
def test_the_weight_holds_what_its_adapter_asks_for(changes: list[int], conv1d: bool) -> None:
    layer = layer_of(conv1d)
    paca.refresh(layer)
    for change in changes:
        CHANGES[change](layer)
        paca.refresh(layer)
        if not (layer.merged or layer.disable_adapters):
            assert_written(layer)
    paca.verify(layer)


def test_a_weight_that_is_sharded_where_it_lies_is_left() -> None:
    """Another parameter, in the same memory."""
    layer = layer_of()
    paca.refresh(layer)
    shard = nn.Parameter(layer.get_base_layer().weight.detach(), requires_grad=False)
    shard._fsdp_flattened = True  # type: ignore[attr-defined]
    layer.get_base_layer().weight = shard
    with pytest.warns(UserWarning, match="the weight is sharded"):
        paca.refresh(layer)
    assert layer.residency == "swap"


def test_a_check_of_everything_does_not_trust_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    paca.refresh(layer)
    monkeypatch.setattr(AdaptedWeight, "planned", lambda self, adapters: self._planned.write)
    other_delta_memory(layer)
    paca.refresh(layer)
    with pytest.raises(StaleColumnsError):
        paca.verify(layer)


def test_most_writes_need_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plans = layer_of(), []
    plan = AdaptedWeight.plan
    monkeypatch.setattr(AdaptedWeight, "plan", lambda self, adapters: plans.append(self.name) or plan(self, adapters))
    for _ in range(3):
        paca.refresh(layer)
    assert plans == []
