"""One test for each defect that was found in the published PaCA code, and that this library must not have."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import paca
from paca.layer import PacaLayer


def oracle_of(model) -> nn.Module:
    """A plain copy whose weights hold what the deltas say now: no state of ours is left in it."""
    fresh = tiny.llama()
    with torch.no_grad():
        for layer in tiny.layers_of(model):
            for name in layer.active_adapters:
                fresh.get_parameter(f"{layer.name}.weight").add_(layer.get_delta_weight(name))
    return fresh


def gradients(model) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    return [layer.paca_delta["default"].grad.clone() for layer in tiny.layers_of(model)]


def step(model, optimizer) -> None:
    model.train()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model, **given):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **given)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_1_no_forward_of_a_step_sees_old_columns_however_many_forwards_there_are(fused):
    """There: written on odd calls only; one more eval forward, or a recompute, flipped the parity."""
    model = tiny.adapted(tiny.llama())
    optimizer = optimizer_of(model, fused=fused)
    for extra in (0, 1, 0, 2, 1):
        for _ in range(extra):
            tiny.logits(model)
        step(model, optimizer)
        for training in (True, False):
            found, wanted = tiny.logits(model, training=training), tiny.logits(oracle_of(model))
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.llama()), atol=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_1_a_recomputed_forward_uses_the_columns_of_the_first(reentrant):
    plain, recomputed = (tiny.perturb(tiny.adapted(tiny.llama())).train() for _ in range(2))
    tiny.recompute(recomputed, reentrant)
    optimizers = [optimizer_of(model) for model in (plain, recomputed)]
    for _ in range(3):
        for one, two in zip(gradients(plain), gradients(recomputed), strict=True):
            assert torch.equal(one, two)
        for optimizer in optimizers:
            optimizer.step()


def test_2_evaluation_right_after_a_step_sees_the_step():
    model = tiny.adapted(tiny.llama())
    optimizer = optimizer_of(model)
    step(model, optimizer)
    step(model, optimizer)
    found = tiny.logits(model)
    torch.testing.assert_close(found, tiny.logits(oracle_of(model)), atol=1e-6, rtol=1e-5)


def test_2_a_loaded_adapter_acts_in_eval_mode_without_merging(tmp_path):
    model = tiny.perturb(tiny.adapted(tiny.llama()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert not loaded.training
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert not torch.equal(tiny.logits(loaded), tiny.logits(tiny.llama()))


def test_3_a_reference_model_made_by_disabling_is_the_base_model():
    model = tiny.adapted(tiny.llama())
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
        with model.disable_adapter():
            assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_3_unload_and_unmerge_return_the_base_weights():
    model = tiny.adapted(tiny.llama())
    tiny.train(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert tiny.same_bits(tiny.weights_of(model.unload()), tiny.weights_of(tiny.llama()))


def test_4_switching_adapters_takes_the_columns_of_the_first_out():
    model = tiny.perturb(tiny.adapted(tiny.llama()))
    model.add_adapter("other", tiny.config(random_seed=2))
    model.set_adapter("other")
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_4_every_active_adapter_gets_gradients_where_columns_overlap_too():
    model = tiny.perturb(tiny.adapted(tiny.llama(), r=20))
    model.add_adapter("other", tiny.config(r=20, random_seed=2))
    model.base_model.set_adapter(["default", "other"])
    model.train()(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    for layer in tiny.layers_of(model):
        position = {int(column): i for i, column in enumerate(layer.paca_indices["other"])}
        both = [(i, position[int(c)]) for i, c in enumerate(layer.paca_indices["default"]) if int(c) in position]
        assert both
        mine, theirs = (layer.paca_delta[name].grad for name in ("default", "other"))
        for i, j in both:  # the same column of W: the same gradient
            assert torch.equal(mine[:, i], theirs[:, j])
            assert mine[:, i].abs().max() > 0


def test_4_a_deleted_adapter_leaves_no_indices():
    model = tiny.adapted(tiny.llama())
    model.add_adapter("other", tiny.config(random_seed=2))
    model.delete_adapter("other")
    assert not [name for name in model.state_dict() if "other" in name]
    assert all(list(layer.paca_indices) == ["default"] for layer in tiny.layers_of(model))


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10), (2, 3, 4, 10), (0, 10)], ids=str)
def test_5_inputs_of_any_rank_are_taken(shape):
    model = tiny.perturb(get_peft_model(tiny.mlp(), paca.PacaConfig(r=4, target_modules=["first", "last"])))
    x = torch.randn(shape)
    wanted = copy.deepcopy(model).merge_and_unload()(x)
    torch.testing.assert_close(model(x), wanted)
    model(x).sum().backward()
    assert all(
        layer.paca_delta["default"].grad.shape == layer.paca_delta["default"].shape for layer in tiny.layers_of(model)
    )


def test_5_a_trainable_bias_gets_its_gradient():
    model = get_peft_model(tiny.mlp(), paca.PacaConfig(r=4, target_modules=["last"], bias="paca_only"))
    x = torch.randn(5, 10)
    model(x).square().sum().backward()
    plain = tiny.mlp()
    plain(x).square().sum().backward()
    torch.testing.assert_close(tiny.layers_of(model)[0].get_base_layer().bias.grad, plain.last.bias.grad)


def test_6_gradient_based_selection_selects_by_the_gradient():
    base = tiny.llama()
    batch = {"input_ids": tiny.tokens(), "labels": tiny.tokens()}
    config = paca.calibrate(base, tiny.config(selection="gradient_norm", share_columns=False), [batch])
    base(**batch).loss.backward()
    for name, found in config.columns.items():
        norms = base.get_parameter(f"{name}.weight").grad.double().norm(dim=0)
        assert found == sorted(norms.topk(4).indices.tolist())


def test_7_the_scale_multiplies_the_update_and_never_the_pretrained_columns():
    """There: α/r multiplied the pretrained columns, and changed them before the first step."""
    model = tiny.adapted(tiny.llama(torch.bfloat16), r=3, paca_alpha=8)  # 2.67 cannot be written in bfloat16
    assert tiny.same_bits(tiny.weights_of(model), tiny.weights_of(tiny.llama(torch.bfloat16)))
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama(torch.bfloat16)))


def test_7_weight_decay_pulls_towards_the_pretrained_weights():
    model = tiny.perturb(tiny.adapted(tiny.llama()))
    parameters = [layer.paca_delta["default"] for layer in tiny.layers_of(model)]
    optimizer = torch.optim.SGD(parameters, lr=0.5, weight_decay=1.0)
    pretrained = tiny.weights_of(tiny.llama())

    def distance() -> float:
        return sum((w - pretrained[n]).square().sum().item() for n, w in tiny.weights_of(model).items())

    paca.refresh(model)
    distances = [distance()]
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        distances.append(distance())
    assert distances[0] > 0
    for before, after in pairwise(distances):
        assert after == pytest.approx(before / 4, rel=1e-3)


def test_8_conv1d_is_adapted_and_other_layers_are_refused_by_name():
    assert torch.equal(tiny.logits(tiny.adapted(tiny.gpt2(), target_modules=["c_attn"])), tiny.logits(tiny.gpt2()))
    for module in (nn.Embedding(8, 4), nn.Conv2d(4, 4, 1)):
        with pytest.raises(TypeError, match=r"target: PaCA adapts torch.nn.Linear and transformers Conv1D"):
            get_peft_model(nn.ModuleDict({"target": module}), paca.PacaConfig(r=2, target_modules=["target"]))


def test_8_a_rank_above_the_number_of_inputs_is_no_silent_truncation():
    with pytest.raises(ValueError, match="r = 33 is more than the 32 input columns"):
        tiny.adapted(tiny.llama(), r=33, target_modules=["q_proj"])


def test_8_a_base_module_called_alpaca_stays_frozen_and_unsaved():
    base = nn.ModuleDict({"alpaca_proj": nn.Linear(4, 4), "target": nn.Linear(4, 4)})
    model = get_peft_model(base, paca.PacaConfig(r=2, target_modules=["target"], bias="none"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["base_model.model.target.paca_delta.default"]


def test_9_the_file_holds_deltas_and_refuses_another_base(tmp_path):
    model = tiny.adapted(tiny.llama())
    model.save_pretrained(tmp_path)
    deltas = [t for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if name.endswith("paca_delta")]
    assert deltas
    assert not any(delta.any() for delta in deltas)  # untrained: no absolute columns
    with pytest.raises(paca.BaseMismatchError, match="made for another base model"):
        PeftModel.from_pretrained(tiny.llama(seed=1), tmp_path)


def test_9_the_seed_is_in_the_config_and_the_global_generator_is_not_asked():
    assert paca.PacaConfig().random_seed == 0
    base = tiny.llama()
    before = torch.get_rng_state()
    tiny.adapted(base)
    assert torch.equal(torch.get_rng_state(), before)


def test_10_ranks_with_different_generators_draw_the_same_columns():
    drawn = []
    for rank in range(3):
        base = tiny.llama()
        torch.manual_seed(1000 + rank)
        torch.rand(rank)
        drawn.append([layer.paca_indices["default"].tolist() for layer in tiny.layers_of(tiny.adapted(base))])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({tuple(columns) for columns in drawn[0]}) > 1


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_12_one_gather_serves_all_layers_that_read_the_same_input(gradient_checkpointing):
    calls = []

    def make():
        model = tiny.adapted(tiny.llama())
        for layer in tiny.layers_of(model):
            gather = layer.adapted.ops.gather

            def counted(x, index, gather=gather):
                calls.append(index)
                return gather(x, index)

            layer.adapted.ops = type(layer.adapted.ops)(**{**vars(layer.adapted.ops), "gather": counted})
        return model

    model = make().train()
    if gradient_checkpointing:
        tiny.recompute(model, reentrant=False)
    loss = model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
    assert len(calls) == 2 * 4  # of 14 layers: q/k/v, o, gate/up and down of each block
    loss.backward()
    assert len(calls) == 2 * 4 * (2 if gradient_checkpointing else 1)


def test_12_column_numbers_are_sorted():
    for layer in tiny.layers_of(tiny.adapted(tiny.llama(), r=16)):
        index = layer.paca_indices["default"]
        assert torch.equal(index, index.sort().values)
        assert len(index.unique()) == 16


def test_12_no_autograd_node_stands_between_the_delta_and_its_layer():
    """There: an out×r product and its node a layer, for a value that forward ignored."""
    layer = PacaLayer(nn.Linear(8, 4).requires_grad_(False), "layer", paca.get_backend())
    layer.update_layer("default", torch.tensor([1, 5]), 2)
    layer.set_adapter("default")
    y = layer(torch.randn(3, 8))
    leaves = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert [type(node).__name__ for node in leaves] == ["AccumulateGrad"]
    assert leaves[0].variable is layer.paca_delta["default"]


def test_checkpointed_blocks_of_the_user_s_own_work_too():
    model = get_peft_model(tiny.mlp(), paca.PacaConfig(r=4, target_modules=["first", "last"]))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 10, requires_grad=True)
    model(x).sum().backward()
    checkpoint(twin, x, use_reentrant=False).sum().backward()
    for one, two in zip(tiny.layers_of(model), tiny.layers_of(twin), strict=True):
        assert torch.equal(one.paca_delta["default"].grad, two.paca_delta["default"].grad)
