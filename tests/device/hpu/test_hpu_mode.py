"""What a machine or a process lacks is said before anything of the vendor's is imported, with the remedy."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_models import adapted, layers_of, mlp

import paca
from paca_hpu import HPUBackend, bridge, trainers


def test_without_the_vendors_software_the_backend_says_where_it_comes_from(monkeypatch):
    monkeypatch.setattr(bridge, "find_spec", lambda name: None)
    with pytest.raises(paca.BackendUnavailableError, match=r"habana_frameworks is not installed; .*docs/gaudi.md"):
        paca.set_backend("hpu")


@pytest.fixture
def no_import(monkeypatch):
    """The vendor's software is there, and importing it is a mistake."""

    def refuse(name):
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(bridge, "find_spec", lambda name: object())
    monkeypatch.setattr(bridge, "import_module", refuse)


@pytest.mark.parametrize("mode", ["2", "", "yes"])
def test_a_wrong_mode_is_refused_before_the_bridge_is_imported(monkeypatch, no_import, mode):
    monkeypatch.setenv(bridge.MODE, mode)
    with pytest.raises(paca.BackendUnavailableError, match=rf"PT_HPU_LAZY_MODE is '{mode}'; set it to 0 .*or 1 "):
        paca.set_backend("hpu")


def test_a_mode_that_came_too_late_is_refused(monkeypatch):
    internal = ModuleType("internal")
    internal.is_lazy = lambda: False
    monkeypatch.setenv(bridge.MODE, "1")
    monkeypatch.setattr(bridge, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch", ModuleType("habana_frameworks.torch"))
    monkeypatch.setattr(bridge, "import_module", lambda name: internal)
    with pytest.raises(paca.BackendUnavailableError, match="set it in the environment before Python starts"):
        paca.set_backend("hpu")


@pytest.mark.parametrize("upstream", ["", ".upstream"])
@pytest.mark.parametrize(("wanted", "loaded"), [("0", ""), ("0", "2"), ("1", ""), ("1", "2")])
def test_what_the_bridge_has_loaded_counts_not_what_the_variable_says_since(
    monkeypatch, tmp_path, wanted, loaded, upstream
):
    internal = ModuleType("internal")
    internal.is_lazy = lambda: wanted != "0"  # the bridge's own answer reads the variable again
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 0 08:01 9 /usr/lib/libhabana_pytorch{loaded}_plugin{upstream}.so\n")
    monkeypatch.setattr(bridge, "_LOADED", maps)
    monkeypatch.setenv(bridge.MODE, wanted)
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch", ModuleType("habana_frameworks.torch"))
    monkeypatch.setattr(bridge, "import_module", lambda name: internal)
    lazy = loaded == ""
    assert (bridge.why_wrong_mode() is None) == (lazy == (wanted == "1"))


def test_the_mode_is_set_to_the_vendors_default_where_nobody_has(monkeypatch):
    monkeypatch.delenv(bridge.MODE, raising=False)
    assert bridge.why_wrong_mode() is None
    assert not bridge.is_lazy()
    import os

    assert os.environ.pop(bridge.MODE) == "0"


@pytest.mark.parametrize(
    ("mode", "graphs", "refused"),
    [("0", ["eager", "compile"], ["lazy", "hpu_graphs"]), ("1", ["lazy", "hpu_graphs"], ["eager", "compile"])],
)
def test_a_process_has_the_graph_modes_of_its_mode_and_says_how_to_get_the_others(monkeypatch, mode, graphs, refused):
    monkeypatch.setenv(bridge.MODE, mode)
    monkeypatch.setattr(HPUBackend, "why_unavailable", classmethod(lambda cls: None))
    assert paca.set_backend("hpu").strategies["graph"] == graphs[0]
    for graph in graphs:
        assert paca.set_backend("hpu", graph=graph).graph_mode.value == graph
    for graph in refused:
        other = 1 - int(mode)
        with pytest.raises(paca.BackendUnavailableError, match=f"needs PT_HPU_LAZY_MODE={other}.*before Python starts"):
            paca.set_backend("hpu", graph=graph)


def test_columns_are_written_before_a_model_is_recorded(monkeypatch):
    def written(model):
        return [layer.adapted._is_written(layer.held_adapters()) for layer in layers_of(model)]

    def model_cacher(max_graphs):
        def record(model, inplace):
            recorded.append(written(model))
            return model

        return record

    recorded = []
    monkeypatch.setenv(bridge.MODE, "1")
    monkeypatch.setattr(HPUBackend, "why_unavailable", classmethod(lambda cls: None))
    monkeypatch.setattr(bridge, "hpu", lambda: SimpleNamespace(ModuleCacher=model_cacher))
    backend = paca.set_backend("hpu", graph="hpu_graphs")
    model = adapted(mlp(), task_type=None)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.paca_delta["default"].add_(0.5)
    assert not any(written(model))
    assert backend.capture(model) is model
    assert recorded == [[True, True]]


def test_no_layer_is_a_linear_which_fp8_conversion_would_replace_without_a_word():
    assert layers_of(model := adapted(mlp(), task_type=None))
    assert not any(isinstance(layer, torch.nn.Linear) for layer in layers_of(model))


def test_hpu_graphs_are_refused_where_the_trainer_cannot_record_them(monkeypatch):
    monkeypatch.setenv(bridge.MODE, "1")
    monkeypatch.setattr(HPUBackend, "why_unavailable", classmethod(lambda cls: None))
    monkeypatch.setattr(trainers, "why_not_gaudi_trainer", lambda: "optimum-habana is not installed")
    paca.set_backend("hpu", graph="hpu_graphs")
    with pytest.raises(paca.BackendUnavailableError, match=r"needs GaudiTrainer, and optimum-habana is not installed"):
        paca.trainer_class()
    paca.set_backend("hpu", graph="lazy")
    assert paca.trainer_class().__module__ == "transformers.trainer"


def test_a_broken_installation_is_a_reason_and_no_crash(monkeypatch):
    def fail(name):
        raise OSError("libSynapse.so: cannot open shared object file")

    monkeypatch.setenv(bridge.MODE, "0")
    monkeypatch.setattr(bridge, "find_spec", lambda name: object())
    monkeypatch.setattr(bridge, "import_module", fail)
    assert "cannot be imported: libSynapse.so" in paca.available_backends()["hpu"]


def test_the_rehearsal_is_never_chosen_by_itself():
    assert paca.available_backends()["hpu-rehearsal"] is None
    assert paca.get_backend().name == "cpu"


@pytest.mark.parametrize("mode", ["0", "1"])
def test_the_rehearsal_names_the_mode_that_stands_in_for_hpu_graphs(monkeypatch, mode):
    monkeypatch.setenv(bridge.MODE, mode)
    with pytest.raises(paca.BackendUnavailableError, match=r"only a Gaudi records HPU graphs; .*graph='lazy'"):
        paca.set_backend("hpu-rehearsal", graph="hpu_graphs")
