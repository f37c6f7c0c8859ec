"""What is saved, where it may be loaded, and that it acts at once."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import tiny_models as tiny
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import paca

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(dtype=torch.float32, **given):
    model = tiny.adapted(tiny.llama(dtype), **given)
    tiny.train(model)
    return model


@pytest.fixture
def saved(tmp_path):
    """A trained model and the folder of its adapter."""
    model = trained()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.fixture
def base_folder(tmp_path):
    """The base model, saved."""
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def rewrite(folder, **changed) -> None:
    """Change, add or (with None) drop entries of a saved adapter's config."""
    path = folder / "adapter_config.json"
    entries = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def rewrite_tensors(folder, change) -> None:
    """Replace the saved tensors by `change(tensors)`."""
    path = folder / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------- what is saved


def test_the_adapter_alone_is_saved(saved):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = tiny.layers_of(model)
    assert len(tensors) == 2 * len(layers) == 28
    for layer in layers:
        delta = tensors[f"base_model.model.{layer.name}.paca_delta"]
        index = tensors[f"base_model.model.{layer.name}.paca_indices"]
        assert torch.equal(delta, layer.paca_delta["default"])
        assert torch.equal(index, layer.paca_indices["default"])
        assert (delta.shape, delta.dtype) == ((layer.out_features, 4), torch.float32)
        assert (index.shape, index.dtype) == ((4,), torch.int64)


def test_the_model_card_names_the_library(saved):
    card = (saved[1] / "README.md").read_text()
    assert "library_name: peft" in card


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_the_config_records_a_fingerprint_of_each_layer_s_base_columns(tmp_path, merged):
    model = trained()
    if merged:
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    base = tiny.llama()
    assert recorded.keys() == {layer.name for layer in tiny.layers_of(model)}
    for layer in tiny.layers_of(model):
        columns = base.get_parameter(f"{layer.name}.weight")[:, layer.paca_indices["default"]]
        assert recorded[layer.name] == paca.fingerprint.fingerprint(columns, layer.in_features)


def test_a_config_comes_back_as_it_was_saved(tmp_path):
    config = tiny.config(
        r=5,
        paca_alpha=3,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[1],
        layers_pattern=["layers"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 0.5},
        bias="paca_only",
        modules_to_save=["lm_head"],
        random_seed=17,
        selection="weight_norm",
        share_columns=False,
        residency="swap",
        check_base=False,
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is paca.PacaConfig
    for field in fields(paca.PacaConfig):
        if field.name not in ("inference_mode", "peft_version"):  # PEFT sets them itself
            assert getattr(loaded, field.name) == getattr(config, field.name), field.name


def test_the_config_has_upstream_s_field_names_with_upstream_s_meaning(saved):
    entries = json.loads((saved[1] / "adapter_config.json").read_text())
    upstream = {
        *("peft_type", "r", "paca_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("random_seed", "init_weights", "modules_to_save"),
    }
    assert upstream <= entries.keys()
    assert (entries["peft_type"], entries["r"], entries["paca_alpha"]) == ("PACA", 4, 8)


def test_hand_chosen_columns_are_in_the_tensors_and_not_in_the_config(tmp_path):
    model = trained(target_modules=["q_proj"], columns={"q_proj": [3, 1, 30]})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["columns"] == {}
    assert model.peft_config["default"].columns == {"q_proj": [3, 1, 30]}
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert [layer.paca_indices["default"].tolist() for layer in tiny.layers_of(loaded)] == [[1, 3, 30]] * 2
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_adapter_acts_at_once_in_train_and_eval_mode(tmp_path, dtype, residency, training):
    model = trained(dtype, residency=residency)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(dtype), tmp_path)
    found = tiny.logits(loaded, training=training)
    assert torch.equal(found, tiny.logits(model))
    assert not torch.equal(found, tiny.logits(tiny.llama(dtype)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_deltas_of_a_low_precision_model_are_loaded_in_full(tmp_path, low_cpu_mem_usage):
    model = trained(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert tiny.same_bits(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_an_adapter_goes_through_the_meta_device(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_running_a_model_whose_values_are_not_loaded_is_an_error_that_says_so():
    model = get_peft_model(tiny.llama(), tiny.config(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match=r"q_proj: weight or adapter is on the meta device; load their values"):
        model(input_ids=tiny.tokens())


def test_a_loaded_adapter_can_be_trained_on(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
    assert tiny.train(loaded, steps=3) == tiny.train(model, steps=3)
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(tiny.llama(), folder).parameters())


def test_a_second_adapter_is_loaded_beside_the_first(saved, tmp_path):
    model, folder = saved
    trained(r=2, random_seed=5, target_modules=["up_proj"]).save_pretrained(tmp_path / "other")
    loaded = PeftModel.from_pretrained(tiny.llama(), folder)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    loaded.set_adapter("other")
    alone = PeftModel.from_pretrained(tiny.llama(), tmp_path / "other")
    assert torch.equal(tiny.logits(loaded), tiny.logits(alone))


def test_an_adapter_with_biases_and_a_trained_head_comes_back_whole(tmp_path):
    base = {"attention_bias": True}
    given = {"target_modules": ["q_proj"], "bias": "paca_only", "modules_to_save": ["lm_head"]}
    model = tiny.adapted(tiny.llama(**base), **given)
    tiny.train(model)
    model.save_pretrained(tmp_path)
    assert any(name.endswith("q_proj.base_layer.bias") for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(**base), tmp_path)), tiny.logits(model))


def test_auto_classes_find_the_base_model_and_the_adapter(tmp_path, base_folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), tiny.config())
    tiny.train(model)
    model.save_pretrained(tmp_path / "adapter")
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(tiny.logits(by_peft), tiny.logits(model))
    assert type(by_peft.base_model) is paca.PacaModel
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(tiny.logits(by_transformers), tiny.logits(model))


def test_transformers_own_adapter_methods_work(saved):
    model, folder = saved
    base = tiny.logits(tiny.llama())
    plain = tiny.llama()
    plain.load_adapter(str(folder))
    assert torch.equal(tiny.logits(plain), tiny.logits(model))
    plain.disable_adapters()
    assert torch.equal(tiny.logits(plain), base)
    plain.enable_adapters()
    assert torch.equal(tiny.logits(plain), tiny.logits(model))
    with pytest.warns(UserWarning, match="multiple adapters in the model"):
        plain.add_adapter(tiny.config(random_seed=3), "other")
    assert plain.active_adapters() == ["other"]
    assert torch.equal(tiny.logits(plain), base)
    plain.set_adapter("default")
    assert torch.equal(tiny.logits(plain), tiny.logits(model))
    plain.set_adapter("other")
    plain.delete_adapter("default")
    losses = tiny.train(plain)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_transformers_load_adapter_takes_the_columns_of_the_file(tmp_path, residency):
    """It sets tensors one by one, so that nothing hears of new column numbers."""
    model = trained(target_modules=["q_proj"], columns={"q_proj": [3, 1, 30, 31]}, residency=residency)
    model.save_pretrained(tmp_path)
    plain = load_by_transformers(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(plain), tiny.logits(model))
    plain.disable_adapters()
    assert torch.equal(tiny.logits(plain), tiny.logits(tiny.llama()))


def test_transformers_saves_an_adapter_that_peft_loads(tmp_path):
    plain = tiny.llama()
    plain.add_adapter(tiny.config())
    tiny.train(plain)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(plain))


# ---------------------------------------------------------------------------------------------- on which base


def test_loading_onto_another_base_is_refused(saved):
    with pytest.raises(
        paca.BaseMismatchError, match=r"adapter 'default' was made for another base model: the pretrained"
    ):
        PeftModel.from_pretrained(tiny.llama(seed=1), saved[1])


def test_transformers_load_adapter_refuses_another_base_too(saved):
    with pytest.raises(paca.BaseMismatchError, match="made for another base model"):
        tiny.logits(load_by_transformers(tiny.llama(seed=1), saved[1]))


def load_by_transformers(model, folder):
    model.load_adapter(str(folder))
    return model


def test_loading_onto_another_base_can_be_asked_for(saved):
    config = PeftConfig.from_pretrained(saved[1])
    config.check_base = False
    loaded = PeftModel.from_pretrained(tiny.llama(seed=1), saved[1], config=config)
    other = tiny.llama(seed=1)
    assert not torch.equal(tiny.logits(loaded), tiny.logits(other))
    assert tiny.same_bits(tiny.weights_of(loaded.unload()), tiny.weights_of(other))


def test_the_remedy_that_the_error_names_works(saved):
    with pytest.raises(paca.BaseMismatchError, match=r"config\.check_base = False"):
        PeftModel.from_pretrained(tiny.llama(seed=1), saved[1])


@pytest.mark.parametrize("made", DTYPES, ids=str)
@pytest.mark.parametrize("used", DTYPES, ids=str)
def test_the_same_checkpoint_in_another_dtype_is_the_same_base(tmp_path, made, used):
    trained(made).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama().to(made).to(used), tmp_path)
    assert not torch.equal(tiny.logits(loaded), tiny.logits(tiny.llama().to(made).to(used)))


def test_an_adapter_may_join_a_base_that_another_adapter_has_trained_on(saved):
    """The fingerprint is that of the pretrained columns, not of what the weight holds now."""
    model, folder = saved
    busy = tiny.perturb(tiny.adapted(tiny.llama(), "first"), "first")
    tiny.logits(busy)
    busy.load_adapter(folder, "second")
    busy.set_adapter("second")
    assert torch.equal(tiny.logits(busy), tiny.logits(model))


# ---------------------------------------------------------------------------------------------- broken files


def damaged(change):
    return lambda folder: rewrite_tensors(folder, change)


def with_indices(new):
    """Replace one layer's column numbers."""

    def change(tensors):
        return tensors | {"base_model.model.model.layers.0.self_attn.q_proj.paca_indices": new}

    return damaged(change)


def truncate(folder) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "truncated": (truncate, "SafetensorError", "incomplete|deserializing"),
    "out of range": (with_indices(torch.tensor([0, 1, 2, 32])), "ValueError", r"q_proj.*must lie in 0…31, found 0…32"),
    "negative": (with_indices(torch.tensor([-1, 1, 2, 3])), "ValueError", r"must lie in 0…31, found -1…3"),
    "repeated": (with_indices(torch.tensor([1, 5, 5, 7])), "ValueError", r"must differ, found 5 more than once"),
    "not whole": (with_indices(torch.tensor([1.5, 2, 3, 4])), "ValueError", r"whole numbers, found torch.float32"),
    "bfloat16": (
        with_indices(torch.tensor([1, 2, 3, 4]).bfloat16()),
        "ValueError",
        r"whole numbers, found torch.bfloat16",
    ),
    "too few": (with_indices(torch.tensor([1, 2, 3])), "ValueError", "its config trains 4 columns, its file has 3"),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["normal", "low_cpu_mem_usage"])
@pytest.mark.parametrize("check", ["fingerprint", "no fingerprint"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_file_is_refused(saved, kind, check, low_cpu_mem_usage):
    folder = saved[1]
    damage, error, message = BROKEN[kind]
    damage(folder)
    if check == "no fingerprint":
        rewrite(folder, base_fingerprint=None)
    with pytest.raises(Exception, match=message) as raised:
        PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert error in {cls.__name__ for cls in type(raised.value).__mro__}


def test_columns_in_any_order_are_sorted_with_their_deltas(saved):
    """Ours are saved sorted; a file from elsewhere may not be."""
    model, folder = saved

    def shuffle(tensors):
        order = torch.tensor([2, 0, 3, 1])
        return {name: t[order] if name.endswith("_indices") else t[:, order] for name, t in tensors.items()}

    rewrite_tensors(folder, shuffle)
    loaded = PeftModel.from_pretrained(tiny.llama(), folder)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert tiny.same_bits(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))


def test_column_numbers_of_32_bits_are_read(saved):
    model, folder = saved
    rewrite_tensors(folder, lambda tensors: {n: t.int() if n.endswith("_indices") else t for n, t in tensors.items()})
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder)), tiny.logits(model))


# ---------------------------------------------------------------------------------------------- upstream's files


def test_a_file_with_upstream_s_fields_only_is_loaded(saved):
    model, folder = saved
    ours = {field.name for field in fields(paca.PacaConfig)} - {field.name for field in fields(PeftConfig)}
    upstream = {
        *("r", "paca_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("random_seed", "init_weights", "modules_to_save"),
    }
    rewrite(folder, **dict.fromkeys(ours - upstream), random_seed=None, peft_version="0.22.0")
    assert "base_fingerprint" not in json.loads((folder / "adapter_config.json").read_text())
    loaded = PeftModel.from_pretrained(tiny.llama(), folder)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert torch.equal(tiny.logits(loaded.merge_and_unload()), tiny.logits(model))
