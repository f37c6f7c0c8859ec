"""Whole heads and channels are chosen over all layers, and can be put side by side without changing the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Operations
from peft import PeftModel, get_peft_model
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import paca
from paca.permutation import copermute
from paca.s2ft import blocks

S2FT = {"selection": "s2ft", "r": 8, "paca_alpha": 16}


def opt() -> Any:
    """Attention with biases and an MLP of two linears; the head is tied."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, dropout=0.0, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.double()


def qwen3() -> Any:
    """Grouped heads of another size than the width says, with norms on queries and keys."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    config = Qwen3Config(vocab_size=tiny.VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    return Qwen3ForCausalLM(config).double()


MODELS = {"llama": lambda: tiny.llama(torch.float64), "qwen3": qwen3, "opt": opt}


@pytest.fixture(params=MODELS)
def base(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().eval()


def trained_columns(model: Any) -> dict[str, list[int]]:
    return {layer.name: layer.paca_indices["default"].tolist() for layer in tiny.layers_of(model)}


def test_only_whole_heads_and_channels_train_and_the_budget_is_kept() -> None:
    model = tiny.adapted(tiny.llama(num_hidden_layers=6), **S2FT)
    columns = trained_columns(model)
    heads = {name: chosen for name, chosen in columns.items() if name.endswith("o_proj")}
    channels = {name: chosen for name, chosen in columns.items() if name.endswith("down_proj")}
    assert heads.keys() | channels.keys() == columns.keys()
    assert sum(map(len, heads.values())) == sum(map(len, channels.values())) == 6 * 8
    for chosen in heads.values():
        assert all(set(range(c // 8 * 8, c // 8 * 8 + 8)) <= set(chosen) for c in chosen)
    assert len({len(chosen) for chosen in channels.values()}) > 1  # layers compete
    assert {layer.scaling["default"] for layer in tiny.layers_of(model)} == {2.0}


def test_the_draw_depends_on_the_seed_alone() -> None:
    first, again, other = (trained_columns(tiny.adapted(tiny.llama(), random_seed=s, **S2FT)) for s in (1, 1, 2))
    assert first == again != other


def test_a_reordered_model_computes_the_same(base: Any) -> None:
    wanted = tiny.logits(base)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    columns = {}
    for name, block in blocks(base).items():
        unit = block.unit(whole_groups=True)
        units = torch.randperm(block.width // unit, generator=generator)[: 1 if block.heads else 5]
        columns[name] = [int(u) * unit + i for u in units for i in range(unit)]
    assert len(columns) == 4
    permutation = copermute(base, columns)
    after = dict(base.named_parameters())
    assert sum(not torch.equal(after[name], before[name]) for name in before) >= 6
    torch.testing.assert_close(tiny.logits(base), wanted, atol=1e-12, rtol=1e-12)
    for name, chosen in columns.items():
        moved = base.get_submodule(name).weight[:, : len(chosen)]
        assert torch.equal(moved, before[f"{name}.weight"][:, sorted(chosen)])
    permutation.undo(base)
    assert tiny.same_bits({name: p.detach() for name, p in base.named_parameters()}, before)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 63), min_size=1, unique=True))
def test_any_channels_can_be_put_first_and_back(chosen: list[int]) -> None:
    model = tiny.llama(torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = tiny.logits(model)
    permutation = copermute(model, {"model.layers.1.mlp.down_proj": chosen})
    torch.testing.assert_close(tiny.logits(model), wanted, atol=1e-12, rtol=1e-12)
    permutation.undo(model)
    assert tiny.same_bits({name: p.detach() for name, p in model.named_parameters()}, before)


def test_a_co_permuted_adapter_trains_and_saves_what_an_unpermuted_one_does(base: Any, tmp_path: Path) -> None:
    """The same heads and channels, side by side or where they were: one training, one file, one base afterwards."""
    folders, states = [], []
    pretrained = {name: p.detach().clone() for name, p in base.named_parameters()}
    columns = None
    for copermuted in (True, False):
        model = MODELS[type(base).__name__.lower().removesuffix("forcausallm")]()
        config = tiny.config(**S2FT, copermute=copermuted, target_modules="all-linear")
        if not copermuted:
            config = tiny.config(
                columns=columns,
                target_modules=list(columns),
                alpha_pattern={n: 2.0 * len(c) for n, c in columns.items()},
            )
        model = get_peft_model(model, config)
        layers = tiny.layers_of(model)
        tiny.train(model, steps=3)
        folders.append(tmp_path / str(copermuted))
        model.save_pretrained(folders[-1])
        if copermuted:
            assert all(layer.adapted.columns.runs == ((0, len(layer.adapted.columns.index)),) for layer in layers)
            columns = {layer.name: layer.order[layer.paca_indices["default"]].tolist() for layer in layers}
        states.append(tiny.logits(model))
        assert tiny.same_bits(tiny.weights_of(model.unload()), pretrained)
    torch.testing.assert_close(states[0], states[1], atol=1e-9, rtol=1e-9)
    ours, plain = (paca.saved.read_adapter(folder) for folder in folders)
    assert ours.layers.keys() == plain.layers.keys()
    for name, layer in ours.layers.items():
        assert torch.equal(layer.index, plain.layers[name].index)
        torch.testing.assert_close(layer.delta, plain.layers[name].delta, atol=1e-7, rtol=1e-5)
    assert ours.config.base_fingerprint == plain.config.base_fingerprint
    fresh = MODELS[type(base).__name__.lower().removesuffix("forcausallm")]()
    torch.testing.assert_close(
        tiny.logits(PeftModel.from_pretrained(fresh, folders[0])), states[0], atol=1e-9, rtol=1e-9
    )


def test_a_saved_adapter_loads_into_a_co_permuted_model(tmp_path: Path) -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(torch.float64), copermute=True, **S2FT))
    model.save_pretrained(tmp_path)
    wanted = tiny.logits(model)
    tiny.perturb(model, seed=9)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(tiny.logits(model), wanted)


@pytest.mark.parametrize("other", [{"target_modules": ["q_proj"]}, {"selection": "mask_random"}], ids=str)
def test_an_adapter_on_reordered_rows_is_refused(other: dict[str, Any]) -> None:
    model = tiny.adapted(tiny.llama(), copermute=True, **S2FT)
    with pytest.raises(ValueError, match="was reordered by an adapter with copermute"):
        model.add_adapter("other", tiny.config(**other))


def test_side_by_side_columns_are_neither_gathered_nor_scattered_by_index() -> None:
    used = {}
    for copermuted in (False, True):
        model = tiny.adapted(tiny.llama(), copermute=copermuted, **S2FT).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with Operations() as forward:
            loss = model(inputs_embeds=torch.randn(1, 5, 32), labels=tiny.tokens(1, 5)).loss
        loss.backward()
        with Operations() as step:
            optimizer.step()
        used[copermuted] = "index_select" in forward.names, "index_copy_" in step.names
    assert used == {False: (True, True), True: (False, False)}


def test_a_merged_model_is_in_the_original_order() -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(torch.float64), copermute=True, **S2FT))
    wanted = tiny.logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged), wanted, atol=1e-12, rtol=1e-12)
    pretrained = dict(tiny.llama(torch.float64).named_parameters())
    for name, parameter in merged.named_parameters():
        rows_changed = (parameter != pretrained[name]).flatten(1).any(0) if parameter.dim() > 1 else torch.zeros(1)
        assert rows_changed.float().mean() < 1 or name.endswith("bias")
        if not name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(parameter, pretrained[name])


@pytest.mark.parametrize(
    ("given_config", "says"),
    [
        ({"target_modules": ["q_proj"]}, "target_modules=.* has none of them in this model"),
        ({"rank_pattern": {"down_proj": 2}}, "spreads columns over the layers itself"),
        ({"r": 200}, "r = 200 is more than the"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_changes(given_config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiny.adapted(tiny.llama(), **{**S2FT, **given_config})


def test_a_head_is_never_torn_apart() -> None:
    with pytest.raises(ValueError, match="columns must be whole groups of 16, which share a key head"):
        copermute(tiny.llama(), {"model.layers.0.self_attn.o_proj": list(range(8))})
    with pytest.raises(ValueError, match="needs selection='s2ft'"):
        tiny.config(copermute=True)


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["fc1"]}, {"groups": 2, "residency": "swap"}], ids=str
)
def test_what_cannot_be_reordered_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    """Biases and modules that train in full would be saved in the new order; no weight moves before the refusal."""
    base = opt()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match=r"copermute reorders the rows of|groups need weights"):
        get_peft_model(base, tiny.config(**{**S2FT, **options}, copermute=True, target_modules="all-linear"))
    assert tiny.same_bits({name: p.detach() for name, p in base.named_parameters()}, before)
    assert not any(hasattr(module, "_paca_order") for module in base.modules())


def olmo2() -> Any:
    """Norms over all queries and all keys: each head has its own part of the weight."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Olmo2ForCausalLM(Olmo2Config(vocab_size=tiny.VOCABULARY, eos_token_id=2, **sizes))


class Normed(torch.nn.Module):
    """An MLP with a norm between its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)


def tied() -> Any:
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    return model


@pytest.mark.parametrize(
    ("model", "name", "says"),
    [
        (olmo2, "model.layers.0.self_attn.o_proj", r"q_norm\.weight \(32,\) may belong to its heads"),
        (Normed, "fc2", r"norm\.weight \(16,\) may belong to its heads or channels"),
        (tied, "model.layers.0.mlp.down_proj", "tied to another module"),
    ],
)
def test_heads_and_channels_with_parameters_of_their_own_stay_where_they_are(model: Any, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be reordered: .*{says}"):
        copermute(model(), {name: list(range(8))})


def test_a_second_adapter_draws_from_all_layers_too() -> None:
    alone = trained_columns(tiny.adapted(tiny.llama(), random_seed=5, **S2FT))
    model = tiny.adapted(tiny.llama(), **S2FT)
    model.add_adapter("other", tiny.config(random_seed=5, **S2FT))
    found = {layer.name: layer.paca_indices["other"].tolist() for layer in tiny.layers_of(model) if "other" in layer.r}
    assert found == alone
