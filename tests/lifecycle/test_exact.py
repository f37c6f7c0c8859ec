"""What PaCA promises beyond LoRA: merging, disabling and switching are exact, to the bit, in every dtype."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import paca

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESIDENCIES = ["resident", "swap"]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=RESIDENCIES)
def residency(request):
    return request.param


def two_adapters(dtype=torch.float32, **given):
    """A model with the trained adapters "default" and "other", whose columns overlap in part."""
    model = tiny.adapted(tiny.llama(dtype), r=12, **given)
    model.add_adapter("other", tiny.config(r=12, random_seed=7, **given))
    tiny.perturb(model, "default", seed=3)
    tiny.perturb(model, "other", seed=4)
    for layer in tiny.layers_of(model):
        mine, theirs = (set(layer.paca_indices[name].tolist()) for name in ("default", "other"))
        assert mine & theirs
        assert mine != theirs
    return model


# ---------------------------------------------------------------------------------------------- merging


def test_unmerging_restores_the_base_weight_bit_for_bit(dtype, residency):
    base = tiny.weights_of(tiny.llama(dtype))
    model = tiny.perturb(tiny.adapted(tiny.llama(dtype), residency=residency))
    for _ in range(20):
        model.merge_adapter(safe_merge=True)
        assert not tiny.same_bits(tiny.weights_of(model), base)
        model.unmerge_adapter()
    with model.disable_adapter():
        assert tiny.same_bits(tiny.weights_of(model), base)


def test_the_merged_weight_is_the_live_weight_bit_for_bit(dtype):
    model = tiny.perturb(tiny.adapted(tiny.llama(dtype), residency="resident"))
    live_logits = tiny.logits(model)
    live = tiny.weights_of(model)
    model.merge_adapter()
    assert tiny.same_bits(tiny.weights_of(model), live)
    assert torch.equal(tiny.logits(model), live_logits)
    assert torch.equal(tiny.logits(model, training=True), live_logits)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert tiny.same_bits(tiny.weights_of(plain), live)
    assert torch.equal(tiny.logits(plain), live_logits)


def test_swapped_layers_merge_to_the_bits_of_resident_ones(dtype):
    resident, swapped = (tiny.perturb(tiny.adapted(tiny.llama(dtype), residency=r)) for r in RESIDENCIES)
    assert torch.equal(tiny.logits(resident), tiny.logits(swapped))
    assert tiny.same_bits(tiny.weights_of(resident.merge_and_unload()), tiny.weights_of(swapped.merge_and_unload()))


def test_the_merged_weight_is_the_pretrained_one_plus_the_scaled_delta_rounded_once(dtype, residency):
    base = tiny.weights_of(tiny.llama(dtype))
    model = tiny.perturb(tiny.adapted(tiny.llama(dtype), residency=residency))
    adapters = {
        layer.name: (layer.paca_indices["default"], layer.paca_delta["default"]) for layer in tiny.layers_of(model)
    }
    merged = tiny.weights_of(model.merge_and_unload())
    for name, (index, delta) in adapters.items():
        wanted = base[f"{name}.weight"].clone()
        wanted[:, index] = (wanted[:, index].float() + 2.0 * delta).to(dtype)
        assert torch.equal(merged[f"{name}.weight"], wanted)


def test_unloading_restores_the_base_weight_bit_for_bit(dtype, residency):
    base = tiny.weights_of(tiny.llama(dtype))
    model = tiny.adapted(tiny.llama(dtype), residency=residency)
    tiny.train(model)
    assert tiny.same_bits(tiny.weights_of(model.unload()), base)


def test_unloading_a_merged_model_restores_the_base_weight_bit_for_bit(dtype, residency):
    base = tiny.weights_of(tiny.llama(dtype))
    model = tiny.perturb(tiny.adapted(tiny.llama(dtype), residency=residency))
    model.merge_adapter()
    assert tiny.same_bits(tiny.weights_of(model.unload()), base)


def test_merging_adapters_one_after_the_other_is_merging_them_together(dtype, residency):
    one_by_one, together = two_adapters(dtype, residency=residency), two_adapters(dtype, residency=residency)
    one_by_one.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="You are now additionally merging other"):
        one_by_one.merge_adapter(["other"])
    together.merge_adapter(["default", "other"])
    assert tiny.same_bits(tiny.weights_of(one_by_one), tiny.weights_of(together))
    one_by_one.unmerge_adapter()
    with one_by_one.disable_adapter():
        assert tiny.same_bits(tiny.weights_of(one_by_one), tiny.weights_of(tiny.llama(dtype)))


def test_a_model_unloaded_without_merging_can_be_adapted_again():
    model = tiny.perturb(tiny.adapted(tiny.llama())).unload()
    again = tiny.adapted(model, random_seed=9)
    assert torch.equal(tiny.logits(again), tiny.logits(tiny.llama()))
    losses = tiny.train(again, steps=4)
    assert losses[-1] < losses[0]


def test_a_broken_adapter_is_refused_by_safe_merge_before_anything_is_written(residency):
    base = tiny.weights_of(tiny.llama())
    model = tiny.perturb(tiny.adapted(tiny.llama(), residency=residency))
    with torch.no_grad():
        tiny.layers_of(model)[-1].paca_delta["default"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    with model.disable_adapter():
        found = tiny.weights_of(model)
        broken = f"{tiny.layers_of(model)[-1].name}.weight"
        assert torch.equal(found[broken], base[broken])


# ---------------------------------------------------------------------------------------------- disabling and switching


def test_disabling_restores_the_base_weight_and_enabling_the_adapted_one_bit_for_bit(dtype):
    base = tiny.weights_of(tiny.llama(dtype))
    model = tiny.adapted(tiny.llama(dtype))
    tiny.train(model)
    live = tiny.weights_of(model)
    assert not tiny.same_bits(live, base)
    for _ in range(3):
        with model.disable_adapter():
            assert tiny.same_bits(tiny.weights_of(model), base)
        assert tiny.same_bits(tiny.weights_of(model), live)


def test_switching_leaves_nothing_of_the_other_adapter(dtype, residency):
    model = two_adapters(dtype, residency=residency)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = (tiny.weights_of(model), tiny.logits(model))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        weights, logits = alone[name]
        assert tiny.same_bits(tiny.weights_of(model), weights)
        assert torch.equal(tiny.logits(model), logits)
    assert not torch.equal(alone["default"][1], alone["other"][1])


def test_deleting_an_adapter_leaves_nothing_of_it(dtype, residency):
    model = two_adapters(dtype, residency=residency)
    model.set_adapter("other")
    other = tiny.weights_of(model)
    model.set_adapter("default")
    tiny.logits(model)
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert tiny.same_bits(tiny.weights_of(model), other)
    assert not any("default" in name for name in model.state_dict())
    for layer in tiny.layers_of(model):
        kept = (
            layer.r,
            layer.scaling,
            layer.paca_alpha,
            layer.expected_fingerprint,
            layer.paca_delta,
            layer.paca_indices,
        )
        assert all(list(table) == ["other"] for table in kept)


def test_deleting_the_last_adapter_leaves_the_base_model():
    model = tiny.perturb(tiny.adapted(tiny.llama()))
    tiny.logits(model)
    model.base_model.delete_adapter("default")
    assert tiny.same_bits(tiny.weights_of(model), tiny.weights_of(tiny.llama()))


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient():
    """As DPO does: the policy's forward, the disabled model's forward, then backward."""
    plain, interrupted = (tiny.perturb(tiny.adapted(tiny.llama())).train() for _ in range(2))
    plain(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    loss = interrupted(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
    with interrupted.disable_adapter():
        reference = tiny.logits(interrupted)
    loss.backward()
    assert torch.equal(reference, tiny.logits(tiny.llama()))
    for one, two in zip(tiny.layers_of(plain), tiny.layers_of(interrupted), strict=True):
        assert torch.equal(one.paca_delta["default"].grad, two.paca_delta["default"].grad)


# ---------------------------------------------------------------------------------------------- several at once


def sum_of_deltas(model, names) -> dict[str, torch.Tensor]:
    """The base weights plus every named adapter's dense update, in float64."""
    weights = {name: weight.double() for name, weight in tiny.weights_of(tiny.llama()).items()}
    for layer in tiny.layers_of(model):
        for name in names:
            weights[f"{layer.name}.weight"] += layer.get_delta_weight(name).double()
    return weights


def oracle(weights) -> nn.Module:
    """A float64 model with these weights."""
    model = tiny.llama(torch.float64)
    model.load_state_dict(weights)
    return model


def test_active_adapters_with_overlapping_columns_give_the_sum_of_their_deltas(residency):
    model = two_adapters(residency=residency)
    model.base_model.set_adapter(["default", "other"])
    wanted = tiny.logits(oracle(sum_of_deltas(model, ["default", "other"])))
    torch.testing.assert_close(tiny.logits(model).double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(model, training=True).double(), wanted, atol=1e-5, rtol=1e-5)


def test_each_of_several_active_adapters_gets_its_own_gradient(residency):
    """∂L/∂Δ = s · (∂L/∂W)[:, index], with ∂L/∂W from autograd on a float64 model that holds the sum."""
    model = two_adapters(residency=residency).train()
    model.base_model.set_adapter(["default", "other"])
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    full = oracle(sum_of_deltas(model, ["default", "other"])).train()
    full(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    for layer in tiny.layers_of(model):
        whole = full.get_parameter(f"{layer.name}.weight").grad
        for name in ("default", "other"):
            wanted = layer.scaling[name] * whole[:, layer.paca_indices[name]]
            assert wanted.abs().max() > 0
            torch.testing.assert_close(layer.paca_delta[name].grad.double(), wanted, atol=1e-6, rtol=1e-4)


def test_active_adapters_train_together_like_a_full_copy_of_their_columns():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = tiny.train(model, steps=4)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert len(before) == 2 * len(tiny.layers_of(model))


def test_one_of_two_active_adapters_may_be_frozen():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    frozen = {}
    for layer in tiny.layers_of(model):
        layer.paca_delta["default"].requires_grad_(False)
        frozen[layer.name] = layer.paca_delta["default"].clone()
    losses = tiny.train(model, steps=4)
    assert losses[-1] < losses[0]
    for layer in tiny.layers_of(model):
        assert torch.equal(layer.paca_delta["default"], frozen[layer.name])
        assert layer.paca_delta["default"].grad is None


def test_a_weighted_adapter_is_the_weighted_sum_of_updates(residency):
    model = two_adapters(residency=residency)
    model.add_weighted_adapter(["default", "other"], [0.75, -0.5], "mixed")
    for layer in tiny.layers_of(model):
        wanted = 0.75 * layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("mixed"), wanted)
        union = torch.cat([layer.paca_indices[name] for name in ("default", "other")]).unique()
        assert torch.equal(layer.paca_indices["mixed"], union)
    model.set_adapter("mixed")
    weights = {name: weight.double() for name, weight in tiny.weights_of(tiny.llama()).items()}
    for layer in tiny.layers_of(model):
        weights[f"{layer.name}.weight"] += 0.75 * layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight(
            "other"
        )
    torch.testing.assert_close(tiny.logits(model).double(), tiny.logits(oracle(weights)), atol=1e-5, rtol=1e-5)


def test_a_weighted_adapter_of_different_layers_and_ranks_covers_them_all(tmp_path):
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj"], r=3)
    model.add_adapter("other", tiny.config(target_modules=["q_proj", "up_proj"], r=5, random_seed=1))
    tiny.perturb(model), tiny.perturb(model, "other", seed=4)
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    mixed = tiny.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "mixed")
    assert torch.equal(tiny.logits(loaded), mixed)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(tiny.logits(model), mixed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapters": ["nobody"], "weights": [1.0]}, "Adapter nobody does not exist; there are default, other"),
        ({"adapters": ["default"], "weights": [1.0, 2.0]}, "1 adapters need as many weights, found 2"),
        ({"adapters": [], "weights": []}, "at least one adapter, found none"),
        (
            {"adapters": ["default"], "weights": [1.0], "combination_type": "ties"},
            "must be 'linear' or 'cat', found 'ties'",
        ),
    ],
)
def test_a_weighted_adapter_that_makes_no_sense_is_refused(given, message):
    model = two_adapters()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapter_name="mixed", **given)
    assert list(model.peft_config) == ["default", "other"]


# ------------------------------------------------------------------------------------------ readers of the base weights


def test_state_dicts_hold_the_pretrained_values_while_the_weight_holds_the_adapted_ones():
    base = tiny.llama().state_dict()
    model = tiny.adapted(tiny.llama(), residency="resident")
    tiny.train(model)
    assert not tiny.same_bits(tiny.weights_of(model), tiny.weights_of(tiny.llama()))
    for state in (model.state_dict(), model.get_base_model().state_dict(), model.state_dict(keep_vars=True)):
        found = {
            name.replace("base_model.model.", "").replace(".base_layer", ""): value.detach()
            for name, value in state.items()
            if ".paca_" not in name
        }
        assert tiny.same_bits(found, base)


def test_saving_the_base_model_saves_the_pretrained_values(tmp_path):
    model = tiny.adapted(tiny.llama(), residency="resident")
    tiny.train(model)
    model.get_base_model().save_pretrained(tmp_path)
    saved = {
        k.replace(".base_layer", ""): v
        for k, v in load_file(tmp_path / "model.safetensors").items()
        if ".paca_" not in k
    }
    assert tiny.same_bits(saved, tiny.llama().state_dict())


def test_a_whole_state_dict_carries_a_trained_model_to_a_fresh_one(residency):
    model = tiny.adapted(tiny.llama(), residency=residency)
    tiny.train(model)
    fresh = tiny.adapted(tiny.llama(seed=1), residency=residency, random_seed=8)
    assert fresh.load_state_dict(model.state_dict()) is not None
    assert torch.equal(tiny.logits(fresh), tiny.logits(model))
    with fresh.disable_adapter():
        assert torch.equal(tiny.logits(fresh), tiny.logits(tiny.llama()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_can_undo_its_own_columns(copied):
    model = tiny.adapted(tiny.llama())
    tiny.train(model)
    twin = copied(model)
    tiny.train(twin)
    with twin.disable_adapter():
        assert tiny.same_bits(tiny.weights_of(twin), tiny.weights_of(tiny.llama()))


@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_a_cast_model_can_undo_its_columns(to):
    """The pretrained values come back as their own cast, not as the cast of adapted ones."""
    model = tiny.adapted(tiny.llama())
    tiny.train(model)
    model.to(to)
    tiny.logits(model)
    with model.disable_adapter():
        assert tiny.same_bits(tiny.weights_of(model), tiny.weights_of(tiny.llama(to)))


def test_inference_mode_leaves_a_model_that_can_be_trained():
    model = tiny.perturb(tiny.adapted(tiny.llama()))
    with torch.inference_mode():
        model(input_ids=tiny.tokens())
    losses = tiny.train(model, steps=4)
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------------------------------- other kinds of weight


def test_a_gpt2_with_conv1d_layers_trains_and_comes_back(residency):
    base = tiny.weights_of(tiny.gpt2())
    model = tiny.adapted(tiny.gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], residency=residency)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.gpt2()))
    losses = tiny.train(model, steps=5)
    assert losses[-1] < losses[0]
    live = tiny.logits(model)
    model.merge_adapter()
    assert torch.equal(tiny.logits(model), live)
    assert tiny.same_bits(tiny.weights_of(model.unload()), base)


def test_conv1d_gradients_are_the_columns_of_the_full_gradient(residency):
    model = tiny.perturb(tiny.adapted(tiny.gpt2(), target_modules=["c_attn", "c_fc"], residency=residency)).train()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    full = tiny.gpt2().double().train()
    with torch.no_grad():
        for layer in tiny.layers_of(model):
            full.get_parameter(f"{layer.name}.weight").add_(layer.get_delta_weight("default"))
    full(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    for layer in tiny.layers_of(model):
        whole = full.get_parameter(f"{layer.name}.weight").grad.t()  # (out, in)
        wanted = layer.scaling["default"] * whole[:, layer.paca_indices["default"]]
        torch.testing.assert_close(layer.paca_delta["default"].grad.double(), wanted, atol=1e-6, rtol=1e-4)


def test_a_tied_head_is_swapped_so_that_the_embedding_stays_as_it_is(caplog):
    base = tiny.llama(tie_word_embeddings=True)
    embedding = base.get_input_embeddings().weight
    pretrained = embedding.detach().clone()
    with pytest.warns(UserWarning, match="tied"):
        model = tiny.adapted(base, target_modules=["lm_head", "q_proj"])
    assert (
        "lm_head: the weight is tied to another module's, so its columns are swapped in around each GEMM" in caplog.text
    )
    assert [layer.residency for layer in tiny.layers_of(model)] == ["resident", "resident", "swap"]
    losses = tiny.train(model, steps=4)
    assert losses[-1] < losses[0]
    assert torch.equal(embedding, pretrained)

    untied = tiny.llama(tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    for layer in tiny.layers_of(model):
        with torch.no_grad():
            untied.get_parameter(f"{layer.name}.weight").add_(layer.get_delta_weight("default"))
    torch.testing.assert_close(tiny.logits(model), tiny.logits(untied), atol=1e-5, rtol=1e-5)


def test_a_tied_head_cannot_be_resident():
    base = tiny.llama(tie_word_embeddings=True)
    with (
        pytest.raises(ValueError, match=r"lm_head: residency='resident' is impossible because the weight is tied"),
        pytest.warns(UserWarning, match="tied"),
    ):
        tiny.adapted(base, target_modules=["lm_head"], residency="resident")


def test_a_layer_says_what_it_is():
    model = two_adapters()
    assert "in_features=32, out_features=32, r={'default': 12, 'other': 12}, residency=resident" in str(model)


def test_a_mixed_in_peft_model_needs_no_task():
    model = get_peft_model(tiny.mlp(), paca.PacaConfig(r=2, target_modules="all-linear"))
    assert torch.equal(model(torch.ones(3, 10)), tiny.mlp()(torch.ones(3, 10)))
