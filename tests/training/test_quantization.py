"""The key `quantization` loads the frozen linears in few bits, or says before any work why it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from paca import quantising
from paca.cli import main
from paca.pretrained import load_model, to_device
from paca.recipe import RecipeError, RunOptions, read_recipe
from paca.registry import get_backend


def options(model: Path, wanted: str, dtype: str = "float32") -> RunOptions:
    words = ["--model_name_or_path", str(model), "--output_dir", "out", "--quantization", wanted, "--dtype", dtype]
    return read_recipe(None, words).run


def load(model: Path, wanted: str, dtype: str = "float32") -> Any:
    return load_model(options(model, wanted, dtype), AutoConfig.from_pretrained(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_is_loaded_as_qlora_does_it(llama: Path, dtype: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load(llama, "nf4", dtype)
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == getattr(torch, dtype)
    assert type(model.lm_head) is torch.nn.Linear
    assert {model.lm_head.weight.dtype, model.model.norm.weight.dtype} == {getattr(torch, dtype)}


def test_int8_is_loaded_as_bitsandbytes_has_it(llama: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = load(llama, "int8").model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear8bitLt)
    assert layer.weight.dtype == torch.int8


def test_fp8_is_loaded_as_torchao_has_it(llama: Path) -> None:
    torchao = pytest.importorskip("torchao")
    weight = load(llama, "fp8", "bfloat16").model.layers[0].mlp.up_proj.weight
    assert type(weight).__module__.partition(".")[0] == torchao.__name__
    assert weight.qdata.dtype == torch.float8_e4m3fn


def test_a_quantised_model_is_not_moved(llama: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(llama, "int8")
    assert to_device(model, torch.device("meta")) is model
    assert to_device(torch.nn.Linear(1, 1), torch.device("meta")).weight.is_meta


@pytest.mark.parametrize("wanted", ["nf4", "int8", "fp8"])
def test_an_adapter_meets_the_base_that_it_was_trained_on(
    wanted: str, llama: Path, texts: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(quantising.PACKAGES[wanted])
    run, score = tmp_path / "run", tmp_path / "score.json"
    data = ["--train_file", str(texts), "--eval_file", str(held_out), "--disable_tqdm"]
    how = ["--max_steps", "12", "--per_device_train_batch_size", "8", "--learning_rate", "2e-2", "--r", "8"]
    model = ["--model_name_or_path", str(llama), "--quantization", wanted, "--output_dir", str(run)]
    assert main(["train", *model, *data, *how]) == 0
    told = json.loads((run / "all_results.json").read_text())
    assert told["eval_loss"] < told["eval_before_loss"] - 0.2
    assert "quantization_config=" in (run / "README.md").read_text()

    assert main(["evaluate", str(run), "--json", str(score)]) == 0
    assert json.loads(score.read_text())["eval_loss"] == pytest.approx(told["eval_loss"], rel=1e-5)
    assert main(["evaluate", str(run), "--base", "--json", str(score)]) == 0
    assert json.loads(score.read_text())["eval_loss"] == pytest.approx(told["eval_before_loss"], rel=1e-5)
    assert f"torch.float32, frozen linears in {wanted}, on cpu" in capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "7 then ", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("7 then ")

    assert main(["evaluate", str(run), "--quantization", "none"]) == 2
    assert "was made for another base model" in capsys.readouterr().err

    (run / "recipe.yaml").unlink()  # the adapter's own settings say it, too
    assert quantising.recorded(json.loads((run / "adapter_config.json").read_text())) == wanted
    assert main(["evaluate", str(run), "--eval_file", str(held_out), "--json", str(score)]) == 0
    assert json.loads(score.read_text())["eval_loss"] == pytest.approx(told["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("then", ["nf4", "none"])
def test_a_checkpoint_is_not_gone_on_from_on_a_base_quantised_otherwise(
    then: str, llama: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    words = ["train", "--model_name_or_path", str(llama), "--train_file", str(texts), "--disable_tqdm", "--r", "4"]
    words += ["--save_steps", "2", "--save_strategy", "steps", "--per_device_train_batch_size", "2"]
    first, more = tmp_path / "first", tmp_path / "more"
    assert main([*words, "--quantization", "int8", "--max_steps", "2", "--output_dir", str(first)]) == 0
    resumed = [*words, "--max_steps", "4", "--resume_from_checkpoint", str(first / "checkpoint-2")]
    assert main([*resumed, "--quantization", then, "--output_dir", str(more)]) == 2
    told = capsys.readouterr().err
    assert f"its base was int8, this one is {'not quantised' if then == 'none' else then}" in told
    assert not list(more.glob("*.safetensors"))
    assert main([*resumed, "--quantization", "int8", "--output_dir", str(tmp_path / "same")]) == 0


def test_how_a_base_was_quantised_is_told_by_any_of_its_layers() -> None:
    plain, quantised = {"score": "32:0123456789abcdef"}, {"q_proj": "32:nf4:0123456789abcdef"}
    assert quantising.recorded({"base_fingerprint": plain | quantised}) == "nf4"
    assert quantising.recorded({"base_fingerprint": plain}) == "none"
    assert quantising.recorded({}) == "none"


@pytest.mark.parametrize(("wanted", "package"), [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("fp8", "torchao")])
def test_a_missing_package_is_named(llama: Path, wanted: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=rf"quantization {wanted} needs {package}.*pip install 'paca-torch\[quant\]'"):
        load(llama, wanted)


def test_what_cannot_be_quantised_is_refused_before_data_is_read(
    llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    recipe = ["--model_name_or_path", str(llama), "--quantization", "fp8", "--r", "8", "--output_dir", str(tmp_path)]
    assert main(["train", *recipe, "--train_file", str(texts)]) == 2
    told = capsys.readouterr()
    assert "quantization fp8 needs torchao" in told.err
    assert "training data" not in told.out


@pytest.mark.parametrize(("formats", "told"), [({"nf4"}, "nf4, none"), (set(), "none")])
def test_a_format_that_the_backend_lacks_is_refused(
    llama: Path, formats: set[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend()
    only = replace(backend.capabilities, quantised=frozenset(formats))
    monkeypatch.setattr(type(backend), "capabilities", property(lambda self: only))
    with pytest.raises(RecipeError, match=f"quantization int8: the cpu backend does not have it; it has {told}$"):
        load(llama, "int8")


def test_a_device_that_bitsandbytes_lacks_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(RecipeError, match="is for cuda, not cpu"):
        load(llama, "nf4")


def test_a_model_that_is_quantised_already_is_refused(llama: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(RecipeError, match=r"quantised already \(gptq\).*leave the key out"):
        load_model(options(llama, "nf4"), config)


def test_another_format_is_refused_with_those_there_are(llama: Path) -> None:
    with pytest.raises(RecipeError, match="quantization must be one of none, nf4, int8, fp8"):
        options(llama, "nf3")
