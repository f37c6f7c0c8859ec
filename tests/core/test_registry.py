"""The registry finds backends, built in or from outside, and explains what it cannot use."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import paca
from paca import registry, strategies
from paca.backend import Backend, GraphMode

PLUGINS = Path(__file__).parents[1] / "plugin"


@pytest.fixture
def install(monkeypatch):
    """Let packages with these entry points be installed; returns how often they were read."""

    def install(points):
        reads = []
        monkeypatch.setattr(registry, "entry_points", lambda group: reads.append(group) or points)
        registry._installed.cache_clear()
        return reads

    yield install
    registry._installed.cache_clear()


@pytest.fixture
def third_party(monkeypatch, install):
    monkeypatch.syspath_prepend(str(PLUGINS))
    points = [
        EntryPoint("dummy", "paca_dummy:DummyBackend", registry.GROUP),
        EntryPoint("asleep", "paca_dummy:AsleepBackend", registry.GROUP),
        EntryPoint("broken", "paca_does_not_exist:Backend", registry.GROUP),
        EntryPoint("impostor", "paca_dummy:Impostor", registry.GROUP),
        EntryPoint("unfinished", "paca_dummy:UnfinishedBackend", registry.GROUP),
    ]
    install(points)
    yield
    sys.modules.pop("paca_dummy", None)


def test_the_default_is_detected_and_kept():
    assert paca.get_backend().name == "cpu"
    assert paca.get_backend() is paca.get_backend()


def test_the_environment_decides_before_detection(monkeypatch, third_party):
    monkeypatch.setenv("PACA_BACKEND", "dummy")
    assert paca.get_backend().name == "dummy"


def test_the_best_usable_backend_is_the_default(third_party):
    assert paca.get_backend().name == "dummy"  # its priority is above the CPU's; "asleep" is above both but unusable


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ValueError, match=r"there is no backend 'cpv'\. Did you mean 'cpu'\? Known: .*cpu"):
        paca.set_backend("cpv")


def test_an_unusable_backend_says_why_and_changes_nothing(third_party):
    before = paca.set_backend("cpu")
    with pytest.raises(paca.BackendUnavailableError, match="'asleep' cannot be used here: it sleeps"):
        paca.set_backend("asleep")
    assert paca.get_backend() is before


def test_installed_packages_are_read_once_and_again_for_a_name_that_is_new(monkeypatch, install):
    reads = install([])
    for _ in range(3):
        paca.set_backend("cpu")
    assert len(reads) == 1
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [EntryPoint("dummy", "paca_dummy:DummyBackend", registry.GROUP)]
    )
    assert paca.set_backend("dummy").name == "dummy"
    sys.modules.pop("paca_dummy", None)


def test_a_broken_plugin_does_not_hide_the_others(third_party):
    found = paca.available_backends()
    assert found["cpu"] is None
    assert found["dummy"] is None
    assert found["asleep"] == "it sleeps"
    assert "paca_does_not_exist" in found["broken"]
    assert "not a subclass" in found["impostor"]
    assert "does not define capabilities, describe, device, memory, reset_peak_memory" in found["unfinished"]


@pytest.mark.parametrize("name", ["broken", "impostor", "unfinished"])
def test_a_broken_plugin_that_is_named_says_why_it_cannot_be_used(third_party, name):
    with pytest.raises(paca.BackendUnavailableError, match=f"'{name}' cannot be used here: it cannot be imported: "):
        paca.set_backend(name)


def test_use_backend_ends_with_its_block_even_after_an_error(third_party):
    before = paca.set_backend("cpu")

    def use_and_fail():
        with paca.use_backend("dummy", gather="one_hot") as inside:
            assert paca.get_backend() is inside
            assert inside.strategies["gather"] == "one_hot"
            raise KeyError

    with pytest.raises(KeyError):
        use_and_fail()
    assert paca.get_backend() is before


def test_strategies_are_named_printable_and_overridable():
    assert paca.set_backend("cpu").strategies == {
        "gather": "index_select",
        "gemm": "torch",
        "grad_columns": "thin_first",
        "write": "index_copy",
        "quantised": "exact",
        "graph": "eager",
    }
    backend = paca.set_backend("cpu", gather="one_hot", graph="compile")
    assert backend.ops.gather is strategies.gather_one_hot
    assert backend.graph_mode is GraphMode.COMPILE


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_default_is_one_of_the_choices_and_has_a_name(name):
    backend = registry._load(name)
    for kind, known in backend.choices.items():
        in_use = [c for c, sets in known.items() if all(getattr(backend.default_ops, f) is v for f, v in sets.items())]
        assert in_use, f"{kind} of {name} has a default that no choice names"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"gather": "one_hat"}, "no gather named 'one_hat'; did you mean 'one_hot'.*index_select, one_hot"),
        ({"gathr": "one_hot"}, "no strategy named 'gathr'; did you mean 'gather'"),
        ({"graph": "lazy"}, "no graph named 'lazy'.*eager, compile"),
    ],
)
def test_an_unknown_strategy_lists_the_known_and_the_nearest(chosen, message):
    with pytest.raises(ValueError, match=message):
        paca.set_backend("cpu", **chosen)


def test_a_layer_keeps_the_backend_it_was_made_with(third_party):
    paca.set_backend("dummy", gather="one_hot")
    layer = paca.PacaLayer(torch.nn.Linear(4, 4), "layer", paca.get_backend())
    paca.set_backend("cpu")
    assert layer.adapted.ops.gather is strategies.gather_one_hot


def test_compile_mode_compiles():
    module = torch.nn.Linear(2, 2)
    assert paca.set_backend("cpu").capture(module) is module
    assert paca.set_backend("cpu", graph="compile").capture(module) is not module


def test_memory_is_reported_and_its_peak_can_be_reset():
    backend: Backend = paca.set_backend("cpu")
    backend.reset_peak_memory()
    low = backend.memory()
    block = torch.ones(64 * 2**20 // 4)
    high = backend.memory()
    assert low.limit == high.limit > high.peak >= high.allocated > 0
    assert high.peak - low.peak > 48 * 2**20
    del block
    backend.reset_peak_memory()
    assert backend.memory().peak < high.peak


def test_no_usable_backend_is_said_with_every_reason(monkeypatch, install):
    monkeypatch.setattr(registry, "BUILT_IN", {"cpu": "paca_is_not_on_the_path:CPUBackend"})
    install([])
    with pytest.raises(paca.BackendUnavailableError, match=r"cpu: it cannot be imported: .*paca_is_not_on_the_path"):
        paca.get_backend()
