"""A profile lists what one step runs, and a report what of it the floor does not run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import paca
from paca.bench import main
from paca.bench.contestant import Contestant
from paca.bench.methods import parse_methods
from paca.bench.profile import STEPS, operations, profile_steps
from paca.bench.report import tables
from paca.bench.result import Operation, read
from paca.bench.shapes import SHAPES

SHAPE = SHAPES["tiny"]


def _event(key: str, device: str, count: int, cpu: float, kernel: float = 0.0, annotation: bool = False) -> Any:
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=SimpleNamespace(name=device),
        self_cpu_time_total=cpu,
        self_device_time_total=kernel,
        is_user_annotation=annotation,
    )


def test_a_step_of_paca_runs_a_gather_for_each_input_and_a_product_for_each_layer_more() -> None:
    calls = {}
    for name in ("floor", "paca-r8"):
        method = next(method for method in parse_methods(name) if method.name == name)
        contestant = Contestant(method, SHAPE, torch.float32, paca.get_backend(), seed=0)
        contestant.step()
        found = profile_steps(contestant)
        assert [each.seconds for each in found] == sorted((each.seconds for each in found), reverse=True)
        calls[name] = {each.name: each.calls for each in found}
    assert calls["paca-r8"]["PacaLinear"] == 7 * SHAPE.layers
    assert "PacaLinear" not in calls["floor"]
    assert calls["paca-r8"]["aten::mm"] - calls["floor"]["aten::mm"] == 7 * SHAPE.layers
    assert calls["paca-r8"]["aten::index_select"] >= 4 * SHAPE.layers


def test_where_a_device_works_its_kernels_are_listed_and_not_what_asks_for_them() -> None:
    events = [
        _event("aten::mm", "CPU", 9, 100.0, kernel=600.0),
        _event("gemm", "CUDA", 6, 0.0, kernel=600.0),
        _event("Optimizer.step", "CUDA", 3, 0.0, kernel=900.0, annotation=True),
        _event("a" * 300 + "x", "CUDA", 3, 0.0, kernel=30.0),
        _event("a" * 300 + "y", "CUDA", 3, 0.0, kernel=30.0),
    ]
    found = operations(events)
    assert [(each.name[:4], each.calls) for each in found] == [("gemm", 6 / STEPS), ("aaaa", 6 / STEPS)]
    assert [each.seconds for each in found] == pytest.approx([600e-6 / STEPS, 60e-6 / STEPS])
    assert [each.name for each in operations(events[:1])] == ["aten::mm"]


def test_a_report_shows_what_differs_most_from_the_floor_and_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # so that the process is as it must be
        monkeypatch.setenv(name, "1")
    out = tmp_path / "r.json"
    arguments = ["--shape=tiny", "--methods=paca-r8", "--measure=profile", "--malloc=default", "--threads=1"]
    assert main([*arguments, f"--out={out}"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]  # and no plot
    result = read(out)
    floor = result.methods["floor"]
    slower = [replace(each, seconds=each.seconds + (each.name == "aten::mm")) for each in floor.profile]
    result.methods["paca-r8"].profile = [Operation("new", 7.0, 0.5), *slower]
    floor.profile.append(Operation("gone", 3.0, 0.75))
    (table,) = tables(result)
    assert [row[0] for row in table.rows[:3]] == ["aten::mm", "gone", "new"]
    assert table.rows[1][1:] == ["0", "3", "0.00", "750.00", "-750.00"]
    assert table.rows[2][1:] == ["7", "0", "500.00", "0.00", "+500.00"]
    assert table.rows[-1][-1] == "+750.00"
