"""PEFT's verbs do to a PaCA model what they do to a LoRA model: every test here runs on both."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

import paca


def lora(**given):
    bias = given.pop("bias", "none").replace("paca", "lora")
    renamed = {"lora_alpha": given.pop("paca_alpha", 8), "init_lora_weights": given.pop("init_weights", True)}
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **renamed, **given}, bias=bias
    )


METHODS = {"LoRA": lora, "PaCA": tiny.config}
ADAPTER_TENSORS = {"LoRA": 2, "PaCA": 1}  # trained tensors of an adapted layer


@pytest.fixture(params=list(METHODS))
def method(request):
    return request.param


@pytest.fixture
def adapt(method):
    """Adapt a tiny Llama, or the model that is given."""

    def make(model=None, adapter_name="default", **given):
        return get_peft_model(tiny.llama() if model is None else model, METHODS[method](**given), adapter_name)

    return make


def adapted_modules(model) -> set[str]:
    """The names, in the base model, of the layers that were adapted."""
    suffixes = (".lora_A", ".paca_delta")
    inside = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(suffixes)}
    return {name.removeprefix("base_model.model.") for name in inside}


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def disturb(model, adapter="default", seed=3) -> None:
    """Give an adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".lora_B.{adapter}" in name or name.endswith(f".paca_delta.{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


# ---------------------------------------------------------------------------------------------- which layers

ALL = {
    f"model.layers.{i}.{name}"
    for i in (0, 1)
    for name in (*(f"self_attn.{a}" for a in tiny.ATTENTION), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
}
TARGETS = {
    "all-linear": ({"target_modules": "all-linear"}, ALL),
    "list": ({"target_modules": ["q_proj", "down_proj"]}, {n for n in ALL if n.endswith(("q_proj", "down_proj"))}),
    "full name": ({"target_modules": ["model.layers.1.mlp.up_proj"]}, {"model.layers.1.mlp.up_proj"}),
    "regex": (
        {"target_modules": r".*\.0\..*(q|v)_proj"},
        {n for n in ALL if ".0." in n and n[-6:] in ("q_proj", "v_proj")},
    ),
    "architecture's usual": ({"target_modules": None}, {n for n in ALL if n.endswith(("q_proj", "v_proj"))}),
    "exclude list": ({"exclude_modules": ["o_proj"]}, {n for n in ALL if not n.endswith("o_proj")}),
    "exclude regex": ({"exclude_modules": r".*\.mlp\..*"}, {n for n in ALL if ".mlp." not in n}),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {"model.layers.1.self_attn.q_proj"}),
    "layer zero": (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"model.layers.0.self_attn.q_proj"},
    ),
    "layer list": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["layers"]},
        {n for n in ALL if n.endswith("q_proj")},
    ),
}


@pytest.mark.parametrize("given", TARGETS, ids=str)
def test_the_layers_that_a_config_names_are_adapted(adapt, given):
    settings, expected = TARGETS[given]
    assert adapted_modules(adapt(**settings)) == expected


def test_only_adapter_tensors_train(adapt, method):
    model = adapt()
    assert len(trainable(model)) == ADAPTER_TENSORS[method] * len(ALL)
    assert all(".lora_" in name or ".paca_delta." in name for name in trainable(model))


def test_a_model_without_matching_layers_is_an_error(adapt):
    with pytest.raises(ValueError, match=r"Target modules .*no_such_proj.* not found in the base model"):
        adapt(target_modules=["no_such_proj"])


def test_a_string_target_with_layers_to_transform_is_an_error(method):
    with pytest.raises(ValueError, match="`layers_to_transform` cannot be used when `target_modules` is a str"):
        METHODS[method](target_modules="all-linear", layers_to_transform=[0])


def test_layers_pattern_without_layers_to_transform_is_an_error(method):
    with pytest.raises(ValueError, match="When `layers_pattern` is specified"):
        METHODS[method](target_modules=["q_proj"], layers_pattern="layers")


def test_rank_and_alpha_patterns_pick_ranks_and_scales_by_name(adapt):
    model = adapt(rank_pattern={"down_proj": 6, r".*\.1\..*q_proj": 2}, alpha_pattern={"down_proj": 3, "q_proj": 5})
    for name in ALL:
        layer = model.get_submodule(f"base_model.model.{name}")
        rank = 6 if name.endswith("down_proj") else 2 if name.endswith("1.self_attn.q_proj") else 4
        alpha = 3 if name.endswith("down_proj") else 5 if name.endswith("q_proj") else 8
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == alpha / rank


# ---------------------------------------------------------------------------------------------- other trained parts


def test_modules_to_save_train_in_full_and_are_switched_with_the_adapter(adapt):
    model = adapt(target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = tiny.logits(model)
    assert any("lm_head.modules_to_save.default" in name for name in trainable(model))
    tiny.train(model)
    assert not torch.equal(tiny.logits(model), base)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
    saved = get_peft_model_state_dict(model)
    assert "base_model.model.lm_head.weight" in saved


@pytest.mark.parametrize("bias", ["none", "all", "paca_only"])
def test_bias_says_which_biases_train(method, bias):
    model = get_peft_model(tiny.mlp(), METHODS[method](target_modules=["first"], bias=bias, task_type=None))
    found = {name.replace(".base_layer", "").split(".")[-2] for name in trainable(model) if name.endswith(".bias")}
    assert found == {"none": set(), "all": {"first", "last"}, "paca_only": {"first"}}[bias]
    x = torch.randn(6, 10)
    model(x).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if n.endswith(".bias") and p.requires_grad
    )
    saved = [key for key in get_peft_model_state_dict(model) if key.endswith(".bias")]
    assert len(saved) == len(found)


# ---------------------------------------------------------------------------------------------- reports


def test_layer_and_model_status_read_the_same(adapt):
    model = adapt(target_modules=["q_proj"])
    model.add_adapter("other", model.peft_config["default"].__class__(target_modules=["q_proj", "v_proj"], r=4))
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.num_adapter_layers == 4
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert set(layers) == {f"model.model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")}
    assert layers["model.model.layers.0.self_attn.v_proj"].available_adapters == ["other"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_trainable_parameters_are_counted(adapt, capsys):
    model = adapt()
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- effects


def test_a_fresh_adapter_changes_nothing(adapt):
    base = tiny.logits(tiny.llama())
    assert torch.equal(tiny.logits(adapt()), base)


def test_training_lowers_the_loss_and_changes_the_adapter_only(adapt):
    model = adapt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pristine = {k: v.clone() for k, v in model.get_base_model().state_dict().items() if "base_layer" in k}
    losses = tiny.train(model, steps=5)
    assert losses[-1] < losses[0]
    assert all(
        not torch.equal(p, before[name])
        for name, p in model.named_parameters()
        if ".paca_delta." in name or ".lora_B." in name
    )
    assert tiny.same_bits({k: v for k, v in model.get_base_model().state_dict().items() if "base_layer" in k}, pristine)


def test_disabled_adapters_leave_the_base_model(adapt):
    base = tiny.logits(tiny.llama())
    model = adapt()
    tiny.train(model)
    adapted = tiny.logits(model)
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
        assert torch.equal(tiny.logits(model, training=True), base)
    assert torch.equal(tiny.logits(model), adapted)


def test_the_adapters_of_a_model_are_switched_added_and_deleted(adapt, method):
    base = tiny.logits(tiny.llama())
    model = adapt()
    disturb(model)
    first = tiny.logits(model)
    model.add_adapter("other", METHODS[method](target_modules=["q_proj", "up_proj"]))
    assert torch.equal(tiny.logits(model), first)
    disturb(model, "other", seed=4)
    model.set_adapter("other")
    other = tiny.logits(model)
    assert not torch.equal(other, first)
    assert not torch.equal(other, base)
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith((".other", ".other.weight"))}
    model.set_adapter("default")
    assert torch.equal(tiny.logits(model), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert torch.equal(tiny.logits(model), other)
    assert not any(".default" in name for name in model.state_dict())


def test_deleting_the_active_adapter_makes_another_one_active(adapt, method):
    model = adapt()
    disturb(model)
    first = tiny.logits(model)
    model.add_adapter("other", METHODS[method]())
    disturb(model, "other", seed=4)
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="other was active which is now deleted. Setting active adapter to default"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(tiny.logits(model), first)


def test_merge_acts_like_the_adapter_and_unmerge_undoes_it(adapt):
    model = adapt()
    disturb(model)
    live = tiny.logits(model)
    with model.disable_adapter():
        base = tiny.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), live)
    model.unmerge_adapter()
    torch.testing.assert_close(tiny.logits(model), live)
    with model.disable_adapter():
        torch.testing.assert_close(tiny.logits(model), base)


def test_merge_and_unload_gives_a_plain_model_that_acts_like_the_adapter(adapt):
    model = adapt()
    disturb(model)
    live = tiny.logits(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(tiny.llama())
    assert plain.state_dict().keys() == tiny.llama().state_dict().keys()
    torch.testing.assert_close(tiny.logits(plain), live)


def test_merging_one_of_two_adapters_leaves_out_the_other(adapt, method):
    """Layers that only the other adapter has go back to their pretrained weights."""
    model = adapt(target_modules=["q_proj"])
    disturb(model)
    model.add_adapter("other", METHODS[method](target_modules=["up_proj"]))
    disturb(model, "other", seed=4)
    model.set_adapter("other")
    other = tiny.logits(model)
    model.set_adapter("default")
    torch.testing.assert_close(tiny.logits(model.merge_and_unload(adapter_names=["other"])), other)


def test_unload_gives_the_base_model(adapt):
    model = adapt()
    disturb(model)
    tiny.logits(model)
    assert tiny.same_bits(model.unload().state_dict(), tiny.llama().state_dict())


def test_safe_merge_refuses_values_that_are_not_finite(adapt):
    model = adapt(target_modules=["q_proj"])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".lora_B." in n or ".paca_delta." in n)[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)


def test_several_active_adapters_add_up_like_merging_them_all(adapt, method):
    model = adapt()
    disturb(model)
    model.add_adapter("other", METHODS[method](target_modules=["q_proj", "o_proj", "down_proj"]))
    disturb(model, "other", seed=4)
    alone = tiny.logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = tiny.logits(model)
    assert not torch.allclose(both, alone)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(tiny.logits(model), both)


def test_a_weighted_adapter_of_one_scales_it(adapt):
    """W0 + 0.5·(W' − W0), seen in the merged weight."""
    model = adapt(target_modules=["q_proj"])
    disturb(model)
    model.add_weighted_adapter(["default"], [0.5], "weaker")
    assert "weaker" in model.peft_config
    full, half = (
        module.get_delta_weight(name)
        for module in [model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")]
        for name in ("default", "weaker")
    )
    torch.testing.assert_close(half, 0.5 * full)
    assert full.abs().max() > 0.1


def test_a_layer_s_scale_can_be_changed_and_set_back(adapt):
    model = adapt(target_modules=["lm_head"])
    disturb(model)
    live = tiny.logits(model)
    with model.disable_adapter():
        base = tiny.logits(model)
    layer = model.get_submodule("base_model.model.lm_head")
    for change, undo in (
        (lambda: layer.scale_layer(0.5), lambda: layer.unscale_layer(0.5)),
        (lambda: layer.scale_layer(0.5), lambda: layer.unscale_layer()),
        (lambda: layer.set_scale("default", 0.5), lambda: layer.set_scale("default", 1)),
    ):
        change()
        torch.testing.assert_close(tiny.logits(model), base + 0.5 * (live - base))
        undo()
        torch.testing.assert_close(tiny.logits(model), live)


# ---------------------------------------------------------------------------------------------- copies and casts


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_the_same_model_and_trains_alone(adapt, copied):
    model = adapt()
    disturb(model)
    live = tiny.logits(model)
    twin = copied(model)
    assert torch.equal(tiny.logits(twin), live)
    tiny.train(twin)
    assert not torch.equal(tiny.logits(twin), live)
    assert torch.equal(tiny.logits(model), live)


def test_a_cast_model_computes_in_its_new_dtype(adapt):
    model = adapt()
    disturb(model)
    live = tiny.logits(model)
    model.to(torch.bfloat16)
    assert tiny.logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(tiny.logits(model).float(), live, atol=0.05, rtol=0.05)
    model.float()
    torch.testing.assert_close(tiny.logits(model), live, atol=0.05, rtol=0.05)


def test_a_float32_adapter_is_made_for_a_bfloat16_model_unless_told_otherwise(method):
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(tiny.llama(torch.bfloat16), METHODS[method](), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert tiny.train(model)[-1] > 0


def test_an_injected_adapter_works_without_a_peft_model(method):
    model = inject_adapter_in_model(METHODS[method](target_modules=["q_proj"]), tiny.llama())
    assert type(model) is type(tiny.llama())
    base = tiny.logits(tiny.llama())
    assert torch.equal(tiny.logits(model), base)
    tiny.train(model)
    assert not torch.equal(tiny.logits(model), base)


def test_an_injected_adapter_takes_its_layers_from_a_state_dict(method):
    source = inject_adapter_in_model(METHODS[method](target_modules=["up_proj"]), tiny.llama())
    state = get_peft_model_state_dict(source)
    target = inject_adapter_in_model(METHODS[method](target_modules=["up_proj"]), tiny.llama(), state_dict=state)
    assert get_peft_model_state_dict(target).keys() == state.keys()


def test_generation_uses_the_adapter(adapt):
    model = adapt()
    disturb(model, seed=9)
    prompt = {"input_ids": tiny.tokens(1), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    with_adapter = model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    with model.disable_adapter():
        without = model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert torch.equal(without, tiny.llama().generate(**prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False))
    assert not torch.equal(with_adapter, without)


def test_a_base_model_named_like_a_prefix_stays_frozen(method):
    """Published PaCA found its parameters by the substring `paca_`."""
    base = nn.ModuleDict({"alpaca_head": nn.Linear(4, 4), "lora_like": nn.Linear(4, 4), "target": nn.Linear(4, 4)})
    model = get_peft_model(base, METHODS[method](target_modules=["target"], r=2, task_type=None))
    assert not any("alpaca_head" in name or "lora_like" in name for name in trainable(model))
    assert not any("alpaca_head" in name or "lora_like" in name for name in get_peft_model_state_dict(model))


def test_the_type_of_the_result_is_the_task_s(adapt):
    model = adapt()
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert isinstance(model, PeftModel)


def test_paca_is_what_peft_calls_it():
    assert tiny.config().peft_type == "PACA"
    assert tiny.config().peft_type.value == "PACA"
    assert type(tiny.adapted(tiny.llama()).base_model) is paca.PacaModel
