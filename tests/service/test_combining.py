"""Adapters are added, subtracted and compared exactly, column by column."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paca.cli import main
from paca.config import PacaConfig
from paca.overlap import changes, overlap, overlaps
from paca.saved import SavedAdapter, SavedLayer, read_adapter


def saved(folder: Path, **config: Any) -> Path:
    tiny.perturb(tiny.adapted(tiny.llama(), **config), seed=config.get("random_seed", 0)).save_pretrained(folder)
    return folder


def layer_of(columns: list[int], values: float = 1.0, out: int = 3) -> SavedLayer:
    return SavedLayer(torch.tensor(sorted(columns)), torch.full((out, len(columns)), values), 2.0)


def adapter_of(**layers: SavedLayer) -> SavedAdapter:
    return SavedAdapter(PacaConfig(base_fingerprint=dict.fromkeys(layers, "8:0")), layers)


def test_an_adapter_minus_itself_is_the_base_model_to_the_bit() -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(torch.bfloat16)))
    model.base_model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "nothing")
    model.set_adapter("nothing")
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama(torch.bfloat16)))


def test_forgetting_what_another_adapter_learnt_leaves_the_rest() -> None:
    """Task arithmetic: (a + b) − b is a, up to one rounding of the sum."""
    model = tiny.perturb(tiny.adapted(tiny.llama(torch.float64)))
    model.add_adapter("other", tiny.config(random_seed=4, r=7))
    tiny.perturb(model, "other", seed=8)
    wanted = tiny.logits(model)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    model.base_model.add_weighted_adapter(["both", "other"], [1.0, -1.0], "less")
    model.set_adapter("both")
    assert (tiny.logits(model) - wanted).abs().max() > 1e-2
    model.set_adapter("less")
    torch.testing.assert_close(tiny.logits(model), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "says"),
    [
        ([], [], "sum", "at least one adapter"),
        (["default"], [1.0, 2.0], "sum", "1 adapters need as many weights, found 2"),
        (["default"], [math.nan], "sum", r"finite numbers, found \[nan\]"),
        (["default"], ["1"], "sum", r"finite numbers, found \['1'\]"),
        (["default"], [1.0], "", "a name without dots, found ''"),
        (["default"], [1.0], "v1.5", "a name without dots, found 'v1.5'"),
    ],
)
def test_a_sum_that_cannot_be_is_refused_and_the_model_still_saves(
    adapters: list[str], weights: list[Any], name: str, says: str, tmp_path: Path
) -> None:
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError, match=says):
        model.base_model.add_weighted_adapter(adapters, weights, name)
    assert list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path)


columns = st.sets(st.integers(0, 7), min_size=1).map(sorted)


@settings(max_examples=50, deadline=None)
@given(columns, columns, st.integers(0, 100))
def test_shared_columns_and_the_cosine_are_those_of_the_dense_updates(
    one: list[int], two: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense, layers = [], []
    for chosen in (one, two):
        delta = torch.randn(3, len(chosen), generator=generator, dtype=torch.float64)
        layers.append(SavedLayer(torch.tensor(chosen), delta, 0.5))
        dense.append(torch.zeros(3, 8, dtype=torch.float64).index_copy_(1, torch.tensor(chosen), 0.5 * delta))
    found = overlap(adapter_of(x=layers[0]), adapter_of(x=layers[1]))
    assert [entry.name for entry in found] == ["x", "total"]
    wanted = torch.cosine_similarity(dense[0].flatten(), dense[1].flatten(), dim=0)
    for entry in found:
        assert entry.shared == len(set(one) & set(two))
        assert entry.by_chance == len(one) * len(two) / 8
        assert entry.cosine == pytest.approx(wanted.item(), abs=1e-12)


def test_layers_that_only_one_adapter_trains_count_in_the_total() -> None:
    first, second = adapter_of(x=layer_of([1, 2]), y=layer_of([0])), adapter_of(x=layer_of([2]), z=layer_of([5, 6]))
    total = overlaps({"first": first, "second": second})["first", "second"]
    assert (total.shared, total.first, total.second) == (1, 3, 3)
    assert total.cosine == pytest.approx(1 / 3)


def test_a_change_is_measured_as_it_acts_on_the_weight() -> None:
    layer = layer_of([2, 5, 7])
    layer.delta[:, 0], layer.delta[:, 1] = 0.0, 3.0
    [change] = changes(adapter_of(x=layer))
    assert (change.columns, change.width, change.parameters, change.largest, change.idle) == (3, 8, 9, 5, 1)
    assert change.norm == pytest.approx(math.sqrt(3 * (6.0**2 + 2.0**2)))


def test_the_command_prints_and_writes_what_adapters_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = saved(tmp_path / "law", random_seed=1), saved(tmp_path / "poems", random_seed=1, r=2)
    out = [str(tmp_path / name) for name in ("both.png", "both.json")]
    assert main(["adapters", str(one), str(two), "--layers", "--plot", out[0], "--json", out[1]]) == 0
    shown = capsys.readouterr().out
    assert "law: 14 layers, 56 columns" in shown
    assert "model.layers.1.mlp.down_proj" in shown
    assert "law and poems" in shown
    assert "28 of 28" in shown  # a smaller r of one seed draws a subset
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "both.json").read_text())
    first = written["adapters"]["law"]["layers"][0]
    assert first["index"] == read_adapter(one).layers[first["name"]].index.tolist()
    assert written["overlaps"][0]["layers"][-1]["shared"] == 28


def test_layers_of_one_kind_that_train_different_numbers_of_columns_take_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "law", rank_pattern={"layers.1.mlp.down_proj": 9})
    assert main(["adapters", str(tmp_path / "law")]) == 0
    [line] = [line.split() for line in capsys.readouterr().out.splitlines() if "down_proj" in line]
    assert line[:3] == ["down_proj", "2", "4…9/64"]


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_a_folder_in_place_of_the_file_is_refused_before_anything_is_shown(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "law")
    (tmp_path / "folder.png").mkdir()
    assert main(["adapters", str(tmp_path / "law"), option, str(tmp_path / "folder.png")]) == 2
    shown = capsys.readouterr()
    assert "folder.png cannot be written: it is a folder; name a file" in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    "wrong", ["nothing there", "no settings", "cut settings", "wrong settings", "lora", "other model"]
)
def test_what_is_no_pair_of_adapters_is_said_in_a_line(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = saved(tmp_path / "good"), tmp_path / "bad"
    says = {
        "nothing there": "is not a saved adapter",
        "no settings": "there is no adapter_config.json in it",
        "cut settings": "adapter_config.json is damaged, or not an adapter's",
        "wrong settings": "`r` must be a whole number greater than 0, found 0",
        "lora": "holds a LORA adapter",
        "other model": "different models",
    }
    if wrong.endswith("settings"):
        settings = saved(bad) / "adapter_config.json"
        text = settings.read_text()
        settings.unlink()
        if wrong != "no settings":
            settings.write_text(text[:99] if wrong == "cut settings" else text.replace('"r": 4', '"r": 0'))
    if wrong == "lora":
        bad.mkdir()
        (bad / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (bad / "adapter_model.safetensors").write_bytes(b"")
    if wrong == "other model":
        tiny.adapted(tiny.llama(intermediate_size=48)).save_pretrained(bad)
    assert main(["adapters", str(good), str(bad)]) == 2
    assert says[wrong] in capsys.readouterr().err
