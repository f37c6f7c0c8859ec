"""The switch suite measures switches that really happen, and says whether the base weights survived them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import paca
from paca.bench import command, main, report, switching, tables, ways
from paca.bench.result import Seconds
from paca.bench.shapes import SHAPES

TINY = replace(SHAPES["tiny"], layers=1, tokens=8)


@pytest.fixture(scope="module")
def result() -> switching.SwitchResult:
    """A run of one round on one tiny layer."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    given = command._parser().parse_args(["--suite", "switch", "--rounds", "1", "--warmup", "1", *sizes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switching, "AFTERWARDS", 20)
        options = command._options(given)
        return switching.measure(options, "paca bench --suite switch", "cpu", paca.set_backend("cpu"))


def test_every_way_is_measured_in_every_round(result: switching.SwitchResult) -> None:
    assert list(result.ways) == list(ways.WAYS)
    assert all(len(way.switch) == len(way.forward) == len(result.load) == 1 for way in result.ways.values())


def test_paca_gives_the_base_weights_back_and_fusing_lora_does_not(result: switching.SwitchResult) -> None:
    changed = {name: way.changed for name, way in result.ways.items()}
    assert {changed[name] for name in ways.WAYS if name.startswith("paca")} == {0.0}
    assert changed["lora-fuse"] is not None
    assert changed["lora-fuse"] > 0.001


def test_adapters_have_equal_parameter_counts_as_far_as_ranks_allow(result: switching.SwitchResult) -> None:
    counts = {name: way.adapter_parameters for name, way in result.ways.items()}
    assert len({counts[name] for name in counts if name.startswith("paca")}) == 1
    assert counts["lora-fuse"] == pytest.approx(counts["paca-bank"], rel=0.1)


def test_a_way_that_does_not_switch_is_no_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways.PacaBank, "switch", lambda self, name: None)
    way = ways.PacaBank(TINY, torch.float32, torch.device("cpu"), 0)
    with pytest.raises(RuntimeError, match="a switch does not change the output"):
        switching._check_that_it_switches("paca-bank", way, torch.randn(1, 8, TINY.hidden))


def test_a_result_is_read_back_and_its_table_says_what_the_samples_say(
    result: switching.SwitchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, way in result.ways.items():
        microseconds = {"paca-bank": 20, "lora-fuse": 800}.get(name, 100)
        way.switch, way.forward = [Seconds(microseconds * 1e-6, 1.0)] * 3, [Seconds(2e-3, 1.0)] * 3
        way.changed = 0.125
    result.write(tmp_path / "r.json")
    assert main(["--report", str(tmp_path / "r.json"), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown == tables.as_markdown(switching.tables(result), report.conditions(result))
    row = next(line for line in shown.splitlines() if line.startswith("| PaCA, AdapterBank.swap (r="))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == ["20", "40.0", "2.00", "1.000", "12.50 %"]
    assert main(["--report", str(tmp_path / "r.json"), "--clock", "wall"]) == 0
    assert "1,000,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "switch", "--methods", "paca-r8"], "--suite switch has its own methods"),
        (["--report", "r.json", "--plot", "r.png"], "is a result of --suite switch, of which there is no plot"),
        (["--report", "old.json"], "has version 0 of the format"),
    ],
)
def test_what_the_suite_cannot_do_is_said(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {"format": switching.FORMAT, "version": switching.VERSION}
    Path("r.json").write_text(json.dumps(made))
    Path("old.json").write_text(json.dumps({**made, "version": 0}))
    with pytest.raises(SystemExit):
        main(arguments)
    assert says in " ".join(capsys.readouterr().err.split())
