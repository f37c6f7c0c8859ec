"""A PaCA adapter is a LoRA adapter whose A is one-hot: it converts without loss, and trains alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import paca
from paca.convert import export_lora

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = {
    "plain": {},
    "patterns": {
        "rank_pattern": {"up_proj": 7},
        "alpha_pattern": {"q_proj": 3},
        "target_modules": ["q_proj", "up_proj"],
    },
    "hand-chosen columns": {"columns": {"q_proj": [1, 5, 9]}, "target_modules": ["q_proj", "up_proj"]},
    "head and biases": {"modules_to_save": ["lm_head"], "bias": "paca_only", "target_modules": ["q_proj"]},
}


def base(dtype=torch.float32):
    return tiny.llama(dtype, attention_bias=True)


def trained(dtype=torch.float32, **given):
    model = tiny.adapted(base(dtype), **given)
    tiny.train(model)
    return model


def as_lora(model, onto, adapter="default"):
    """Convert, and give the LoRA to another copy of the base model."""
    config, tensors = paca.convert_to_lora(model, adapter)
    lora = get_peft_model(onto, config)
    result = set_peft_model_state_dict(lora, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return lora


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weights_have_the_same_bits(dtype, variant):
    model = trained(dtype, **VARIANTS[variant])
    lora = as_lora(model, base(dtype))
    merged = tiny.weights_of(model.merge_and_unload())
    assert tiny.same_bits(tiny.weights_of(lora.merge_and_unload()), merged)
    assert not tiny.same_bits(merged, tiny.weights_of(base(dtype)))


def test_unmerged_logits_agree_to_rounding_in_float32():
    model = trained()
    torch.testing.assert_close(tiny.logits(as_lora(model, base())), tiny.logits(model), atol=1e-6, rtol=1e-5)


def test_a_gpt2_converts():
    model = tiny.perturb(tiny.adapted(tiny.gpt2(), target_modules=["c_attn", "c_proj"]))
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        lora = as_lora(model, tiny.gpt2())
    torch.testing.assert_close(tiny.logits(lora), tiny.logits(model), atol=1e-6, rtol=1e-5)
    assert tiny.same_bits(tiny.weights_of(lora.merge_and_unload()), tiny.weights_of(model.merge_and_unload()))


def test_an_adapter_other_than_the_default_converts():
    model = trained()
    model.add_adapter("other", tiny.config(random_seed=4, target_modules=["up_proj"]))
    tiny.perturb(model, "other")
    model.set_adapter("other")
    other = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(as_lora(model, base(), "other")), other, atol=1e-6, rtol=1e-5)


def test_a_weighted_adapter_converts():
    model = trained()
    model.add_adapter("other", tiny.config(random_seed=4, target_modules=["up_proj"]))
    tiny.perturb(model, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "mixed")
    model.set_adapter("mixed")
    lora = as_lora(model, base(), "mixed")
    torch.testing.assert_close(tiny.logits(lora), tiny.logits(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_is_exported_as_its_model_converts(tmp_path, variant):
    model = trained(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "paca")
    assert export_lora(tmp_path / "paca", tmp_path / "lora") == tmp_path / "lora"
    _, tensors = paca.convert_to_lora(model)
    assert tiny.same_bits(load_file(tmp_path / "lora" / "adapter_model.safetensors"), tensors)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


LOAD_WITHOUT_PACA = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("paca", "paca_cpu"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
try:
    import paca
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("paca can be imported")
import torch
from peft import AutoPeftModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/lora")
    logits = model(input_ids=torch.load(f"{folder}/tokens.pt")).logits.detach()
    merged = {n: p.detach() for n, p in model.merge_and_unload().named_parameters()}
    torch.save((logits, merged), f"{folder}/found.pt")
"""


@pytest.mark.slow
def test_exported_folders_load_in_stock_peft_without_paca(tmp_path):
    models = {}
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        folder = tmp_path / str(dtype)
        tiny.llama(dtype).save_pretrained(folder / "base")
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype), tiny.config(rank_pattern={"up_proj": 7})
        )
        tiny.train(model)
        model.save_pretrained(folder / "paca")
        export_lora(folder / "paca", folder / "lora")
        written = {path.name for path in (folder / "lora").iterdir()}
        assert written == {"adapter_config.json", "adapter_model.safetensors"}
        torch.save(tiny.tokens(), folder / "tokens.pt")
        models[folder] = model, tolerance
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD_WITHOUT_PACA, *map(str, models)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for folder, (model, tolerance) in models.items():
        logits, merged = torch.load(folder / "found.pt")
        torch.testing.assert_close(logits, tiny.logits(model), atol=tolerance, rtol=tolerance)
        assert tiny.same_bits(merged, tiny.weights_of(model.merge_and_unload()))


# ---------------------------------------------------------------------------------------------- refused


def test_a_model_without_such_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"no PaCA adapter 'other'; it has: default \(.*PACA\)"):
        paca.convert_to_lora(tiny.adapted(base()), "other")
    lora = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"no PaCA adapter 'default'; it has: default \(.*LORA\)"):
        paca.convert_to_lora(lora)
    with pytest.raises(ValueError, match="it has: none"):
        paca.convert_to_lora(base())


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a saved adapter: there is no adapter_model.safetensors in it"):
        export_lora(tmp_path, tmp_path / "lora")


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    trained(target_modules=["q_proj"]).save_pretrained(tmp_path / "paca")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty; choose a new folder"):
        export_lora(tmp_path / "paca", tmp_path / "lora")
    assert (tmp_path / "lora" / "mine.txt").read_text() == "keep"


def test_a_truncated_adapter_is_refused_and_leaves_nothing_behind(tmp_path):
    trained(target_modules=["q_proj"]).save_pretrained(tmp_path / "paca")
    weights = tmp_path / "paca" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        export_lora(tmp_path / "paca", tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["paca"]


def test_a_lora_folder_is_refused(tmp_path):
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds a .*LORA adapter, not PaCA"):
        export_lora(tmp_path / "other", tmp_path / "lora")


def test_an_adapter_of_another_library_needs_its_base_model(tmp_path):
    trained(target_modules=["q_proj"]).save_pretrained(tmp_path / "paca")
    path = tmp_path / "paca" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": None}))
    with pytest.raises(ValueError, match=r"does not record the width of .*q_proj.*convert_to_lora\(model\)"):
        export_lora(tmp_path / "paca", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "paca")
    torch.testing.assert_close(tiny.logits(as_lora(loaded, base())), tiny.logits(loaded), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- trains alike


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_paca_follows_the_training_of_a_lora_with_frozen_one_hot_rows(residency):
    """An oracle that shares none of our code: B trains, A picks the same columns and stays."""
    model = tiny.adapted(tiny.llama(torch.float64), residency=residency)
    lora = as_lora(model, tiny.llama(torch.float64))
    for name, parameter in lora.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    ours, theirs = (tiny.train(m, steps=10, lr=2e-2) for m in (model, lora))
    assert ours[-1] < 0.95 * ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=0, rtol=1e-6)  # losses are float32
    torch.testing.assert_close(tiny.logits(model), tiny.logits(lora), atol=1e-10, rtol=1e-10)


def test_a_converted_adapter_records_the_folder_of_its_base(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(tiny.llama()).from_pretrained(tmp_path / "base"), tiny.config())
    config, _ = paca.convert_to_lora(model)
    assert Path(config.base_model_name_or_path) == tmp_path / "base"
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)
