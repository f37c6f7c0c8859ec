"""Rows of one batch use different adapters, and each gets what it would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ["default", "other", "__base__"]


def two_adapters(base: Any, **given: Any) -> Any:
    """A model with two trained adapters of different columns and ranks; the second on fewer layers."""
    model = tiny.perturb(tiny.adapted(base, **given), std=0.2)
    model.add_adapter(
        "other", tiny.config(random_seed=9, r=7, target_modules=["q_proj", "down_proj", "c_attn"], **given)
    )
    tiny.perturb(model, "other", seed=1, std=0.2)
    return model.eval()


@torch.no_grad()
def alone(model: Any, name: str, rows: torch.Tensor) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=rows).logits
    model.set_adapter(name)
    return model(input_ids=rows).logits


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6))
def test_each_row_gets_what_its_adapter_gives_it_alone(names: list[str]) -> None:
    model = two_adapters(tiny.llama(torch.float64))
    rows = tiny.tokens(rows=len(names))
    wanted = {name: alone(model, name, rows) for name in NAMES}
    with torch.no_grad():
        found = model(input_ids=rows, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], wanted[name][row], atol=1e-12, rtol=0)


@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_each_group_of_rows_the_bits_of_its_adapter(residency: str, dtype: torch.dtype) -> None:
    model = two_adapters(tiny.llama(dtype), residency=residency)
    layer = next(layer for layer in tiny.layers_of(model) if len(layer.paca_delta) == 2)
    x = torch.randn(6, 5, layer.in_features, dtype=dtype)
    names = ["default", "other", "default", "__base__", "other", "default"]
    wanted = {}
    with torch.no_grad():
        for name in NAMES:
            own = x[[row for row, other in enumerate(names) if other == name]]
            if name == "__base__":
                with model.disable_adapter():
                    wanted[name] = layer(own)
            else:
                model.set_adapter(name)
                wanted[name] = layer(own)
        with model.base_model._enable_peft_forward_hooks(adapter_names=names):
            found = layer(x)
    for name in NAMES:
        assert torch.equal(found[[row for row, other in enumerate(names) if other == name]], wanted[name])


def test_conv1d_layers_mix_too() -> None:
    model = two_adapters(tiny.gpt2())
    rows = tiny.tokens(rows=3)
    with torch.no_grad():
        found = model(input_ids=rows, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row], alone(model, name, rows)[row], atol=1e-5, rtol=0)


def test_afterwards_the_model_is_as_before() -> None:
    model = two_adapters(tiny.llama())
    model.set_adapter("other")
    before, memory = tiny.logits(model), tiny.weights_of(model)
    with torch.no_grad():
        model(input_ids=tiny.tokens(), adapter_names=NAMES)
    assert tiny.same_bits(tiny.weights_of(model), memory)
    with pytest.raises(ValueError, match=r"should be the same as the number of inputs, but got 2 and 3"):
        model(input_ids=tiny.tokens(), adapter_names=NAMES[:2])
    assert tiny.same_bits(tiny.weights_of(model), memory)
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_mixes_adapters_with_and_without_beams(beams: int) -> None:
    model = two_adapters(tiny.llama(torch.float64))
    rows = tiny.tokens(rows=3)
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(rows)}
    found = model.generate(input_ids=rows, adapter_names=NAMES, **how)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                wanted = model.generate(input_ids=rows, **how)
        else:
            model.set_adapter(name)
            wanted = model.generate(input_ids=rows, **how)
        assert torch.equal(found[row], wanted[row]), name


def test_modules_to_save_follow_their_rows() -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(torch.float64), modules_to_save=["lm_head"]))
    model.add_adapter("other", tiny.config(random_seed=9, modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["other"].weight.mul_(2)
    model.eval()
    rows = tiny.tokens(rows=3)
    with torch.no_grad():
        found = model(input_ids=rows, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row], alone(model, name, rows)[row], atol=1e-12, rtol=0)


def test_what_cannot_be_mixed_is_refused() -> None:
    model = two_adapters(tiny.llama())
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(input_ids=tiny.tokens(), adapter_names=["default", "other", "nobody"])
    with pytest.raises(ValueError, match="must be a list with one name for each row"):
        model(input_ids=tiny.tokens(), adapter_names="default")
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        model(input_ids=tiny.tokens(), adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(input_ids=tiny.tokens(), adapter_names=NAMES)
