"""`paca estimate` tells what a user asks, from a model that is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from paca.cli import main
from paca.estimate.architectures import NAMES, config_of
from paca.estimate.methods import METHODS
from paca.estimate.table import table

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration alone, without weights or tokenizer."""
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def told(tmp_path: Path, *words: str) -> dict[str, Any]:
    assert main(["estimate", *words, "--json", str(tmp_path / "told.json")]) == 0
    result: dict[str, Any] = json.loads((tmp_path / "told.json").read_text())
    return result


def test_methods_are_told_side_by_side(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = told(tmp_path, str(config), "--r", "8", "--max_length", "128")
    printed = capsys.readouterr().out
    assert list(result["methods"]) == list(METHODS)
    for method in result["methods"].values():
        assert f"{method['label']:<10}" in printed
        assert f"{method['peak_bytes'] / 2**30:9.2f}" in printed
        assert sum(method["bytes_at_peak"].values()) == method["peak_bytes"]
    assert "predicted from shapes and not measured" in printed
    by_peak = {name: method["peak_bytes"] for name, method in result["methods"].items()}
    assert by_peak["qpaca"] < by_peak["paca"] < by_peak["lora-nocast"] < by_peak["lora"]
    assert by_peak["qpaca"] < by_peak["qlora-nocast"] < by_peak["qlora"]


def test_what_fits_is_told_for_each_device(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--max_length", "512", "--gpu", "0.5GB,1.1GB", "--methods", "paca")
    small, large = told(tmp_path, str(config), *words)["methods"]["paca"]["fits"].values()
    assert not small["plain"]["fits"]
    assert small["plain"]["longest_sequence"] == small["checkpointed"]["largest_batch"] == 0
    assert large["plain"]["fits"]
    assert large["plain"]["longest_sequence"] == 512  # what the model was made for
    assert 1 < large["plain"]["largest_batch"] < large["checkpointed"]["largest_batch"]
    printed = capsys.readouterr().out
    assert "the allocator loses 5% and context and libraries take 1 GiB (assumed)" in printed
    assert f"{'no':>8}{'-':>10}{'-':>10}" in printed


def test_a_folder_and_its_configuration_say_the_same(config: Path, tmp_path: Path) -> None:
    words = ("--methods", "paca", "--max_length", "64", "--per_device_train_batch_size", "3")
    assert told(tmp_path, str(config), *words)["methods"] == told(tmp_path, str(config.parent), *words)["methods"]


def test_a_recipe_is_told_as_it_would_run(config: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"model_name_or_path: {config.parent}\noutput_dir: out\nr: 4\nmax_length: 96\nquantization: int8\n"
    )
    result = told(tmp_path, str(recipe), "--methods", "qpaca", "--gradient_checkpointing")
    assert result["work"]["sequences"] == 8  # the Trainer's default
    assert (result["work"]["length"], result["work"]["checkpointing"], result["r"]) == (96, True, 4)
    assert result["methods"]["qpaca"]["label"] == "QPaCA int8"


def test_methods_that_are_the_same_in_float32_are_told_once(config: Path, tmp_path: Path) -> None:
    result = told(tmp_path, str(config), "--dtype", "float32", "--max_length", "64")
    assert list(result["methods"]) == ["lora", "paca", "qlora", "qpaca"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say which model"),
        (("nowhere/at/all",), "there is no such folder"),
        (("CONFIG", "--gpu", "H100"), "'H100' is no size; give one such as 80GB"),
        (("CONFIG", "--methods", "paca,dora"), "'dora' is no method; there are lora, lora-nocast, paca"),
        (("CONFIG", "--ranks", "8"), "there is no key 'ranks'"),
        (("CONFIG", "--r", "1000"), "r = 1000 is more than the 128 input columns"),
        (("CONFIG", "--max_length", "1024"), "max_length 1024 is more than the 512 tokens"),
        (("README",), "is no model's configuration"),
    ],
    ids=str,
)
def test_what_cannot_be_told_is_refused(
    config: Path, tmp_path: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README").write_text("hello")
    files = {"CONFIG": str(config), "README": str(tmp_path / "README")}
    assert main(["estimate", *(files.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-3-8b", 8.030), ("llama-3.1-70b", 70.554)],
)
def test_known_models_have_the_size_that_is_published(name: str, billions: float) -> None:
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions


def test_help_names_all_models_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*NAMES, *METHODS))


def test_the_page_shows_what_was_recorded() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "estimate.md").read_text()
    prediction, check = (
        json.loads((docs / "estimate-result" / f"{name}.json").read_text()) for name in ("llama-3.1-70b", "check-cpu")
    )
    assert "\n".join(table(prediction)) in page
    assert prediction["command"] in page
    assert check["command"] in page
    for row in check["compared"]:
        assert f"| {row['predicted'] / 2**20:.1f} | {row['measured'] / 2**20:.1f} | {row['ratio']:.3f} |" in page
        assert abs(row["ratio"] - 1) < 0.15


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model_type": "llama", "hidden_size": "wide"}, "no model's configuration.*hidden_size"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}, "no model's configuration.*multiple"),
        ({"model_type": "t5"}, "T5Config"),
        ({"sizes": [1, 2]}, "no model's configuration.*model_type"),
    ],
)
def test_a_configuration_that_is_none_of_a_language_model_is_refused_in_few_words(
    settings: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    assert main(["estimate", str(file)]) == 2
    told = capsys.readouterr().err
    assert re.search(why, told, re.DOTALL)
    assert len(told) < 500


def test_a_name_that_nobody_knows_is_answered_with_those_that_are_built_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["estimate", "llama-9"]) == 2
    assert "llama-9 cannot be loaded" in (told := capsys.readouterr().err)
    assert "llama-3.1-70b" in told


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_predicted(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(config), "--json", str(tmp_path / "none" / "told.json")]) == 2
    told = capsys.readouterr()
    assert "there is no folder" in told.err
    assert told.out == ""
