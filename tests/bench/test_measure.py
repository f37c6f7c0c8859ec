"""A measurement compares like with like, and its file has what the tables need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import paca
from paca.bench import main
from paca.bench.agreement import deviation, first_step
from paca.bench.contestant import Contestant
from paca.bench.methods import parse_methods
from paca.bench.peak import measure_peak
from paca.bench.result import read
from paca.bench.shapes import SHAPES

SHAPE = SHAPES["tiny"]
EVERY = "floor,paca-r8,paca-unshared-r8,lora-r8,lora-match-r8,lora-nocast-r8,lora-match-nocast-r8,dora-r8,full"


def _contestant(name: str, dtype: torch.dtype = torch.float32) -> Contestant:
    method = next(method for method in parse_methods(name) if method.name == name)
    return Contestant(method, SHAPE, dtype, paca.get_backend(), seed=0)


@pytest.mark.parametrize("name", EVERY.split(",")[1:])
def test_every_method_starts_as_the_floor_and_then_trains(name: str) -> None:
    contestant, floor = _contestant(name), first_step(_contestant("floor"))
    assert deviation(name, first_step(contestant), floor) < 1e-4
    for _ in range(2):
        contestant.step()
    assert not torch.equal(contestant.forward(), floor[0])


def test_paca_starts_as_the_floor_bit_for_bit() -> None:
    floor, found = first_step(_contestant("floor")), first_step(_contestant("paca-r8"))
    assert torch.equal(found[0], floor[0])
    assert torch.equal(found[1], floor[1])


def test_a_method_that_computes_something_else_is_refused() -> None:
    floor = first_step(_contestant("floor"))
    with pytest.raises(RuntimeError, match=r"lora-r8 deviates from the frozen floor by 1\.0e-01"):
        deviation("lora-r8", (floor[0], floor[1] * 1.1), floor)


def test_a_parameter_that_gets_no_gradient_is_noticed() -> None:
    contestant = _contestant("full")
    contestant.trained.append(torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(RuntimeError, match="1 of 20 trained parameters"):
        first_step(contestant)


def test_a_run_writes_result_and_plot_and_shows_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # so that the process is as it must be
        monkeypatch.setenv(name, "1")
    arguments = ["--shape", "tiny", "--methods", "paca-r4,lora-r4", "--rounds", "2", "--malloc", "default"]
    out = tmp_path / "run.json"
    assert main([*arguments, "--measure", "time,bytes", "--out", str(out)]) == 0
    result = read(out)
    assert list(result.methods) == ["floor", "paca-r4", "lora-r4"]
    assert [len(method.samples) for method in result.methods.values()] == [2, 2, 2]
    assert result.methods["floor"].trained == 0
    assert result.methods["paca-r4"].trained == 4 * SHAPE.layers * sum(wide for _, wide in SHAPE.linears)
    assert result.clock == "cpu"
    assert len(result.load) == 2
    assert result.machine["packages"]["paca"] == paca.__version__
    assert (tmp_path / "run.png").exists()
    shown = capsys.readouterr().out
    assert "PaCA r=4" in shown
    assert f"paca bench {' '.join(arguments)}" in shown


def test_a_run_that_is_stopped_leaves_the_rounds_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paca.bench.measure.measure_peak", stop)
    arguments = ["--shape", "tiny", "--methods", "paca-r4", "--rounds", "2", "--malloc", "default"]
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--out", str(tmp_path / "run.json")])
    assert [len(method.samples) for method in read(tmp_path / "run.json").methods.values()] == [2, 2]


@pytest.mark.slow
def test_peak_memory_is_read_in_a_process_of_its_own() -> None:
    shape = SHAPES["small"]
    full = measure_peak("full", shape, "float32", "cpu", threads=1, seed=0)
    weights = 4 * shape.layers * sum(narrow * wide for narrow, wide in shape.linears)
    assert full.built > weights
    assert full.peak - full.built > 3 * weights  # a gradient and two moments for each weight


def test_a_failed_process_is_reported_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(failing))
    with pytest.raises(RuntimeError, match="measures floor's memory failed:\nout of memory"):
        measure_peak("floor", SHAPE, "float32", "cpu", threads=1, seed=0)
