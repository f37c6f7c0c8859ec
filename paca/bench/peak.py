"""Measures the highest memory use of one method, in a process of its own or, where a device tells, beside others."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from paca.bench.environment import exact_environment
from paca.bench.methods import parse_methods
from paca.bench.result import Peak
from paca.bench.setting import PLAIN, Setting
from paca.bench.shapes import Shape

if TYPE_CHECKING:
    from paca.bench.contestant import Contestant

STEPS = 2  # the second finds optimizer state and the first one's leftovers in place


def measure_peak(
    method: str, shape: Shape, dtype: str, backend: str, threads: int, seed: int, setting: Setting = PLAIN
) -> Peak:
    """Start a process that trains a method for two steps and return what it read from the device's allocator.

    The process runs with `EXACT_MALLOC`, whatever this one runs with: an allocator that holds on to freed memory would
    show that too.

    Raises:
        RuntimeError: with the end of the process's error output, if it fails.
    """
    task = {
        "method": method,
        "shape": asdict(shape),
        "dtype": dtype,
        "backend": backend,
        "threads": threads,
        "seed": seed,
        "setting": asdict(setting),
    }
    process = subprocess.run(
        [sys.executable, "-m", "paca.bench.peak", json.dumps(task)],
        env=exact_environment(threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"the process that measures {method}'s memory failed:\n{process.stderr[-2000:]}")
    return Peak(**json.loads(process.stdout.splitlines()[-1]))


def peak_beside_others(contestant: Contestant, before: int, built: int) -> Peak:
    """Train two steps and return what one of several models of a process takes, as its own process would show it.

    Only for devices whose allocator tells what is in use to the byte.

    Args:
        contestant: built last.
        before: bytes in use before it was built.
        built: bytes in use when it stood and nothing had run.
    """
    backend = contestant.backend
    gc.collect()  # what earlier measurements have left
    backend.synchronize()
    backend.reset_peak_memory()
    for _ in range(STEPS):
        contestant.step()
    return Peak(built - before, backend.memory().peak - before)


def _main(task: str) -> None:
    """Do one task and print its `Peak` as JSON."""
    import torch

    import paca
    from paca.bench.contestant import Contestant

    wanted = json.loads(task)
    torch.set_num_threads(wanted["threads"])
    backend = paca.set_backend(wanted["backend"], **wanted["setting"]["strategies"])
    method = next(method for method in parse_methods(wanted["method"]) if method.name == wanted["method"])
    shape, setting = Shape(**wanted["shape"]), Setting(**wanted["setting"])
    contestant = Contestant(method, shape, getattr(torch, wanted["dtype"]), backend, wanted["seed"], setting)
    gc.collect()
    backend.synchronize()
    backend.reset_peak_memory()
    built = backend.memory().allocated
    for _ in range(STEPS):
        contestant.step()
    print(json.dumps({"built": built, "peak": backend.memory().peak}))
    sys.stdout.flush()
    os._exit(0)  # unloading models takes seconds and shows nothing


if __name__ == "__main__":
    _main(sys.argv[1])
