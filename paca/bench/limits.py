"""Finds how much a method can train in so much memory, in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from paca.bench.environment import exact_environment
from paca.bench.methods import parse_methods
from paca.bench.result import Limit, Sample
from paca.bench.setting import Setting
from paca.bench.shapes import Shape

if TYPE_CHECKING:
    from paca.bench.contestant import Contestant

TIMED_STEPS = 5
_SEARCH_UP_TO = 1 << 20
PRECISION = 32  # the search ends when it knows the size to one part in so many


def largest_that_fits(fits: Callable[[int], bool], step: int) -> int:
    """Return a multiple of `step` that fits, the largest or at most a part in `PRECISION` below it; 0 if none does.

    What is smaller than one that fits, fits.

    >>> largest_that_fits(lambda size: size <= 1000, 64)
    960
    """
    good, bad = 0, 1
    while bad * step <= _SEARCH_UP_TO and fits(bad * step):
        good, bad = bad, bad * 2
    while bad - good > max(1, good // PRECISION) and good:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * step) else (good, middle)
    return good * step


def measure_limit(method: str, shape: Shape, dtype: str, backend: str, seed: int, setting: Setting, cap: int) -> Limit:
    """Start a process that trains ever larger batches of a method until the memory does not suffice.

    Args:
        method: its name.
        shape: sizes; `tokens` is also the step of the search for the longest sequence.
        dtype: of weights and activations.
        backend: its name.
        seed: of weights and batch.
        setting: how the model runs.
        cap: bytes that may be used.

    Raises:
        RuntimeError: with the end of the process's error output, if it fails for another reason.
    """
    task = {
        **{"method": method, "shape": asdict(shape), "dtype": dtype, "backend": backend, "seed": seed},
        **{"setting": asdict(setting), "cap": cap},
    }
    process = subprocess.run(
        [sys.executable, "-m", "paca.bench.limits", json.dumps(task)],
        env=exact_environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"the process that measures what fits with {method} failed:\n{process.stderr[-2000:]}")
    return Limit(**json.loads(process.stdout.splitlines()[-1]))


def search(build: Callable[[], Contestant], shape: Shape, cap: int) -> Limit:
    """Find the longest sequence and the largest batch that train, and time that batch.

    Args:
        build: makes the contestant; called once.
        shape: sizes of the batch to start from.
        cap: bytes. Where the device cannot refuse memory beyond it, its peak is read.
    """
    import torch

    try:
        contestant = build()
    except torch.OutOfMemoryError:  # the weights alone are too much
        return Limit(cap, 0, 0, 0.0)
    backend = contestant.backend
    clock = "wall" if backend.event() is None else "device"
    has_state = False

    def trained(sized: Shape, steps: int) -> list[Sample] | None:
        """Train some steps; None if the memory does not suffice. Each size finds the memory as the first one did."""
        nonlocal has_state
        contestant.x = contestant.gy = torch.empty(0)
        backend.release_memory()
        backend.reset_peak_memory()
        try:
            contestant.resize(sized)
            samples = [contestant.step() for _ in range(steps)]
        except torch.OutOfMemoryError:
            contestant.model.zero_grad()
            return None
        has_state = True
        return samples if backend.memory().peak <= cap else None

    def fits(sized: Shape) -> bool:
        # The second step finds the optimizer's state in place, which the first one makes; later sizes have it.
        return trained(sized, 1 if has_state else 2) is not None

    longest = largest_that_fits(lambda tokens: fits(replace(shape, batch=1, tokens=tokens)), shape.tokens)
    largest = largest_that_fits(lambda batch: fits(replace(shape, batch=batch)), 1)
    # Only several steps show whether what one leaves in pieces suffices for the next.
    samples = None
    while largest and (samples := trained(replace(shape, batch=largest), 1 + TIMED_STEPS)) is None:
        largest -= 1
    if samples is None:
        return Limit(cap, longest, 0, 0.0)
    seconds = statistics.median(sample.seconds("step", clock) for sample in samples[1:])
    return Limit(cap, longest, largest, round(largest * shape.tokens / seconds, 1))


def _main(task: str) -> None:
    """Do one task and print its `Limit` as JSON."""
    import torch

    import paca
    from paca.bench.contestant import Contestant

    wanted = json.loads(task)
    torch.set_num_threads(1)
    backend = paca.set_backend(wanted["backend"], **wanted["setting"]["strategies"])
    method = next(method for method in parse_methods(wanted["method"]) if method.name == wanted["method"])
    shape, dtype = Shape(**wanted["shape"]), getattr(torch, wanted["dtype"])
    setting = Setting(**wanted["setting"])
    backend.limit_memory(wanted["cap"])
    limit = search(lambda: Contestant(method, shape, dtype, backend, wanted["seed"], setting), shape, wanted["cap"])
    print(json.dumps(asdict(limit)))
    sys.stdout.flush()
    os._exit(0)  # unloading models takes seconds and shows nothing


if __name__ == "__main__":
    _main(sys.argv[1])
