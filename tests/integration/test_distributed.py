"""Two processes over gloo train what one process trains, replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import tiny_models as tiny
import torch
from peft import PeftModel, get_peft_model_state_dict

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FSDP2 = ["fsdp2", "fsdp2_kept"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each scenario; the processes are started once for all tests."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(folder / "adapter")
    paths = [ROOT, ROOT / "backends", ROOT / "tests", ROOT / "tests" / "integration"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", worker.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(worker.RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(worker.RANKS)] for name in worker.SCENARIOS
    } | {"adapter": folder / "adapter"}


def results(found, name):
    """Both ranks' findings of one scenario."""
    for rank in found[name]:
        assert "error" not in rank, rank["error"]
    return found[name]


def alone(model):
    """Train the model here on the whole batch; returns it and its losses."""
    losses = worker.steps(model, slice(None))
    return model, losses


def plain_names(state) -> dict[str, torch.Tensor]:
    return {name.replace("base_model.model.", "").replace(".base_layer", ""): t for name, t in state.items()}


@pytest.mark.parametrize("name", ["ddp", *FSDP2])
def test_two_processes_lose_what_one_loses(found, name):
    _, wanted = alone(tiny.adapted(tiny.llama()))
    halves = [rank["losses"] for rank in results(found, name)]
    assert [sum(pair) / 2 for pair in zip(*halves, strict=True)] == pytest.approx(wanted, rel=1e-5)
    assert wanted[-1] < 0.97 * wanted[0]


@pytest.mark.parametrize("name", ["ddp", "ddp_unseeded", *FSDP2, "fsdp2_bfloat16", "fsdp2_loaded", "fsdp2_at_once"])
def test_both_ranks_hold_the_same_model(found, name):
    one, two = results(found, name)
    assert torch.equal(one["logits"], two["logits"])
    state = "adapter" if "adapter" in one else "state"
    assert tiny.same_bits(one[state], two[state])


def test_ddp_ends_with_the_adapter_of_one_process(found):
    model, _ = alone(tiny.adapted(tiny.llama()))
    for name, wanted in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(results(found, "ddp")[0]["adapter"][name], wanted, atol=1e-5, rtol=1e-3)


def test_ddp_gives_all_ranks_the_columns_of_the_first(found):
    """They had drawn different ones and held them already: what those replaced is put back."""
    one, two = results(found, "ddp_unseeded")
    assert one["drawn"] != two["drawn"]
    indices = [t.tolist() for name, t in two["adapter"].items() if name.endswith("paca_indices")]
    assert sorted(indices) == sorted(one["drawn"])
    for rank in (one, two):
        assert tiny.same_bits(rank["unloaded"], tiny.weights_of(tiny.llama()))


@pytest.mark.parametrize("name", FSDP2)
def test_sharded_weights_are_swapped_without_being_told(found, name):
    assert all(rank["residency"] == {"swap"} for rank in results(found, name))


@pytest.mark.parametrize("name", FSDP2)
def test_fsdp2_ends_with_the_adapter_of_one_process(found, name):
    model, _ = alone(tiny.adapted(tiny.llama()))
    state = results(found, name)[0]["state"]
    for layer in tiny.layers_of(model):
        delta = state[f"base_model.model.{layer.name}.paca_delta.default"]
        torch.testing.assert_close(delta, layer.paca_delta["default"].detach(), atol=1e-5, rtol=1e-3)
        assert delta.abs().max() > 1e-3
    torch.testing.assert_close(results(found, name)[0]["logits"], tiny.logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*FSDP2, "fsdp2_bfloat16", "fsdp2_loaded", "fsdp2_at_once"])
def test_an_fsdp2_state_dict_holds_the_pretrained_weights(found, name):
    dtype = torch.bfloat16 if name == "fsdp2_bfloat16" else torch.float32
    pretrained = tiny.llama(dtype).state_dict()
    for rank in results(found, name):
        state = plain_names(rank["state"])
        assert tiny.same_bits({name: state[name] for name in pretrained}, pretrained)


@pytest.mark.parametrize("name", [*FSDP2, "fsdp2_bfloat16", "fsdp2_loaded", "fsdp2_at_once"])
def test_disabling_an_fsdp2_model_gives_the_base_model(found, name):
    dtype = torch.bfloat16 if name == "fsdp2_bfloat16" else torch.float32
    for rank in results(found, name):
        assert torch.equal(rank["disabled"], tiny.logits(tiny.llama(dtype)))
        if "again" in rank:
            assert torch.equal(rank["again"], rank["logits"])
            assert not torch.equal(rank["again"], rank["disabled"])


def test_a_loaded_adapter_acts_and_trains_on_under_fsdp2(found):
    model = PeftModel.from_pretrained(tiny.llama(), found["adapter"], is_trainable=True)
    before = tiny.logits(model)
    _, losses = alone(model)
    ranks = results(found, "fsdp2_loaded")
    for rank in ranks:
        torch.testing.assert_close(rank["before"], before, atol=1e-5, rtol=1e-5)
    halves = [rank["losses"] for rank in ranks]
    assert [sum(pair) / 2 for pair in zip(*halves, strict=True)] == pytest.approx(losses, rel=1e-5)
    for rank in results(found, "fsdp2_at_once"):
        torch.testing.assert_close(rank["before"], before, atol=1e-5, rtol=1e-5)


def test_disabling_while_no_shard_can_be_written_is_refused_and_not_wrong(found):
    for rank in results(found, "fsdp2_gathered"):
        assert "was sharded while it held adapted columns, and cannot be restored now" in rank["refused"]
        assert "disabled" not in rank


def test_bfloat16_weights_with_float32_deltas_train_under_fsdp2(found):
    model, losses = alone(tiny.adapted(tiny.llama(torch.bfloat16)))
    halves = [rank["losses"] for rank in results(found, "fsdp2_bfloat16")]
    assert [sum(pair) / 2 for pair in zip(*halves, strict=True)] == pytest.approx(losses, rel=1e-2)
    deltas = [t for n, t in results(found, "fsdp2_bfloat16")[0]["state"].items() if ".paca_delta." in n]
    assert {delta.dtype for delta in deltas} == {torch.float32}
    assert len(deltas) == len(tiny.layers_of(model))
