"""A raw result gives the same tables and the same plot whenever it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paca.bench import main
from paca.bench.report import as_markdown, as_text
from paca.bench.result import Kept, MethodResult, Peak, Result, Sample, Seconds, read
from paca.bench.shapes import SHAPES
from paca.bench.statistics import ratio


def _method(label: str, rank: int, scale: list[float], kept: int, peak: int) -> MethodResult:
    """A method that takes `scale` times 1, 2 and 0.5 s of CPU in each round, and ten times that by the wall."""
    samples = [Sample(Seconds(k, 10 * k), Seconds(2 * k, 20 * k), Seconds(k / 2, 5 * k), page_faults=3) for k in scale]
    return MethodResult(label, rank, 1000 * rank, 1e-6, Kept(kept, kept // 2), Peak(100_000_000, peak), samples)


@pytest.fixture
def result() -> Result:
    return Result(
        command="paca bench --made up",
        settings={"dtype": "float32"},
        machine={
            "processor": "A Processor",
            "cores": 2,
            "device": "a device",
            "threads": 1,
            "packages": {"torch": "2"},
            "python": "3",
            "revision": None,
            "date": "today",
            "malloc": "system default",
        },
        shape=SHAPES["tiny"],
        clock="cpu",
        methods={
            "floor": _method("frozen floor", 0, [1.0, 2.0, 1.0], 1_000_000, 150_000_000),
            "lora-r8": _method("LoRA r=8", 8, [1.2, 2.2, 1.4], 1_128_000, 190_000_000),
            "paca-r8": _method("PaCA r=8", 8, [1.1, 2.0, 1.05], 1_012_800, 151_000_000),
        },
        load=[0.5, 1.5, 1.0],
    )


def test_a_written_result_reads_back_equal(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "r.json")
    assert read(tmp_path / "r.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_report_of_a_file_is_that_of_the_run(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result.write(tmp_path / "r.json")
    assert main(["--report", str(tmp_path / "r.json"), "--markdown"]) == 0
    assert capsys.readouterr().out == as_markdown(result)
    assert main(["--report", str(tmp_path / "r.json")]) == 0
    assert as_text(result) in capsys.readouterr().out


def test_the_tables_say_what_the_samples_say(result: Result) -> None:
    rows = {
        line.split(" |")[0].strip("| "): line for line in as_markdown(result).splitlines() if line.startswith("| PaCA")
    }
    steps, phases, memory = (line for line in as_markdown(result).splitlines() if line.startswith("| PaCA r=8"))
    assert list(rows) == ["PaCA r=8"]
    cells = [cell.strip() for cell in steps.strip("|").split("|")]
    assert cells == [
        "PaCA r=8",
        "8,000",
        "3,850.0",
        "1.050",
        "1.025 to 1.075",
        "1.050",
        "0.909",
        "0.830 to 0.913",
        "0.875",
    ]
    cells = [cell.strip() for cell in phases.strip("|").split("|")]
    assert cells[1:4] == ["1,100.0", "1.050", "0.909"]
    assert cells[7:] == ["550.00", "15.71", "0.91"]
    cells = [cell.strip() for cell in memory.strip("|").split("|")]
    assert cells[1:] == ["1.01", "1.0128", "7,912.5", "100.0", "51", "+1"]


def test_ratios_are_taken_round_by_round(result: Result) -> None:
    found = ratio(result.methods["lora-r8"], result.methods["floor"], "step", "cpu")
    assert found.median == pytest.approx(1.2)  # of 1.2, 1.1 and 1.4
    assert (found.low, found.high) == pytest.approx((1.15, 1.3))
    assert found.quietest == pytest.approx(1.2)


def test_the_other_clock_can_be_shown(result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result.write(tmp_path / "r.json")
    main(["--report", str(tmp_path / "r.json"), "--clock", "wall"])
    assert "35,000.0" in capsys.readouterr().out


def test_a_result_without_times_still_makes_a_table_and_a_plot(result: Result, tmp_path: Path) -> None:
    for method in result.methods.values():
        method.samples, method.peak = [], None
    result.load = []
    result.write(tmp_path / "r.json")
    assert main(["--report", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.svg")]) == 0
    assert "Training step" not in as_text(result)
    assert "100.0" in as_text(result)


def test_a_plot_is_drawn_from_a_file(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "r.json")
    main(["--report", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "is no JSON"),
        ("[]", "is no result of `paca bench`"),
        (json.dumps({"format": "paca-bench", "version": 0}), "has version 0 of the format, this paca reads 1"),
        (json.dumps({"format": "paca-bench", "version": 1}), "lacks a part of a result"),
    ],
)
def test_a_file_that_is_no_result_is_refused(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["--report", str(tmp_path / "r.json")])
    assert says in " ".join(capsys.readouterr().err.split())
