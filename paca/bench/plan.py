"""A suite that is a plan of runs: each is one `paca bench` in a process of its own, and writes one file of a folder.

A run that fails, for want of memory for instance, does not stop the others, and a run whose file is there is not
repeated, so that an interrupted plan goes on where it stopped. Within a time limit no run is started that cannot be
expected to end in time, and one that does not is stopped; what it has measured by then is in the folder `unfinished`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paca.bench.environment import child_environment

LORAS = "lora-r8,lora-nocast-r8,lora-match-r8,lora-match-nocast-r8"
MOST = f"floor,paca-r8,paca-r64,paca-upstream-r8,{LORAS},lora-nocast-r64,dora-r8,miss-r8,full"
EVERY = f"{MOST},shira-r8"  # whose random masks take a CPU some seconds a layer to draw
STRONGEST = "floor,paca-r8,paca-r64,paca-upstream-r8,lora-r8,lora-nocast-r8"
FITTED = "floor,paca-r8,lora-r8,lora-nocast-r8,full"
IN_FLOAT8 = "floor,paca-r8,paca-r64,lora-nocast-r8"
QUANTISED = "floor,paca-r64,lora-r64,lora-nocast-r64"
LARGE = "floor,paca-r64,lora-nocast-r64"
LARGE_CAPS = "80,141"  # GB of the cards that a 70B model in 4 bits is meant for
SIZES = ((1, 4096), (1, 512), (1, 8192), (2, 4096), (4, 512), (16, 512), (2, 512), (8, 512), (2, 8192))
# The most telling runs: each answers one of the questions of docs/benchmarks.md. They come before all others, in case
# the time does not suffice for all.
FIRST = (
    *("eager-1x4096", "eager-1x512", "graph-1x512", "liger-1x4096", "limits-liger-80gb", "eager-1x8192"),
    *("compile-1x512", "qpaca-1x4096", "qpaca-70b", "fp8-1x4096", "checkpointing-1x4096", "limits-eager-80gb"),
    *("liger-1x8192", "compile-1x4096", "qpaca-checkpointing-1x4096"),
)
UNFINISHED = "unfinished"
# A run with less time than this left is not started: imports, building the models and compiling take their time.
LEAST_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """One run: the name of its file, and its arguments without `--out`."""

    name: str
    arguments: tuple[str, ...]


def gpu(
    *,
    shape: str,
    sizes: Mapping[str, int],
    rounds: int,
    warmup: int,
    caps: str,
    backend: str,
    only: Sequence[str],
) -> list[Run]:
    """Return the runs of `--suite gpu`, the most telling first.

    Args:
        shape: name of the shape whose layers are measured.
        sizes: sizes of it that were given on the command line.
        rounds: of each run.
        warmup: of each run.
        caps: of the runs that find what fits, in GB.
        backend: its name.
        only: words of which a run's name must contain one; all runs if there are none.
    """
    own = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items() if name not in ("batch", "tokens")]
    rest = [*own, "--dtype=bfloat16", f"--backend={backend}", "--keep-going"]
    common = [f"--shape={shape}", *rest]
    timed = [*common, f"--rounds={rounds}", f"--warmup={warmup}"]
    whole = [*common, *([] if "layers" in sizes else ["--layers=32"])]
    batches = [(sizes.get("batch", batch), sizes.get("tokens", tokens)) for batch, tokens in SIZES]

    def steps(name: str, batch: int, tokens: int, methods: str, *extra: str) -> Run:
        what = "time,bytes,profile" + ("" if name == "graph" else ",peak")  # a graph keeps all memory it ever needs
        size = [f"--batch={batch}", f"--tokens={tokens}", f"--measure={what}", f"--methods={methods}"]
        return Run(f"{name}-{batch}x{tokens}", (*timed, *size, *extra))

    variants: list[tuple[str, str, list[str]]] = [
        ("eager", EVERY, []),
        ("liger", STRONGEST, ["--liger"]),
        ("compile", STRONGEST, ["--graph=compile"]),
        ("graph", STRONGEST, ["--graph=whole", "--strategies=graph=cuda_graph"]),
        ("checkpointing", STRONGEST, ["--checkpointing"]),
        ("liger-checkpointing", STRONGEST, ["--liger", "--checkpointing"]),
        ("liger-compile", STRONGEST, ["--liger", "--graph=compile"]),
        ("fp8", IN_FLOAT8, ["--strategies=gemm=fp8"]),
        ("fp8-compile", IN_FLOAT8, ["--strategies=gemm=fp8", "--graph=compile"]),
    ]
    runs = []
    for name, methods, extra in variants:
        for number, size in enumerate(dict.fromkeys(batches)):
            runs.append(steps(name, *size, MOST if methods == EVERY and number > 1 else methods, *extra))
    for cap in caps.split(","):
        for name, _, extra in variants[:2]:
            fit = ["--measure=limits", f"--caps={cap}", "--batch=1", f"--tokens={sizes.get('tokens', 512)}"]
            runs.append(Run(f"limits-{name}-{cap}gb", (*whole, *fit, f"--methods={FITTED}", *extra)))
    for name, extra in (("qpaca", []), ("qpaca-checkpointing", ["--checkpointing"])):
        for batch, tokens in dict.fromkeys(batches[:2]):
            runs.append(
                Run(
                    f"{name}-{batch}x{tokens}",
                    (
                        *whole,
                        *(f"--rounds={rounds}", f"--warmup={warmup}", f"--batch={batch}", f"--tokens={tokens}"),
                        *("--measure=time,bytes,profile,peak", "--base=nf4", f"--methods={QUANTISED}", *extra),
                    ),
                )
            )
    large = [f"--shape={'llama-3-70b' if shape == 'llama-3-8b-train' else shape}", *rest, "--base=nf4"]
    large += ["--checkpointing", "--batch=1", f"--tokens={sizes.get('tokens', 512)}"]
    runs.append(Run("qpaca-70b", (*large, "--measure=peak", f"--methods={QUANTISED}")))
    fit = ["--measure=limits", f"--caps={LARGE_CAPS}", f"--methods={LARGE}"]
    runs.append(Run("limits-qpaca-70b", (*large, *fit)))
    runs.sort(key=lambda run: FIRST.index(run.name) if run.name in FIRST else len(FIRST))
    return [run for run in runs if not only or any(word in run.name for word in only)]


def run(runs: Sequence[Run], folder: Path, dry: bool = False, seconds: float | None = None) -> int:
    """Do the runs whose files are not in the folder yet.

    Args:
        runs: in order.
        folder: where their results go; made if it is not there.
        dry: print the commands only.
        seconds: time for all of them; as long as it takes by default.

    Returns:
        1 if a run failed, else 0; one that the time did not suffice for has not failed.
    """
    end = None if seconds is None else time.monotonic() + seconds
    failed, late = 0, 0
    for number, planned in enumerate(runs, start=1):
        out = folder / f"{planned.name}.json"
        command = ["bench", *planned.arguments, f"--out={out}"]
        left = None if end is None else end - time.monotonic()
        state = "done already" if out.exists() else "to do" if left is None or left >= LEAST_SECONDS else "no time left"
        print(f"[{number}/{len(runs)}] {planned.name} ({state}): {shlex.join(['paca', *command])}", flush=True)
        if dry or state == "done already":
            continue
        if state == "no time left":
            late += 1
            continue
        began = time.monotonic()
        status = _do(planned, out, left)
        if status == 0:
            print(f"{planned.name} took {time.monotonic() - began:.0f} s", flush=True)
        elif status is None:
            late += 1
            print(f"{planned.name} was stopped, its time was up", file=sys.stderr, flush=True)
        else:
            failed += 1
            print(f"{planned.name} failed with status {status}; the others go on", file=sys.stderr, flush=True)
    if failed:
        print(f"{failed} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
    if late:
        print(f"{late} of {len(runs)} runs are left for want of time; the same command goes on", file=sys.stderr)
    return min(failed, 1)


def _do(planned: Run, out: Path, seconds: float | None) -> int | None:
    """Do one run and return its exit status, or None if it was stopped; only a finished one has its file at `out`."""
    unfinished = out.parent / UNFINISHED / out.name
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "paca.bench", *planned.arguments, f"--out={unfinished}"]
    # A session of its own, so that the processes which it starts for peaks and limits end with it; and it ends with us.
    process = subprocess.Popen(command, env=child_environment(1), start_new_session=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    for made in unfinished.parent.glob(f"{out.stem}.*") if status == 0 else ():
        made.replace(out.parent / made.name)
    return status
