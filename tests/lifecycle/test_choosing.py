"""Which columns a model's layers train: drawn, ranked, measured, shared, or given."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel, get_peft_model

import paca

SHARED = {
    "q_proj": "q_proj",
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "o_proj": "o_proj",
    "gate_proj": "gate_proj",
    "up_proj": "gate_proj",
    "down_proj": "down_proj",
}


def columns_of(model) -> dict[str, list[int]]:
    return {layer.name: layer.paca_indices["default"].tolist() for layer in tiny.layers_of(model)}


def batches():
    return [{"input_ids": tiny.tokens(seed=seed), "labels": tiny.tokens(seed=seed)} for seed in (1, 2)]


def full_gradients(model, batch) -> dict[str, torch.Tensor]:
    """What autograd gives for every weight of the plain model."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("share", [True, False])
def test_layers_that_read_one_input_share_their_columns_if_told_so(share):
    columns = columns_of(tiny.adapted(tiny.llama(), share_columns=share))
    for name, found in columns.items():
        parent, _, leaf = name.rpartition(".")
        if SHARED[leaf] != leaf:
            assert (found == columns[f"{parent}.{SHARED[leaf]}"]) is share
    assert columns["model.layers.0.self_attn.q_proj"] != columns["model.layers.1.self_attn.q_proj"]


def test_columns_depend_on_the_seed_and_the_name_alone():
    wanted = columns_of(tiny.adapted(tiny.llama()))
    torch.manual_seed(12345)
    torch.rand(7)
    assert columns_of(tiny.adapted(tiny.llama(seed=2))) == wanted
    assert columns_of(tiny.adapted(tiny.llama(), random_seed=1)) != wanted
    alone = columns_of(tiny.adapted(tiny.llama(), target_modules=["down_proj"]))
    assert alone.items() <= wanted.items()


def test_a_seed_of_none_draws_anew_and_is_noted():
    bases = [tiny.llama(), tiny.llama()]
    models = [tiny.adapted(base, random_seed=None) for base in bases]
    assert columns_of(models[0]) != columns_of(models[1])
    noted = models[0].peft_config["default"].random_seed
    assert columns_of(tiny.adapted(tiny.llama(), random_seed=noted)) == columns_of(models[0])


def test_columns_may_be_given_by_suffix_full_name_or_pattern():
    given = {"q_proj": [3, 1, 2, 0], "model.layers.1.mlp.up_proj": [7, 8], r".*\.0\.mlp\.up_proj": [5]}
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "up_proj"], columns=given)
    assert columns_of(model) == {
        "model.layers.0.self_attn.q_proj": [0, 1, 2, 3],
        "model.layers.1.self_attn.q_proj": [0, 1, 2, 3],
        "model.layers.0.mlp.up_proj": [5],
        "model.layers.1.mlp.up_proj": [7, 8],
    }
    assert all(layer.scaling["default"] == 8 / layer.r["default"] for layer in tiny.layers_of(model))
    losses = tiny.train(model, steps=4)
    assert losses[-1] < losses[0]


def test_weight_norm_picks_the_largest_columns():
    base = tiny.llama()
    model = tiny.adapted(base, selection="weight_norm", share_columns=False)
    pretrained = tiny.llama()
    for name, found in columns_of(model).items():
        norms = pretrained.get_parameter(f"{name}.weight").double().norm(dim=0)
        assert found == sorted(norms.topk(4).indices.tolist())


def test_weight_norm_ranks_layers_that_share_together():
    model = tiny.adapted(tiny.llama(), selection="weight_norm")
    pretrained = tiny.llama()
    for i in (0, 1):
        names = [f"model.layers.{i}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
        norms = sum(pretrained.get_parameter(f"{name}.weight").double().square().sum(0) for name in names)
        wanted = sorted(norms.topk(4).indices.tolist())
        assert [columns_of(model)[name] for name in names] == [wanted] * 3


def test_weight_norm_sees_the_pretrained_weight_under_another_adapter():
    model = tiny.perturb(tiny.adapted(tiny.llama()), std=10.0)
    model.add_adapter("other", tiny.config(selection="weight_norm"))
    alone = columns_of(tiny.adapted(tiny.llama(), selection="weight_norm"))
    assert {layer.name: layer.paca_indices["other"].tolist() for layer in tiny.layers_of(model)} == alone


@pytest.mark.parametrize("kind", ["activation_norm_large", "activation_norm_small"])
def test_calibration_measures_the_activations_of_each_layer(kind):
    base = tiny.llama()
    config = paca.calibrate(base, tiny.config(selection=kind, share_columns=False), batches())
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, x, y, name=name: seen.setdefault(name, []).append(x[0].double()))
        for name, module in base.named_modules()
        if name in config.columns
    ]
    with torch.no_grad():
        for batch in batches():
            base(**batch)
    for hook in hooks:
        hook.remove()
    columns = columns_of(tiny.adapted(base, columns=config.columns, selection=kind))
    assert len(columns) == 14
    for name, found in columns.items():
        scores = sum(x.square().sum((0, 1)) for x in seen[name])
        assert found == sorted(scores.topk(4, largest=kind.endswith("large")).indices.tolist())


@pytest.mark.parametrize("share", [True, False])
def test_calibration_ranks_columns_by_their_gradient_without_changing_the_model(share):
    base = tiny.llama().train()
    before = tiny.weights_of(base)
    config = paca.calibrate(base, tiny.config(selection="gradient_norm", share_columns=share), batches())
    assert tiny.same_bits(tiny.weights_of(base), before)
    assert base.training
    assert all(p.grad is None and p.requires_grad for p in base.parameters())
    gradients = [full_gradients(base.eval(), batch) for batch in batches()]
    scores = {name: sum(g[f"{name}.weight"].square().sum(0) for g in gradients) for name in config.columns}
    assert len(scores) == 14
    for name, found in config.columns.items():
        parent, _, leaf = name.rpartition(".")
        together = [n for n in scores if share and n.startswith(parent) and SHARED[n.split(".")[-1]] == SHARED[leaf]]
        total = sum(scores[n] for n in together or [name])
        assert found == sorted(total.topk(4).indices.tolist())


def test_a_calibrated_config_makes_an_adapter_that_trains_and_comes_back(tmp_path):
    base = tiny.llama()
    config = paca.calibrate(base, tiny.config(selection="gradient_norm", rank_pattern={"down_proj": 6}), batches())
    model = get_peft_model(base, config)
    assert {layer.r["default"] for layer in tiny.layers_of(model) if layer.name.endswith("down_proj")} == {6}
    losses = tiny.train(model, steps=4)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert columns_of(loaded) == columns_of(model) == config.columns
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.mark.parametrize("kind", ["activation_norm_large", "activation_norm_small", "gradient_norm"])
def test_a_measured_selection_without_calibration_is_refused(kind):
    base = tiny.llama()
    with pytest.raises(
        ValueError, match=r"needs a calibration pass: config = paca\.calibrate\(model, config, batches\)"
    ):
        tiny.adapted(base, selection=kind)
    assert not tiny.layers_of(base)


def test_calibrating_what_needs_none_or_with_nothing_is_refused():
    with pytest.raises(ValueError, match="selection='random' needs no calibration"):
        paca.calibrate(tiny.llama(), tiny.config(), batches())
    with pytest.raises(ValueError, match="needs at least one batch"):
        paca.calibrate(tiny.llama(), tiny.config(selection="gradient_norm"), [])
    with pytest.raises(ValueError, match=r"no layer matches target_modules=.*no_such_proj"):
        paca.calibrate(tiny.llama(), tiny.config(selection="gradient_norm", target_modules=["no_such_proj"]), batches())
