"""The GPU suite, on a CPU with tiny sizes: every run of the plan works, and the summary shows what they measured."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paca
from paca.bench import main, plan, summary
from paca.bench.agreement import deviation, first_step
from paca.bench.contestant import Contestant
from paca.bench.limits import PRECISION, largest_that_fits, search
from paca.bench.methods import parse_methods
from paca.bench.report import tables
from paca.bench.result import Kept, Limit, MethodResult, Peak, Result, Sample, Seconds, read
from paca.bench.setting import Setting
from paca.bench.shapes import SHAPES, Shape
from paca.bench.upstream import UpstreamLinear

TINY = SHAPES["tiny"]
SIZES = {"layers": 1}


def contestant(name: str, setting: Setting | None = None) -> Contestant:
    method = next(method for method in parse_methods(name) if method.name == name)
    return Contestant(method, TINY, torch.float32, paca.get_backend(), 0, setting or Setting())


def runs_of_tiny_size(only: str) -> list[plan.Run]:
    return plan.gpu(
        shape="tiny", sizes=SIZES, rounds=1, warmup=1, caps="1,80", backend="cpu", only=[only] if only else []
    )


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of SHiRA's sparse tensors
@pytest.mark.parametrize("name", ["paca-upstream-r8", "shira-r8", "miss-r8"])
def test_every_further_method_starts_as_the_floor_and_then_trains(name: str) -> None:
    floor, tried = first_step(contestant("floor")), contestant(name)
    assert deviation(name, first_step(tried), floor) < 1e-4
    for _ in range(2):
        tried.step()
    assert not torch.equal(tried.forward(), floor[0])


def test_the_way_of_upstream_gives_the_gradients_of_paca_and_leaves_the_weight_as_it_was() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 6, bias=False).requires_grad_(False)
    before = base.weight.clone()
    layer, x = UpstreamLinear(base, torch.tensor([1, 5])), torch.randn(2, 3, 8, requires_grad=True)
    with torch.no_grad():
        layer.delta.normal_()
    y, gy = layer(x), torch.randn(2, 3, 6)
    y.backward(gy)
    adapted = before.index_add(1, layer.index, layer.delta.detach())
    assert torch.allclose(y, x @ adapted.t(), atol=1e-6)
    assert x.grad is not None
    assert torch.allclose(x.grad, gy @ adapted, atol=1e-6)
    assert layer.delta.grad is not None
    assert torch.allclose(layer.delta.grad, torch.einsum("bto,btr->or", gy, x[..., layer.index]), atol=1e-5)
    assert torch.equal(base.weight, before)


def test_recomputation_gives_the_same_gradients_and_keeps_less() -> None:
    from paca.bench.kept import count_kept

    plain, again = contestant("paca-r8"), contestant("paca-r8", Setting(checkpointing=True))
    for a, b in zip(first_step(plain), first_step(again), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    kept = [count_kept(c.forward, c.model, c.last_layer).total for c in (plain, again)]
    assert kept[1] < kept[0] / 4


@given(limit=st.integers(0, 10**6), step=st.integers(1, 4096))
def test_the_search_finds_the_largest_that_fits(limit: int, step: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found, largest = largest_that_fits(fits, step), limit // step * step
    assert found % step == 0
    assert largest - max(step, largest / PRECISION) < found <= largest
    assert len(asked) <= 30


class Scarce(paca.get_backend().__class__):  # type: ignore[misc,name-defined]
    """A CPU that has memory for so many tokens only, and times like a device with events."""

    tokens = 300
    name = "scarce"

    def memory(self) -> paca.Memory:
        used = self.now.x.shape[0] * self.now.x.shape[1]
        return paca.Memory(0, used, 0)


def test_what_fits_is_found_and_timed() -> None:
    backend = Scarce()
    method = parse_methods("paca-r8")[1]

    def build() -> Contestant:
        backend.now = Contestant(method, Shape(**{**vars(TINY), "tokens": 32}), torch.float32, backend, 0)
        return backend.now

    found = search(build, Shape(**{**vars(TINY), "tokens": 32}), cap=300)
    assert (found.longest, found.largest) == (288, 9)
    assert found.tokens_per_second > 0


def test_weights_that_do_not_fit_leave_nothing() -> None:
    def build() -> Contestant:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = search(build, TINY, cap=7)
    assert (found.cap, found.longest, found.largest, found.tokens_per_second) == (7, 0, 0, 0.0)


def test_a_batch_that_runs_out_of_memory_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    made = contestant("paca-r8")
    step = made.step

    def limited() -> object:
        if made.x.numel() > 4 * TINY.tokens * TINY.hidden:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step()

    monkeypatch.setattr(made, "step", limited)
    found = search(lambda: made, TINY, cap=1 << 60)
    assert (found.longest, found.largest) == (4 * TINY.tokens, 4)


def test_a_batch_that_runs_out_of_memory_in_a_later_step_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an allocator whose free memory lies in pieces."""
    made = contestant("paca-r8")
    step, resize, steps = made.step, made.resize, 0

    def resized(shape: Shape) -> None:
        nonlocal steps
        steps = 0
        resize(shape)

    def limited() -> object:
        nonlocal steps
        steps += 1
        if made.x.numel() > (4 if steps < 3 else 2) * TINY.tokens * TINY.hidden:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step()

    monkeypatch.setattr(made, "step", limited)
    monkeypatch.setattr(made, "resize", resized)
    found = search(lambda: made, TINY, cap=1 << 60)
    assert (found.longest, found.largest) == (4 * TINY.tokens, 2)
    assert found.tokens_per_second > 0


def test_the_plan_covers_sizes_settings_and_limits_and_every_command_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("paca.bench.setting.find_spec", lambda name: name)
    assert main(["--suite", "gpu", "--dry-run", "--out", str(tmp_path / "gpu")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for batch, tokens in (
        (1, 512),
        (2, 512),
        (4, 512),
        (8, 512),
        (16, 512),
        (1, 4096),
        (2, 4096),
        (1, 8192),
        (2, 8192),
    ):
        for name in ("eager", "liger", "compile", "graph", "checkpointing", "fp8"):
            assert any(f"] {name}-{batch}x{tokens} (to do)" in line for line in lines)
    for cap in (24, 48, 80):
        assert any(f"] limits-eager-{cap}gb" in line and "--layers=32" in line for line in lines)
    names = [line.split()[1] for line in lines]
    assert names[: len(plan.FIRST)] == list(plan.FIRST)
    assert len(set(names)) == len(names)
    assert not (tmp_path / "gpu").exists()
    from paca.bench.command import _options, _parser

    for run in plan.gpu(shape="llama-3-8b-train", sizes={}, rounds=20, warmup=3, caps="24", backend="cuda", only=[]):
        options = _options(_parser().parse_args([*run.arguments, f"--out={tmp_path}/x.json"]))
        assert options.dtype == "bfloat16"
        assert options.shape.hidden == (8192 if "70b" in run.name else 4096)


@pytest.mark.slow
def test_a_plan_is_run_goes_on_where_it_stopped_and_is_summed_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gpu"
    run = runs_of_tiny_size("checkpointing-1x512")[0]
    short_arguments = tuple(a.replace("--tokens=512", "--tokens=8") for a in run.arguments)
    short = plan.Run("short", (*short_arguments, "--measure=time,bytes"))  # peaks take a process each
    wrong = plan.Run("wrong", ("--shape=tiny", "--methods=nonsense"))
    assert plan.run([wrong, short], folder) == 1
    assert [file.name for file in sorted(folder.glob("*.json"))] == ["short.json"]
    assert "wrong failed with status 2" in capfd.readouterr().err
    assert plan.run([short], folder) == 0
    assert "(done already)" in capfd.readouterr().out
    assert set(read(folder / "short.json").methods) == set(plan.STRONGEST.split(","))
    assert main(["--report", str(folder), "--markdown", "--plot", str(tmp_path / "all.png")]) == 0
    shown = capfd.readouterr().out
    assert "| PaCA r=8, PEFT 0.22's way |" in shown
    assert "Step time / LoRA r=8 with adapters in the weight's dtype" in shown
    assert (tmp_path / "all.png").exists()


def test_a_plan_starts_nothing_that_its_time_does_not_suffice_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.run(runs_of_tiny_size("liger-compile"), tmp_path / "gpu", seconds=plan.LEAST_SECONDS - 1) == 0
    told = capsys.readouterr()
    assert told.out.count("(no time left)") == 9
    assert "9 of 9 runs are left for want of time; the same command goes on" in told.err
    assert not (tmp_path / "gpu").exists()


def test_a_run_that_does_not_end_in_time_is_stopped_and_is_to_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "LEAST_SECONDS", 0.0)
    run = runs_of_tiny_size("eager-1x512")
    assert plan.run(run, tmp_path, seconds=0.2) == 0
    assert "eager-1x512 was stopped, its time was up" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
    plan.run(run, tmp_path, dry=True)
    assert "eager-1x512 (to do)" in capsys.readouterr().out


def test_a_plan_that_is_ended_ends_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit):
        plan.run(runs_of_tiny_size("eager-1x512"), tmp_path)
    assert started[0].wait(10) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_sparse_tensors_that_are_kept_count_with_their_values_and_indices() -> None:
    from paca.bench.kept import count_kept

    floor, shira = contestant("floor"), contestant("shira-r8")
    kept = [count_kept(c.forward, c.model, c.last_layer).total for c in (floor, shira)]
    assert kept[1] > kept[0]


def test_a_method_that_fails_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")

    def first(made: Contestant) -> tuple[torch.Tensor, torch.Tensor]:
        if made.model.__class__.__name__ == "PeftModel":
            raise NotImplementedError("no kernel for this device")
        return first_step(made)

    monkeypatch.setattr("paca.bench.measure.first_step", first)
    out = tmp_path / "some.json"
    arguments = ["--shape=tiny", "--methods=paca-r8,full", "--measure=time", "--rounds=1", "--backend=cpu"]
    arguments += ["--malloc=default", "--no-plot", f"--out={out}"]
    with pytest.raises(NotImplementedError):
        main(arguments)
    assert main([*arguments, "--keep-going"]) == 0
    assert list(read(out).methods) == ["floor", "full"]
    assert read(out).settings["left_out"] == {"paca-r8": "NotImplementedError: no kernel for this device"}
    assert "paca bench: paca-r8 is left out: NotImplementedError: no kernel" in capsys.readouterr().err


def run_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    out = tmp_path / "some.json"
    common = ["--shape=tiny", "--backend=cpu", "--malloc=default", "--no-plot", "--keep-going", f"--out={out}"]
    assert main([*common, *arguments]) == 0
    return read(out)


def test_a_method_whose_steps_fail_later_costs_no_other_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Contestant.step

    def sometimes(made: Contestant) -> Sample:
        made.steps = getattr(made, "steps", 0) + 1  # type: ignore[attr-defined]
        if made.steps == 3 and made.model.__class__.__name__ == "PeftModel":  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(made)

    monkeypatch.setattr(Contestant, "step", sometimes)
    found = run_tiny(tmp_path, monkeypatch, "--methods=paca-r8,full", "--measure=time", "--rounds=4", "--warmup=1")
    assert {name: len(method.samples) for name, method in found.methods.items()} == {"floor": 4, "full": 4}
    assert found.settings["left_out"] == {"paca-r8": "OutOfMemoryError: CUDA out of memory"}


def test_memory_that_cannot_be_measured_leaves_the_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(found: object) -> Callable[..., object]:
        def measure(name: str, *_: object) -> object:
            if name != "floor":
                raise RuntimeError(f"the process failed:\nTraceback\nOutOfMemoryError: {name}")
            return found

        return measure

    monkeypatch.setattr("paca.bench.measure.measure_peak", measured(Peak(1, 2)))
    monkeypatch.setattr("paca.bench.measure.measure_limit", measured(Limit(10**9, 64, 1, 1.0)))
    what = "--measure=time,peak,limits"
    found = run_tiny(tmp_path, monkeypatch, "--methods=paca-r8", what, "--rounds=1", "--caps=1")
    assert len(found.methods["paca-r8"].samples) == 1
    assert found.methods["paca-r8"].peak is None
    assert found.methods["floor"].peak == Peak(1, 2)
    assert found.settings["left_out"]["paca-r8"].endswith("RuntimeError: the process failed: OutOfMemoryError: paca-r8")
    assert tables(found)


class Ticking:
    """An event that ticks one millisecond at each record."""

    ticks = 0

    def record(self) -> None:
        Ticking.ticks += 1
        self.at = Ticking.ticks

    def elapsed_time(self, other: Ticking) -> float:
        return float(other.at - self.at)


@pytest.mark.parametrize("graph", ["eager", "whole"])
def test_a_device_that_counts_its_bytes_shows_a_methods_peak_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    """Each model takes 100 bytes and stays; a step takes 30 more for a moment; no other tensor counts."""
    device = type(paca.get_backend())
    init, step = Contestant.__init__, Contestant.step
    held, peak = 1000, 0

    def built(made: Contestant, *arguments: Any) -> None:
        nonlocal held
        init(made, *arguments)
        held += 100

    def stepped(made: Contestant) -> Sample:
        nonlocal peak
        peak = max(peak, held + 30)
        return step(made)

    def reset(_: object) -> None:
        nonlocal peak
        peak = held

    monkeypatch.setattr(Contestant, "__init__", built)
    monkeypatch.setattr(Contestant, "step", stepped)
    monkeypatch.setattr(device, "event", lambda _: Ticking())
    monkeypatch.setattr(device, "memory", lambda _: paca.Memory(held, peak, 0))
    monkeypatch.setattr(device, "reset_peak_memory", reset)
    monkeypatch.setattr("paca.bench.measure.measure_peak", lambda *_: Peak(1, 2))
    what = ["--measure=time,peak", "--rounds=1", f"--graph={graph}"]
    found = run_tiny(tmp_path, monkeypatch, "--methods=paca-r8", *what)
    expected = [Peak(100, 130), Peak(100, 130)] if graph == "eager" else [Peak(1, 2), Peak(1, 2)]
    if graph == "eager":
        output = 2 * TINY.tokens_per_step * TINY.hidden * 4  # the floor's output and input gradient, kept to compare
        expected[0] = Peak(100, 130 - output)
    assert [method.peak for method in found.methods.values()] == expected


def test_what_runs_eagerly_is_not_measured_as_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Captured(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module
            refused = "it cannot be captured" if module.__class__.__name__ == "PeftModel" else None
            self.why_eager = refused

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.module(*args, **kwargs)

    monkeypatch.setattr(type(paca.get_backend()), "capture", lambda _, module: Captured(module))
    found = run_tiny(tmp_path, monkeypatch, "--methods=paca-r8", "--measure=time", "--rounds=1", "--graph=whole")
    assert list(found.methods) == ["floor"]
    assert "not replayed from graphs: it cannot be captured" in found.settings["left_out"]["paca-r8"]


@pytest.mark.slow
def test_limits_are_measured_in_a_process_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    out = tmp_path / "limits.json"
    arguments = ["--shape=tiny", "--methods=floor", "--measure=limits", "--caps=0.001", "--tokens=8", "--backend=cpu"]
    assert main([*arguments, "--malloc=default", "--no-plot", f"--out={out}"]) == 0
    (found,) = read(out).methods["floor"].limits
    assert (found.cap, found.longest) == (10**6, 0)  # one megabyte does not hold a process
    assert "What fits in a memory" in [table.title for table in tables(read(out))]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--caps=24,x", "--caps takes positive numbers"),
        ("--strategies=gather", "--strategies takes kind=name pairs"),
        ("--liger", "needs the package liger-kernel"),
        ("--suite=gpu --minutes=0", "--minutes takes a positive number"),
    ],
)
def test_a_wrong_option_is_refused(
    option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("paca.bench.setting.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(option.split())
    assert message in capsys.readouterr().err


def test_the_summary_compares_modes_and_what_fits_with_both_loras() -> None:
    def run(milliseconds: dict[str, float]) -> Result:
        methods = {}
        for number, (name, time) in enumerate({"floor": 1.0, **milliseconds}.items()):
            parts = [Seconds(time / 1000, time / 1000, time / 1000), *[Seconds(0.0, 0.0, 0.0)] * 2]
            kept, limit = (
                Kept(10**6, 100 * (number + 1)),
                Limit(8 * 10**10, 1000 - 100 * number, 1, 50.0 * (5 - number)),
            )
            methods[name] = MethodResult(name, 8, 0, 0.0, kept, None, [Sample(*parts, 0)], [limit])
        return Result("", {}, {}, TINY, "device", methods)

    size = f"{TINY.batch}x{TINY.tokens}"
    eager = run({"paca-r8": 2.0, "lora-r8": 8.0, "lora-nocast-r8": 4.0})
    shown = {
        t.title: t.rows
        for t in summary.tables_of({f"eager-{size}": eager, f"graph-{size}": run({"paca-r8": 1.0})})
        if t.title.startswith("PaCA r=8")
    }
    assert list(shown.values()) == [
        [
            [f"eager-{size}", "bytes kept by a layer", "0.667", "0.500"],
            [f"eager-{size}", "longest sequence in 80 GB", "1.125", "1.286"],
            [f"eager-{size}", "tokens a second in 80 GB", "1.333", "2.000"],
        ],
        [[f"graph-{size}", "0.125", "0.250"]],
    ]


def test_the_summary_of_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no result"):
        summary.results_in(tmp_path)


def test_a_device_with_events_is_timed_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = contestant("paca-r8")
    monkeypatch.setattr(type(tried.backend), "event", lambda self: Ticking())
    sample = tried.step()
    assert [sample.seconds(phase, "device") for phase in ("forward", "backward", "optimizer")] == [0.001] * 3
    assert sample.seconds("step", "device") == 0.003
