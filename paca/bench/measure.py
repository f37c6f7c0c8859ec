"""Runs a benchmark from checked options to a raw result."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

import paca
from paca.backend import Backend
from paca.bench.agreement import deviation, first_step
from paca.bench.contestant import Contestant
from paca.bench.kept import count_kept
from paca.bench.limits import measure_limit
from paca.bench.machine import describe
from paca.bench.methods import FLOOR, Method
from paca.bench.peak import measure_peak, peak_beside_others
from paca.bench.profile import profile_steps
from paca.bench.result import MethodResult, Result
from paca.bench.rounds import time_rounds

if TYPE_CHECKING:
    from paca.bench.command import Options


def measure(options: Options, command: str, save: Callable[[Result], None]) -> Result:
    """Measure what the options ask for.

    Args:
        options: checked.
        command: what was typed, for the record.
        save: is given the result as far as it goes, after each round and each peak, so that a stopped run is not
            lost.

    Raises:
        RuntimeError: if a method does not compute what the floor computes, so that comparing it would say nothing.
    """
    torch.set_num_threads(options.threads)
    backend = paca.set_backend(options.backend or paca.get_backend().name, **options.setting.strategies)
    methods = {method.name: method for method in options.methods}
    result = Result(
        command=command,
        settings=options.recorded(),
        machine=describe(backend),
        shape=options.shape,
        clock=clock_of(options, backend),
        methods={},
    )
    timed, peaks, limits, profiled = (what in options.measure for what in ("time", "peak", "limits", "profile"))
    # A graph's memory is its own: replays allocate nothing, so that only other processes' first steps show it.
    peaks_here = peaks and timed and backend.event() is not None and options.setting.graph != "whole"
    if peaks_here:
        _take_workspaces(backend)
    rounds = options.rounds + options.warmup if timed else 0
    steps = len(methods) * (1 + rounds + peaks + limits * len(options.caps) + profiled)
    dtype = getattr(torch, options.dtype)
    contestants: dict[str, Contestant] = {}
    # In a log file a line every half minute is enough.
    with tqdm(total=steps, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:

        def progress(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        def leave_out(name: str, error: Exception, what: str = "") -> None:
            """Go on without a method, or without one of its figures; the floor's are what all others are held to."""
            if not options.keep_going or name == FLOOR:
                raise error
            why = f"{what}{type(error).__name__}: {error}".strip().splitlines()
            line = why[0] if len(why) == 1 else f"{why[0]} {why[-1]}"  # a process's output ends with its error
            print(f"paca bench: {name} is left out: {line}", file=sys.stderr)
            result.settings.setdefault("left_out", {})[name] = line
            if not what:
                del methods[name]
                result.methods.pop(name, None)

        floor_output = None
        for name, method in list(methods.items()):
            progress(f"build {name}")
            try:
                made = MethodResult(method.label(options.shape), method.rank_for(options.shape), trained=0)
                if not (timed or profiled or "bytes" in options.measure):  # processes of their own build it
                    made.trained = _count_trained(method, options, backend)
                    result.methods[name] = made
                    continue
                if peaks_here:
                    gc.collect()  # what a method that failed has left
                before = backend.memory().allocated
                contestant = Contestant(method, options.shape, dtype, backend, options.seed, options.setting)
                built = backend.memory().allocated
                made.trained = _values(contestant.trained)
                if timed:
                    output = first_step(contestant)
                    if floor_output is None:  # it stays, and is nothing that the floor takes
                        floor_output = output
                        before, built = (at + sum(part.nbytes for part in output) for at in (before, built))
                    made.deviation = deviation(name, output, floor_output)
                    del output
                if "bytes" in options.measure:
                    made.kept = count_kept(contestant.forward, contestant.model, contestant.last_layer)
                if timed or profiled:
                    contestant.settle()
                if peaks_here:
                    made.peak = peak_beside_others(contestant, before, built)
            except Exception as error:
                leave_out(name, error)
                continue
            result.methods[name] = made
            if timed or profiled:
                contestants[name] = contestant
            del contestant  # before the next one is made: two may not fit
        if timed:
            time_rounds(contestants, result, options.rounds, options.warmup, options.seed, progress, save, leave_out)
        for name, contestant in contestants.items() if profiled else ():
            progress(f"profile of {name}")
            try:
                result.methods[name].profile = profile_steps(contestant)
            except Exception as error:
                leave_out(name, error, "profile: ")
            save(result)
        contestants.clear()
        backend.release_memory()
        for name in methods if peaks and not peaks_here else ():
            progress(f"memory of {name}")
            try:
                result.methods[name].peak = measure_peak(
                    name, options.shape, options.dtype, backend.name, options.threads, options.seed, options.setting
                )
            except RuntimeError as error:
                leave_out(name, error, "memory: ")
            save(result)
        for name in methods if limits else ():
            for cap in options.caps:
                progress(f"limits of {name} in {cap} GB")
                size = round(cap * 1e9)
                try:
                    limit = measure_limit(
                        name, options.shape, options.dtype, backend.name, options.seed, options.setting, size
                    )
                    result.methods[name].limits.append(limit)
                except RuntimeError as error:
                    leave_out(name, error, f"limits in {cap} GB: ")
                save(result)
    return result


def _take_workspaces(backend: Backend) -> None:
    """Let libraries take what they keep from their first product on, which would count as the first method's."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, device=backend.device(), dtype=dtype, requires_grad=True)
        torch.nn.functional.linear(x, x).sum().backward()  # the thread of the backward has its own
    backend.synchronize()


def _values(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _count_trained(method: Method, options: Options, backend: Backend) -> int:
    """Count the parameters that train from models of one and of two layers: each further one has as many."""
    one, two = (
        _values(
            Contestant(
                method,
                replace(options.shape, layers=layers),
                getattr(torch, options.dtype),
                backend,
                options.seed,
                options.setting,
            ).trained
        )
        for layers in (1, 2)
    )
    return one + (options.shape.layers - 1) * (two - one)


def clock_of(options: Options, backend: Backend) -> str:
    """Choose the clock of the tables.

    CPU time leaves out what other processes take. It says nothing of an accelerator, and it counts threads that
    wait for each other as if they worked.
    """
    if options.clock != "auto":
        return options.clock
    if backend.event() is not None:
        return "device"
    return "cpu" if backend.device().type == "cpu" and options.threads == 1 else "wall"
