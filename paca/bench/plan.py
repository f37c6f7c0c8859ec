"""A suite that is a plan of runs: each is one `paca bench` in a process of its own, and writes one file of a folder.

A run that fails, for want of memory for instance, does not stop the others, and a run whose file is there is not
repeated, so that an interrupted plan goes on where it stopped.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paca.bench.environment import child_environment

LORAS = "lora-r8,lora-nocast-r8,lora-match-r8,lora-match-nocast-r8"
EVERY = f"floor,paca-r8,paca-r64,paca-upstream-r8,{LORAS},lora-nocast-r64,dora-r8,shira-r8,miss-r8,full"
STRONGEST = "floor,paca-r8,paca-r64,paca-upstream-r8,lora-r8,lora-nocast-r8"
# Batch and tokens; the most telling first, in case the time does not suffice for all.
SIZES = ((1, 4096), (1, 512), (1, 8192), (2, 4096), (4, 512), (16, 512), (2, 512), (8, 512), (2, 8192))


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
    common = [f"--shape={shape}", *own, "--dtype=bfloat16", f"--backend={backend}"]
    timed = [*common, f"--rounds={rounds}", f"--warmup={warmup}"]
    whole = [*common, *([] if "layers" in sizes else ["--layers=32"])]
    batches = [(sizes.get("batch", batch), sizes.get("tokens", tokens)) for batch, tokens in SIZES]

    def steps(name: str, batch: int, tokens: int, methods: str, *extra: str) -> Run:
        size = [f"--batch={batch}", f"--tokens={tokens}", "--measure=time,bytes", f"--methods={methods}"]
        return Run(f"{name}-{batch}x{tokens}", (*timed, *size, *extra))

    variants: list[tuple[str, str, list[str]]] = [
        ("eager", EVERY, []),
        ("liger", STRONGEST, ["--liger"]),
        ("compile", STRONGEST, ["--graph=compile"]),
        ("graph", STRONGEST, ["--graph=whole", "--strategies=graph=cuda_graph"]),
        ("checkpointing", STRONGEST, ["--checkpointing"]),
        ("liger-checkpointing", STRONGEST, ["--liger", "--checkpointing"]),
        ("liger-compile", STRONGEST, ["--liger", "--graph=compile"]),
    ]
    runs = [steps(name, *size, methods, *extra) for name, methods, extra in variants for size in dict.fromkeys(batches)]
    for name, _, extra in variants[:2]:
        fit = ["--measure=limits", f"--caps={caps}", "--batch=1", f"--tokens={sizes.get('tokens', 512)}"]
        runs.append(Run(f"limits-{name}", (*whole, *fit, f"--methods={STRONGEST},full", *extra)))
    return [run for run in runs if not only or any(word in run.name for word in only)]


def run(runs: Sequence[Run], folder: Path, dry: bool = False) -> int:
    """Do the runs whose files are not in the folder yet; returns the number of those that failed.

    Args:
        runs: in order.
        folder: where their results go; made if it is not there.
        dry: print the commands only.
    """
    failed = 0
    for number, planned in enumerate(runs, start=1):
        out = folder / f"{planned.name}.json"
        command = ["bench", *planned.arguments, f"--out={out}"]
        state = "done already" if out.exists() else "to do"
        print(f"[{number}/{len(runs)}] {planned.name} ({state}): {shlex.join(['paca', *command])}", flush=True)
        if dry or out.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([sys.executable, "-m", "paca.bench", *command[1:]], env=child_environment(1), check=False)
        if done.returncode:
            failed += 1
            print(f"{planned.name} failed with status {done.returncode}; the others go on", file=sys.stderr, flush=True)
    if failed:
        print(f"{failed} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
    return min(failed, 1)
