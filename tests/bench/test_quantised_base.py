"""`--base`: every method on the same quantised weights, so that QPaCA is compared with QLoRA and with their floor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import paca
from paca.bench import main, plan, summary
from paca.bench.agreement import deviation, first_step
from paca.bench.contestant import Contestant
from paca.bench.kept import count_kept
from paca.bench.methods import parse_methods
from paca.bench.result import MethodResult, Peak, Result, Sample, Seconds, read
from paca.bench.setting import Setting
from paca.bench.shapes import SHAPES
from paca.quantised import library_of

TINY = SHAPES["tiny"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the process that a measurement needs."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def contestant(name: str, base: str, dtype: torch.dtype = torch.float32) -> Contestant:
    method = next(method for method in parse_methods(name) if method.name == name)
    return Contestant(method, TINY, dtype, paca.get_backend(), 0, Setting(base=base))


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["paca-r8", "lora-r8", "lora-nocast-r8"])
def test_every_method_starts_as_the_quantised_floor_and_then_trains(name: str, base: str) -> None:
    floor, tried = first_step(contestant("floor", base)), contestant(name, base)
    assert deviation(name, first_step(tried), floor) < 1e-4
    for _ in range(2):
        tried.step()
    assert not torch.equal(tried.forward(), floor[0])


@pytest.mark.parametrize(("base", "format"), [("nf4", "nf4"), ("int8", "int8")])
def test_the_linear_weights_are_what_was_asked_for_and_smaller(base: str, format: str) -> None:
    made, plain = contestant("paca-r8", base), contestant("floor", "none")
    from paca.layer import PacaLayer

    formats = [layer.adapted.format for layer in made.model.modules() if isinstance(layer, PacaLayer)]
    assert formats == [format] * 7 * TINY.layers

    def stored(model: torch.nn.Module) -> int:
        return sum(
            p.numel() * p.element_size() for n, p in model.named_parameters() if "_proj" in n and "paca" not in n
        )

    assert stored(made.model) < stored(plain.model) / 3.9
    assert not any(library_of(layer) for layer in plain.model.modules() if isinstance(layer, torch.nn.Linear))


def test_qpaca_keeps_less_than_qlora_and_the_floor_least() -> None:
    kept = {
        name: count_kept(made.forward, made.model, made.last_layer).total
        for name in ("floor", "paca-r8", "lora-r8")
        for made in [contestant(name, "nf4")]
    }
    assert kept["floor"] < kept["paca-r8"] < kept["lora-r8"]


def test_a_run_says_what_the_base_was_and_leaves_out_what_cannot_train_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    arguments = ["--base=nf4", "--shape=tiny", "--methods=paca-r4,lora-r4", "--measure=time,bytes", "--rounds=1"]
    assert main([*arguments, "--malloc=default", "--no-plot", f"--out={out}"]) == 0
    result = read(out)
    assert result.settings["base"] == "nf4"
    assert "frozen weights nf4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--base=nf4", "--methods=full"])
    assert "--base nf4 leaves nothing for full to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base=nf5"], "invalid choice: 'nf5'"),
        (["--suite=switch", "--base=nf4"], "--suite switch takes no --base"),
        (["--suite=gpu", "--base=nf4"], "--suite gpu has its own base; leave --base out"),
    ],
)
def test_a_base_that_makes_no_sense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("paca.bench.base.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--base=nf4"])
    assert "--base nf4 needs the package bitsandbytes" in capsys.readouterr().err


def test_the_gpu_suite_measures_8b_against_qlora_and_one_70b_step(tmp_path: Path) -> None:
    from paca.bench.command import _options, _parser

    runs = plan.gpu(shape="llama-3-8b-train", sizes={}, rounds=20, warmup=3, caps="24", backend="cuda", only=["qpaca"])
    options = {run.name: _options(_parser().parse_args([*run.arguments, f"--out={tmp_path}/x.json"])) for run in runs}
    for name in ("qpaca-1x4096", "qpaca-checkpointing-1x4096"):
        assert (options[name].shape.layers, options[name].shape.hidden) == (32, 4096)
        assert options[name].setting.base == "nf4"
        assert {"time", "peak"} <= set(options[name].measure)
        assert {"floor", "paca-r64", "lora-r64"} <= {method.name for method in options[name].methods}
    assert (options["qpaca-70b"].shape.layers, options["qpaca-70b"].shape.hidden) == (80, 8192)
    assert options["qpaca-70b"].measure == ("peak",)
    assert options["limits-qpaca-70b"].caps == (80.0, 141.0)
    assert plan.FIRST.index("qpaca-70b") >= 0
    assert "limits-qpaca-70b" not in plan.FIRST  # a whole call by itself


def test_the_summary_sets_memory_and_time_against_lora_of_the_same_rank() -> None:
    seconds = Seconds(1.0, 1.0)
    methods = {
        name: MethodResult(name, 64, 1, peak=Peak(1, peak), samples=[Sample(seconds, seconds, seconds, 0)])
        for name, peak in {"floor": 60, "paca-r64": 80, "lora-r64": 100}.items()
    }
    shown = {
        table.title: table.rows for table in summary.tables_of({"qpaca": Result("", {}, {}, TINY, "cpu", methods)})
    }
    assert ["paca-r64", "0.800"] in shown["Highest memory, weights included / LoRA r=64 as PEFT makes it"]
    assert ["paca-r64", "1.000"] in shown["Step time / LoRA r=64 as PEFT makes it"]


@pytest.mark.slow
def test_the_70b_runs_work_with_tiny_sizes(tmp_path: Path) -> None:
    runs = plan.gpu(
        shape="tiny", sizes={"layers": 3, "tokens": 8}, rounds=1, warmup=1, caps="1", backend="cpu", only=["70b"]
    )
    quick = {"--caps=80,141": "--caps=0.001"}
    quick |= {f"--methods={methods}": "--methods=paca-r64" for methods in (plan.QUANTISED, plan.LARGE)}
    found = {}
    for run in runs:
        out = tmp_path / f"{run.name}.json"
        arguments = [quick.get(argument, argument) for argument in run.arguments]
        assert main([*arguments, "--malloc=default", f"--out={out}"]) == 0
        found[run.name] = read(out).methods["paca-r64"]
    assert found["qpaca-70b"].peak is not None
    assert found["limits-qpaca-70b"].limits[0].longest == 0  # a megabyte holds no process
    assert found["qpaca-70b"].trained == 3 * 64 * (64 * 3 + 32 * 2 + 176 * 2)  # no model of three layers was made
