"""Adapters leave for LoRA servers and come from other tools without losing a bit."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import paca
from paca.cli import main
from paca.convert import adapter_of, export_lora, import_lora
from paca.saved import read_adapter

UNEVEN = {"rank_pattern": {"up_proj": 7, "v_proj": 1}, "alpha_pattern": {"q_proj": 3}}


def saved(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A trained adapter in a folder, and its model."""
    model = tiny.perturb(tiny.adapted(tiny.llama(dtype), **config))
    model.save_pretrained(folder)
    return model


def base_folder(folder: Path, **config: Any) -> Path:
    """The tiny Llama and its tokenizer, saved."""
    tiny.llama(**config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def merged(model: Any) -> dict[str, torch.Tensor]:
    return tiny.weights_of(model.merge_and_unload())


# ------------------------------------------------------------------------------------------ to servers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_rank_and_one_scale_lose_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path / "paca", dtype, **UNEVEN)
    export_lora(tmp_path / "paca", tmp_path / "lora", for_server=True)
    lora = PeftModel.from_pretrained(tiny.llama(dtype), tmp_path / "lora")
    assert tiny.same_bits(merged(lora), merged(model))


def test_what_vllm_reads_is_there_and_nothing_else(tmp_path: Path) -> None:
    """By vllm/lora/peft_helper.py and lora_model.py: three settings, one rank, A and B of linear layers."""
    saved(tmp_path / "paca", **UNEVEN)
    export_lora(tmp_path / "paca", tmp_path / "lora", for_server=True)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (7, 7, "none")
    assert len(config["target_modules"]) == 14
    assert not any(
        config[key] for key in ("modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    )
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        name, kind = key.removeprefix("base_model.model.").rsplit(".", 2)[0], key.split(".")[-2]
        assert name in config["target_modules"]
        assert tensor.shape[0 if kind == "lora_A" else 1] == 7
    assert len(tensors) == 2 * 14


@pytest.mark.parametrize("given", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_what_no_server_loads_is_refused_with_the_reason(tmp_path: Path, given: dict[str, Any]) -> None:
    tiny.adapted(tiny.llama(attention_bias=True), **given).save_pretrained(tmp_path / "paca")
    with pytest.raises(ValueError, match=r"a LoRA server takes trained columns only, and this adapter also trains"):
        export_lora(tmp_path / "paca", tmp_path / "lora", for_server=True)
    assert [path.name for path in tmp_path.iterdir()] == ["paca"]


def test_the_command_says_how_to_serve_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "paca", r=9)
    assert main(["export", str(tmp_path / "paca"), "--to", "vllm", "--out", str(tmp_path / "one")]) == 0
    assert "--enable-lora --max-lora-rank 16 " in capsys.readouterr().out
    assert main(["export", str(tmp_path / "paca"), "--to", "llama.cpp", "--out", str(tmp_path / "two")]) == 0
    assert "convert_lora_to_gguf.py --base" in capsys.readouterr().out


@pytest.mark.parametrize("reader", ["vllm", "llama.cpp"])
def test_the_command_that_is_shown_can_be_pasted_whatever_the_folder_is_called(
    reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "paca")
    out = str(tmp_path / "one's own")
    assert main(["export", str(tmp_path / "paca"), "--to", reader, "--out", out]) == 0
    assert shlex.split(capsys.readouterr().out.split("with: ")[1])[-1] in (out, f"NAME={out}")


def test_a_disk_that_fills_up_is_said_in_a_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    saved(tmp_path / "paca")
    monkeypatch.setattr("paca.saved.save_file", fill_up)
    assert main(["export", str(tmp_path / "paca"), "--to", "lora", "--out", str(tmp_path / "lora")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'lora'} cannot be written: " in said
    assert "No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["paca"]


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP does not name a checkout of llama.cpp")
def test_llama_cpp_converts_it(tmp_path: Path) -> None:
    import gguf

    base = base_folder(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny.config(**UNEVEN))
    tiny.perturb(model).save_pretrained(tmp_path / "paca")
    export_lora(tmp_path / "paca", tmp_path / "lora", for_server=True)
    script, out = Path(os.environ["LLAMA_CPP"], "convert_lora_to_gguf.py"), tmp_path / "lora.gguf"
    words = [sys.executable, script, "--base", base, "--outfile", out, "--outtype", "f32", tmp_path / "lora"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(out).tensors}
    assert len(tensors) == 2 * 14
    ours = adapter_of(model).layers["model.layers.1.mlp.down_proj"]
    b, a = tensors["blk.1.ffn_down.weight.lora_b"], tensors["blk.1.ffn_down.weight.lora_a"]
    dense = torch.zeros(len(ours.delta), a.shape[1]).index_copy_(1, ours.index, ours.update())
    assert torch.equal(b @ a, dense)


def test_a_16_bit_checkpoint_is_written_in_shards(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny.config())
    tiny.perturb(model).save_pretrained(tmp_path / "paca")
    words = ["merge", str(tmp_path / "paca"), "--out", str(tmp_path / "merged"), "--dtype", "bfloat16"]
    words += ["--tokenizer_name_or_path", str(base), "--max-shard-size", "20KB"]
    assert main(words) == 0
    assert main([*words[:3], str(tmp_path / "again"), *words[4:], "--requantize"]) == 2  # there is nothing to quantise
    shards = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    wanted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), tmp_path / "paca"
    )
    assert tiny.same_bits(tiny.weights_of(found), merged(wanted))


# ------------------------------------------------------------------------------------------ from other tools


@pytest.mark.parametrize("for_server", [False, True])
@pytest.mark.parametrize("given", [{}, UNEVEN], ids=["even", "uneven"])
def test_what_was_exported_comes_back(tmp_path: Path, given: dict[str, Any], for_server: bool) -> None:
    model = saved(tmp_path / "paca", **given)
    export_lora(tmp_path / "paca", tmp_path / "lora", for_server=for_server)
    assert import_lora(tmp_path / "lora", tmp_path / "back") == tmp_path / "back"
    before, after = read_adapter(tmp_path / "paca"), read_adapter(tmp_path / "back")
    for name, layer in before.layers.items():
        assert torch.equal(after.layers[name].index, layer.index)
        assert torch.equal(after.layers[name].update(), layer.update())
    back = PeftModel.from_pretrained(tiny.llama(), tmp_path / "back")
    assert torch.equal(tiny.logits(back), tiny.logits(model))
    export_lora(tmp_path / "back", tmp_path / "again")


def one_hot_lora(folder: Path, a: torch.Tensor, **config: Any) -> Any:
    """A LoRA adapter of one tiny layer with this A; B is random."""
    base = tiny.mlp()
    model = get_peft_model(base, LoraConfig(r=len(a), target_modules=["first"], **config))
    layer = model.base_model.model.first
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        ([{7: 1.0}, {2: 1.0}], {"lora_alpha": 3}),
        ([{7: 1.0}, {2: 1.0}], {"lora_alpha": 3, "use_rslora": True}),
        ([{7: -0.5}, {2: 4.0}], {"lora_alpha": 2}),
        ([{2: 1.0}, {}, {2: 1.0}, {9: 2.0}], {"lora_alpha": 5}),
    ],
    ids=["unsorted", "rank-stabilised", "scaled", "empty and repeated"],
)
def test_rows_of_one_entry_become_columns(tmp_path: Path, rows: list[dict[int, float]], config: dict[str, Any]) -> None:
    a = torch.zeros(len(rows), 10)
    for row, entries in enumerate(rows):
        for column, value in entries.items():
            a[row, column] = value
    lora = one_hot_lora(tmp_path / "lora", a, **config)
    import_lora(tmp_path / "lora", tmp_path / "paca")
    model = PeftModel.from_pretrained(tiny.mlp(), tmp_path / "paca")
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(model.double()(x), lora.double()(x), atol=1e-6, rtol=0)
    assert model.base_model.model.first.paca_indices["default"].tolist() == sorted({k for row in rows for k in row})
    scale = config["lora_alpha"] / (math.sqrt(len(rows)) if config.get("use_rslora") else len(rows))
    assert model.base_model.model.first.scaling["default"] == scale


def test_a_lora_that_mixes_columns_is_refused_and_named(tmp_path: Path) -> None:
    one_hot_lora(tmp_path / "lora", torch.eye(2, 10) + 1.0)
    with pytest.raises(ValueError, match=r"first: row 0 of A mixes 10 columns, so this LoRA is no PaCA adapter"):
        import_lora(tmp_path / "lora", tmp_path / "paca")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_what_paca_has_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_hot_lora(tmp_path / "dora", torch.eye(2, 10), use_dora=True)
    assert main(["import", str(tmp_path / "dora"), "--out", str(tmp_path / "paca")]) == 2
    assert "uses DoRA" in capsys.readouterr().err


def test_an_adapter_of_pefts_own_paca_is_imported_with_its_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_folder(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny.config())
    tiny.perturb(model).save_pretrained(tmp_path / "upstream")
    file = tmp_path / "upstream" / "adapter_config.json"
    known = {"r", "paca_alpha", "target_modules", "random_seed", "init_weights", "peft_type", "task_type"}
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key in known}))
    words = ["import", str(tmp_path / "upstream"), "--out", str(tmp_path / "ours")]
    assert main(words) == 2
    assert "does not name its base model; say it with --base" in capsys.readouterr().err
    assert main([*words, "--base", str(base)]) == 0
    export_lora(tmp_path / "ours", tmp_path / "lora")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert tiny.same_bits(merged(lora), merged(model))
    other = base_folder(tmp_path / "other", intermediate_size=48)
    assert main([*words[:2], "--out", str(tmp_path / "wrong"), "--base", str(other)]) == 2
    assert "it is another base model" in capsys.readouterr().err


def test_an_adapter_in_a_model_is_read_as_if_it_had_been_saved(tmp_path: Path) -> None:
    model = saved(tmp_path, **UNEVEN)
    here, there = adapter_of(model), read_adapter(tmp_path)
    assert here.layers.keys() == there.layers.keys()
    for name, layer in here.layers.items():
        assert torch.equal(layer.delta, there.layers[name].delta)
        assert torch.equal(layer.index, there.layers[name].index)
        assert layer.scale == there.layers[name].scale
        assert here.width(name) == there.width(name)
    assert paca.PacaConfig().base_fingerprint is None
