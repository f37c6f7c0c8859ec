"""What a dry run says of parameters and memory is what a real model has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from paca.estimate.prediction import estimate
from paca.recipe import Recipe, read_recipe
from paca.training import adapter_config

LENGTH, SEQUENCES = 64, 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of two layers."""
    from tiny_models import llama

    folder = tmp_path_factory.mktemp("models") / "llama"
    llama(max_position_embeddings=256).save_pretrained(folder)
    return folder


def recipe_for(model: Path, *words: str) -> Recipe:
    size = ("--per_device_train_batch_size", str(SEQUENCES))
    return read_recipe(None, ["--model_name_or_path", str(model), "--output_dir", "out", "--r", "4", *size, *words])


def told(model: Path, *words: str) -> Any:
    from transformers import AutoConfig

    return estimate(recipe_for(model, *words), AutoConfig.from_pretrained(model), LENGTH)


def test_counts_are_those_of_the_real_model(llama: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    words = ("--rank_pattern", "{q_proj: 2, k_proj: 2, v_proj: 2}")
    found, base = told(llama, *words), AutoModelForCausalLM.from_pretrained(llama)
    model = get_peft_model(base, adapter_config(recipe_for(llama, *words)))
    trainable, total = model.get_nb_trainable_parameters()
    assert (found.trainable, found.total) == (trainable, total)
    use = found.memory.at_peak
    assert use["adapter"] == 4 * trainable
    assert use["optimizer"] == 8 * trainable
    assert abs(use["weights"] - 4 * (total - trainable)) < 1000  # and the rotary frequencies


def test_a_lower_dtype_and_checkpointing_take_less(llama: Path) -> None:
    plain, half, checkpointed = told(llama), told(llama, "--dtype", "bfloat16"), told(llama, "--gradient_checkpointing")
    assert half.memory.at_peak["weights"] < 0.51 * plain.memory.at_peak["weights"]
    assert half.memory.at_peak["adapter"] == plain.memory.at_peak["adapter"]  # float32 always
    assert checkpointed.memory.kept < plain.memory.kept
    assert checkpointed.memory.peak < plain.memory.peak
    assert told(llama, "--optim", "sgd").memory.at_peak["optimizer"] == 0


def test_quantised_weights_take_a_quarter_and_keep_no_columns(llama: Path) -> None:
    dense, quantised = (told(llama, "--quantization", kind).memory.at_peak for kind in ("none", "nf4"))
    assert quantised["weights"] < 0.5 * dense["weights"]  # embeddings and head stay as they are
    assert quantised["columns"] < dense["columns"]


def test_copies_in_float8_count_as_weights(llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama)
    targets = [module for module in base.modules() if isinstance(module, nn.Linear) and module is not base.lm_head]
    copies = sum(2 * linear.weight.numel() + 4 * sum(linear.weight.shape) for linear in targets)
    for residency, more in (("resident", copies), ("swap", 0)):
        plain = recipe_for(llama, "--residency", residency)
        float8 = replace(plain, run=replace(plain.run, strategies={"gemm": "fp8"}))  # refused where no backend has it
        found = [estimate(recipe, AutoConfig.from_pretrained(llama), LENGTH) for recipe in (plain, float8)]
        weights = [one.memory.at_peak["weights"] for one in found if one.memory is not None]
        assert weights[1] - weights[0] == more


def test_gradients_of_earlier_batches_are_there_all_the_time(llama: Path) -> None:
    once, twice = told(llama), told(llama, "--gradient_accumulation_steps", "2")
    assert once.memory.stages["forward"].get("gradients", 0) == 0
    assert twice.memory.stages["forward"]["gradients"] == 4 * twice.trainable


def test_what_trains_in_full_is_counted_with_the_copy_beside_it(llama: Path) -> None:
    plain, saved = told(llama), told(llama, "--modules_to_save", "lm_head")
    head = saved.trainable - plain.trainable
    assert head > 0
    assert saved.memory.at_peak["adapter"] - plain.memory.at_peak["adapter"] == 4 * head
    assert saved.memory.at_peak["weights"] == plain.memory.at_peak["weights"]


def test_a_model_that_cannot_be_run_on_shapes_is_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("needs values")

    monkeypatch.setattr(LlamaForCausalLM, "forward", look)
    found = told(llama)
    assert found.memory is None
    assert "at 4 x 64 tokens: not estimated (RuntimeError: needs values)" in "\n".join(found.lines())


def test_columns_by_calibration_are_estimated_without_data(llama: Path) -> None:
    assert told(llama, "--selection", "gradient_norm").trainable > 0


def test_a_dry_run_prints_parts_that_add_up(llama: Path) -> None:
    found = told(llama)
    printed = found.lines()
    assert printed[0].startswith(f"trainable params: {found.trainable:,} || ")
    assert f"{found.layers} layers adapted" in printed[1]
    assert sum(found.memory.at_peak.values()) == found.memory.peak
