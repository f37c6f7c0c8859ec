"""What `paca bench` accepts, and what it says to what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from paca.bench import environment, main
from paca.bench.methods import parse_methods
from paca.bench.shapes import SHAPES, matching_lora_rank


@pytest.fixture(autouse=True)
def _never_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An argument error must come before any work."""

    def started(*_: object) -> None:
        raise AssertionError("the measurement was started")

    monkeypatch.setattr("paca.bench.command.start_again_unless_set", started)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "paca-r8,lroa-r8"], "'lroa-r8' is no method; known forms: floor, paca-rN"),
        (["--methods", "paca"], "'paca' is no method"),
        (["--methods", "paca-r0"], "'paca-r0' is no method"),
        (["--methods", "lora-r4096"], "lora-r4096 has a rank above the stack's narrowest input, 512"),
        (["--measure", "time,speed"], "'speed' is unknown; it takes time,bytes,peak"),
        (["--measure", ","], "--measure is empty"),
        (["--rounds", "0"], "--rounds must be at least 1, found 0"),
        (["--warmup", "0"], "--warmup must be at least 1, found 0"),
        (["--threads", "0"], "--threads must be at least 1, found 0"),
        (["--layers", "0"], "--layers must be at least 1, found 0"),
        (["--hidden", "100"], "--hidden 100 must be --heads 8 times an even head size"),
        (["--kv-heads", "3"], "--heads 8 must be a multiple of --kv-heads 3"),
        (["--out", "result.txt"], "--out must end in .json, found result.txt"),
        (["--out", "nowhere/result.json"], "there is no folder nowhere"),
        (["--plot", "plot.doc"], "--plot must end in .png or .svg or .pdf"),
        (["--markdown"], "--markdown goes with --report"),
        (["--report", "absent.json"], "No such file"),
        (["--suite", "slow"], "invalid choice: 'slow'"),
    ],
)
def test_a_bad_argument_is_named_with_its_remedy(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_help_shows_examples_and_every_form_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "paca bench --suite cpu" in shown
    assert "lora-match-rN" in shown


def test_the_floor_is_always_measured_and_comes_first() -> None:
    assert [method.name for method in parse_methods("lora-r8,full")] == ["floor", "lora-r8", "full"]
    assert [method.name for method in parse_methods("full,floor,full")] == ["floor", "full"]


@pytest.mark.parametrize("rank", [8, 64])
def test_a_matched_lora_rank_is_the_one_nearest_in_parameters(rank: int) -> None:
    shape = SHAPES["stack"]
    wanted = rank * sum(wide for _, wide in shape.linears)

    def distance(lora: int) -> int:
        return abs(wanted - lora * sum(narrow + wide for narrow, wide in shape.linears))

    found = matching_lora_rank(shape, rank)
    assert distance(found) == min(distance(lora) for lora in range(1, 2 * rank))


def test_a_prepared_process_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = environment.wanted_environment("tuned", 2)
    assert wanted["OMP_NUM_THREADS"] == "2"
    assert set(environment.TUNED_MALLOC) <= set(wanted)
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.execve", None)  # calling it would fail
    environment.start_again_unless_set(["--rounds", "1"], wanted)


def test_an_unprepared_process_is_replaced_by_one_with_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda *call: replaced.append(call))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    wanted = environment.wanted_environment("tuned", 1)
    environment.start_again_unless_set(["--rounds", "1"], wanted)
    [(_, command, variables)] = replaced
    assert command[1:] == ["-m", "paca.bench", "--rounds", "1"]
    assert wanted.items() <= variables.items()
