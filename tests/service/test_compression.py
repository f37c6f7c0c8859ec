"""Compressed adapters lose what their bits say and no more, and load as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

import paca
from paca.cli import main
from paca.compress import BITS, pack, quantise, unpack
from paca.compressing import compress
from paca.saved import read_adapter

deltas = st.tuples(
    st.integers(1, 19), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1e-30, 1e-3, 1.0, 1e20])
)


def drawn(shape: tuple[int, int, int, float]) -> torch.Tensor:
    rows, columns, seed, size = shape
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    delta[:, 0] *= seed % 2  # a column that never trained
    return delta


@settings(max_examples=60, deadline=None)
@given(deltas, st.sampled_from(BITS))
def test_packing_is_exact_and_takes_the_bits_it_says(shape: tuple[int, int, int, float], bits: int) -> None:
    quantised = quantise(drawn(shape), bits)
    index = torch.arange(shape[1]) * 3
    data = pack(index, quantised)
    assert len(data) == 9 + shape[1] * (8 + -(-shape[0] * bits // 8))
    found, again = unpack(data)
    assert torch.equal(found, index)
    assert torch.equal(again.codes, quantised.codes)
    assert torch.equal(again.scale, quantised.scale)


@settings(max_examples=60, deadline=None)
@given(deltas)
def test_eight_bits_are_wrong_by_half_a_step_at_most(shape: tuple[int, int, int, float]) -> None:
    delta = drawn(shape)
    quantised = quantise(delta, 8)
    assert ((quantised.values() - delta).abs() <= 0.5001 * quantised.scale).all()


@settings(max_examples=60, deadline=None)
@given(deltas, st.floats(0.5, 2.0))
def test_one_bit_keeps_signs_with_the_best_scale_there_is(shape: tuple[int, int, int, float], other: float) -> None:
    delta = drawn(shape).double()
    quantised = quantise(delta, 1)
    values = quantised.values().double()
    assert (values * delta >= 0).all()
    error, elsewhere = ((factor * values - delta).square().sum(0) for factor in (1.0, other))
    assert (error <= elsewhere * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(deltas)
def test_four_bits_clip_no_worse_than_the_largest_value_asks(shape: tuple[int, int, int, float]) -> None:
    delta = drawn(shape)
    plain = delta.abs().amax(0).clamp_min(1e-38) / 7
    unclipped = (delta / plain).round() * plain
    errors = [(values.double() - delta.double()).square().sum(0) for values in (quantise(delta, 4).values(), unclipped)]
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-70).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_compressed_adapter_loads_and_computes_with_its_rounded_deltas(tmp_path: Path, bits: int) -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(), modules_to_save=["norm"]))
    model.save_pretrained(tmp_path / "paca")
    compress(tmp_path / "paca", tmp_path / "small", bits)
    with torch.no_grad():
        for layer in tiny.layers_of(model):
            delta = layer.paca_delta["default"]
            delta.copy_(quantise(delta, bits).values())
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "small")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    loaded.add_adapter("other", tiny.config(random_seed=5))
    loaded.load_adapter(tmp_path / "small", "again")
    loaded.set_adapter("again")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    loaded.save_pretrained(tmp_path / "expanded", selected_adapters=["default"])
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "expanded")), tiny.logits(model))


def test_the_report_says_what_was_lost(tmp_path: Path) -> None:
    tiny.perturb(tiny.adapted(tiny.llama(), alpha_pattern={"q_proj": 40})).save_pretrained(tmp_path / "paca")
    errors = []
    for bits in BITS:
        report = compress(tmp_path / "paca", tmp_path / str(bits), bits)
        before, after = (read_adapter(tmp_path / name) for name in ("paca", str(bits)))
        lost = {name: layer.update() - after.layers[name].update() for name, layer in before.layers.items()}
        whole = torch.cat([layer.update().flatten() for layer in before.layers.values()])
        for name, difference in lost.items():
            assert report.errors[name] == pytest.approx(
                float(difference.norm() / before.layers[name].update().norm()), rel=1e-4
            )
        assert report.total == pytest.approx(
            float(torch.cat([d.flatten() for d in lost.values()]).norm() / whole.norm()), rel=1e-4
        )
        assert report.after == (tmp_path / str(bits) / "adapter_model.safetensors").stat().st_size < report.before
        errors.append(report.total)
    assert errors[0] < 0.01 < errors[1] < 0.2 < errors[2] < 0.7


def test_banks_and_exports_take_compressed_adapters(tmp_path: Path) -> None:
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(tmp_path / "paca")
    compress(tmp_path / "paca", tmp_path / "small", 4)
    bank = paca.AdapterBank(tiny.llama())
    bank.load("small", tmp_path / "small")
    bank.swap("small")
    assert torch.equal(
        tiny.logits(bank.model), tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "small"))
    )
    assert main(["export", str(tmp_path / "small"), "--to", "lora", "--out", str(tmp_path / "lora")]) == 0


def test_a_base_model_that_is_gone_is_said_before_a_copy_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(tmp_path / "paca")
    file, gone = tmp_path / "paca" / "adapter_config.json", str(tmp_path / "gone")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": gone}))
    words = ["compress", str(tmp_path / "paca"), "--bits", "8", "--out", str(tmp_path / "small"), "--evaluate"]
    assert main(words) == 2
    assert f"model_name_or_path {gone}: there is no such folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["paca"]


def test_another_base_model_is_refused_for_compressed_adapters_too(tmp_path: Path) -> None:
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(tmp_path / "paca")
    compress(tmp_path / "paca", tmp_path / "small", 1)
    with pytest.raises(paca.BaseMismatchError):
        PeftModel.from_pretrained(tiny.llama(seed=3), tmp_path / "small")


@pytest.mark.parametrize(
    ("damage", "says"),
    [(lambda data: data[:-1], "bytes, found"), (lambda data: data[:4], "at least 9 bytes, found 4")],
    ids=["cut", "cut short"],
)
def test_a_damaged_layer_is_named(tmp_path: Path, damage: Any, says: str) -> None:
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(tmp_path / "paca")
    compress(tmp_path / "paca", tmp_path / "small", 4)
    file = tmp_path / "small" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.up_proj.paca_packed"
    save_file(tensors | {key: damage(tensors[key]).clone()}, file)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.up_proj: .*{says}"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "small")


def test_what_cannot_be_compressed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama()))
    with torch.no_grad():
        tiny.layers_of(model)[0].paca_delta["default"][0, 0] = float("nan")
    model.save_pretrained(tmp_path / "paca")
    assert main(["compress", str(tmp_path / "paca"), "--bits", "1", "--out", str(tmp_path / "small")]) == 2
    assert "not finite" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "paca"), "--bits", "4", "--out", str(tmp_path / "paca")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "paca"), "--bits", "4", "--out", str(tmp_path / "x"), "--seed", "1"]) == 2
    assert "--seed is for --evaluate" in capsys.readouterr().err
    report = str(tmp_path / "nowhere" / "report.json")
    for words in (["compress", str(tmp_path / "paca"), "--bits", "4", "--out", str(tmp_path / "x")], ["adapters", "x"]):
        assert main([*words, "--json", report]) == 2
        assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["paca"]


def test_the_command_reports_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(tmp_path / "paca")
    words = ["compress", str(tmp_path / "paca"), "--bits", "4", "--out", str(tmp_path / "small")]
    assert main([*words, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    shown = capsys.readouterr().out
    assert f"{report['after']:,}" in shown
    assert f"relative error of the update {report['total']:.4f}" in shown
