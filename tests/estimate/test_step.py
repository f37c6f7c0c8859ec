"""A step on shapes alone makes, keeps and frees what a real step does, byte for byte."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MambaConfig

import paca
from paca.estimate import step
from paca.estimate.check import put_nf4_in, with_adapters_of
from paca.estimate.layers import quantised_bytes
from paca.estimate.methods import METHODS, Method
from paca.estimate.step import Footprint, Model, Work, footprint, simulate

WORK = Work(
    sequences=2, length=64, padded=False, checkpointing=False, autocast=False, accumulates=False, optim="adamw_fused"
)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
STATIC = ("weights", "columns", "adapter", "optimizer")


def llama(layers: int, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Model:
    wanted = {"r": 8, "paca_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return Model(LlamaConfig(num_hidden_layers=layers, **SIZES), "causal_lm", dtype, paca.PacaConfig(**wanted))


def real(model: Model, method: Method) -> Any:
    base = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    if method.weight_format != "none":
        pytest.importorskip("bitsandbytes")
        put_nf4_in(base, model.dtype, torch.device("cpu"))
    if method.family == "paca":
        return get_peft_model(base, model.settings).train()
    config = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return with_adapters_of(get_peft_model(base, config, autocast_adapter_dtype=not method.low), method, model.dtype)


def real_footprint(model: Model, method: Method, work: Work) -> Footprint:
    ids = torch.zeros(work.sequences, work.length, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if work.padded:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, work.length // 2 :] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return simulate(real(model, method), batch, work, 300, whole=True)


def moving(memory: Footprint) -> dict[str, int]:
    """What a step adds to the model at each stage's highest point."""
    return {
        stage: sum(size for kind, size in use.items() if kind not in STATIC) for stage, use in memory.stages.items()
    }


@pytest.mark.parametrize(
    ("name", "dtype", "change"),
    [
        ("lora", torch.bfloat16, {}),
        ("lora-nocast", torch.bfloat16, {"padded": True}),
        ("paca", torch.bfloat16, {}),
        ("paca", torch.float32, {"padded": True}),
        ("paca", torch.bfloat16, {"checkpointing": True}),
        ("lora", torch.float32, {"checkpointing": True}),
        ("paca", torch.float32, {"autocast": True}),
        ("lora", torch.float32, {"autocast": True, "padded": True}),
        ("paca", torch.bfloat16, {"accumulates": True}),
        ("qpaca", torch.bfloat16, {}),
        ("qpaca", torch.float32, {"checkpointing": True}),
        ("qlora", torch.bfloat16, {}),
        ("qlora-nocast", torch.bfloat16, {"padded": True}),
        ("qpaca", torch.float32, {"autocast": True}),
    ],
    ids=str,
)
def test_shapes_tell_what_a_real_step_takes(name: str, dtype: torch.dtype, change: dict[str, Any]) -> None:
    model, work = llama(2, dtype), replace(WORK, **change)
    told, found = footprint(model, METHODS[name], work), real_footprint(model, METHODS[name], work)
    assert moving(told) == moving(found)
    assert told.kept == found.kept
    assert told.at_peak["adapter"] == found.at_peak["adapter"]


@pytest.mark.parametrize("change", [{}, {"checkpointing": True}, {"autocast": True}], ids=str)
def test_masks_take_what_they_do_on_shapes(change: dict[str, Any]) -> None:
    model, work = llama(2, torch.float32, selection="mask_random"), replace(WORK, **change)
    told, found = footprint(model, METHODS["paca"], work), real_footprint(model, METHODS["paca"], work)
    assert moving(told) == moving(found)
    assert told.kept == found.kept
    assert work.checkpointing or told.kept > footprint(llama(2, torch.float32), METHODS["paca"], work).kept


def test_nf4_weights_take_what_bitsandbytes_stores() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_config(llama(2).config, dtype=torch.bfloat16)
    put_nf4_in(base, torch.bfloat16, torch.device("cpu"))
    layers = [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        state = layer.weight.quant_state
        held = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        told = quantised_bytes("nf4", layer.out_features, layer.in_features)
        assert (layer.weight.nbytes, sum(tensor.nbytes for tensor in held)) == told


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("lora", True), ("paca", False), ("qlora-nocast", False), ("qpaca", True)]
)
def test_a_few_layers_stand_for_all(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    work = replace(WORK, checkpointing=checkpointing)
    told = footprint(llama(5), METHODS[name], work)
    monkeypatch.setattr(step, "_repeats", lambda model: False)
    every_layer = footprint(llama(5), METHODS[name], work)
    assert told.peak == every_layer.peak
    assert told.kept == every_layer.kept


@pytest.mark.parametrize(
    "uneven",
    [
        {"layers_to_transform": [0, 1, 2], "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*layers\.[3-5]\..*up_proj"},
        {"rank_pattern": {"layers.4.mlp.down_proj": 2}},
    ],
    ids=str,
)
def test_layers_that_differ_are_all_run(uneven: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int | None] = []
    original = step._run
    monkeypatch.setattr(step, "_run", lambda *given: run.append(given[3]) or original(*given))
    footprint(llama(6, **uneven), METHODS["paca"], WORK)
    assert run == [None]


def test_an_encoder_can_be_told_too() -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128, num_labels=3
    )
    settings = paca.PacaConfig(r=8, paca_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    work = replace(WORK, padded=True)
    told = {
        name: footprint(Model(config, "sequence_classification", torch.float32, settings), METHODS[name], work)
        for name in ("lora", "paca")
    }
    assert told["paca"].kept < told["lora"].kept
    assert told["paca"].peak < told["lora"].peak


def test_a_model_that_works_out_its_layers_kinds_by_itself_is_cut_short_like_others() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=5, state_size=4)
    settings = paca.PacaConfig(r=4, paca_alpha=4, target_modules=["in_proj", "out_proj"])
    two, three = (Model(config, "causal_lm", torch.float32, settings).sizes(layers)[3] for layers in (2, 3))
    assert three * 2 == two * 3
