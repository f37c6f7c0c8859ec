"""What a dry run says of parameters and memory is what a real model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paca.estimate import estimate
from paca.recipe import Recipe, read_recipe
from paca.training import adapter_config

LENGTH, SEQUENCES = 64, 4


def recipe_for(model: Path, *words: str) -> Recipe:
    size = ("--per_device_train_batch_size", str(SEQUENCES))
    return read_recipe(None, ["--model_name_or_path", str(model), "--output_dir", "out", "--r", "4", *size, *words])


def real_model(recipe: Recipe) -> Any:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(recipe.run.model_name_or_path)
    return get_peft_model(base, adapter_config(recipe)).train()


def bytes_kept(model: Any, padded: bool) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0 if padded else 1
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


@pytest.mark.parametrize("packing", [True, False])
def test_counts_and_bytes_are_those_of_the_real_model(llama: Path, packing: bool) -> None:
    from transformers import AutoConfig

    recipe = recipe_for(llama, "--packing", str(packing), "--rank_pattern", "{q_proj: 2, k_proj: 2, v_proj: 2}")
    told = estimate(recipe, AutoConfig.from_pretrained(llama), LENGTH)
    model = real_model(recipe)
    trainable, total = model.get_nb_trainable_parameters()
    assert (told.trainable, told.total) == (trainable, total)
    assert told.weights == 4 * (total - trainable)
    assert told.columns == told.deltas == told.gradients == 4 * trainable
    assert told.optimizer == 8 * trainable
    assert told.activations == bytes_kept(model, padded=not packing and not told.remark)


def test_a_lower_dtype_and_checkpointing_take_less(llama: Path) -> None:
    from transformers import AutoConfig

    def told(*words: str) -> Any:
        return estimate(recipe_for(llama, *words), AutoConfig.from_pretrained(llama), LENGTH)

    plain, half, checkpointed = told(), told("--dtype", "bfloat16"), told("--gradient_checkpointing")
    assert half.weights * 2 == plain.weights
    assert half.columns * 2 == plain.columns
    assert half.deltas == plain.deltas  # float32 always
    assert checkpointed.activations < plain.activations
    assert told("--optim", "sgd").optimizer == 0


def test_a_model_that_cannot_be_run_on_shapes_is_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("needs values")

    monkeypatch.setattr(LlamaForCausalLM, "forward", look)
    told = estimate(recipe_for(llama), AutoConfig.from_pretrained(llama), LENGTH)
    assert told.activations is None
    assert "not estimated, at 4 x 64 tokens (RuntimeError: needs values)" in "\n".join(told.lines())


def test_columns_by_calibration_are_estimated_without_data(llama: Path) -> None:
    from transformers import AutoConfig

    recipe = recipe_for(llama, "--selection", "gradient_norm")
    assert estimate(recipe, AutoConfig.from_pretrained(llama), LENGTH).trainable > 0
