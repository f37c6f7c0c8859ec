"""Measures what a switch of adapters costs, what a forward costs after it, and whether the base survives it."""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

import paca
from paca.backend import Backend
from paca.bench import stack
from paca.bench.machine import describe
from paca.bench.result import Seconds
from paca.bench.shapes import Shape
from paca.bench.tables import Table
from paca.bench.ways import ADAPTERS, REFERENCE, WAYS, Way
from paca.whole import write_text

if TYPE_CHECKING:
    from paca.bench.command import Options

FORMAT = "paca-switch"
VERSION = 1
SWITCHES_A_ROUND = 10
AFTERWARDS = 1000  # random switches before the base weights are compared


@dataclass
class WayResult:
    """What was measured of one way.

    Attributes:
        label: its name in tables.
        rank: of its adapters.
        adapter_parameters: of one adapter.
        switch: seconds of one switch, a sample a round.
        forward: seconds of one forward after it, a sample a round.
        changed: share of the base model's weights whose bits differ after `AFTERWARDS` random switches and an undo.
    """

    label: str
    rank: int
    adapter_parameters: int
    switch: list[Seconds] = field(default_factory=list)
    forward: list[Seconds] = field(default_factory=list)
    changed: float | None = None


@dataclass
class SwitchResult:
    """A whole run; the fields are those of `paca.bench.result.Result`."""

    command: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    shape: Shape
    clock: str
    ways: dict[str, WayResult]
    load: list[float] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the JSON file in one move."""
        whole = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(path, json.dumps(whole, indent=1))


def is_switch_result(path: Path) -> bool:
    """Whether a file is a result of this suite."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read(path: Path) -> SwitchResult:
    """Read a file that `SwitchResult.write` made.

    Raises:
        ValueError: if it is of another version or incomplete.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("version") != VERSION:
        raise ValueError(f"{path} has version {found.get('version')} of the format, this paca reads {VERSION}")
    try:
        ways = {name: _way_from(way) for name, way in found["ways"].items()}
        fields = {name: found[name] for name in ("command", "settings", "machine", "clock", "load")}
        return SwitchResult(shape=Shape(**found["shape"]), ways=ways, **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks a part of a result or has a strange one: {error}") from None


def _way_from(way: Mapping[str, Any]) -> WayResult:
    samples = {phase: [Seconds(**sample) for sample in way[phase]] for phase in ("switch", "forward")}
    return WayResult(**{**way, **samples})


def measure(options: Options, command: str, clock: str, backend: Backend) -> SwitchResult:
    """Measure all ways in turn, in a new random order each round.

    Raises:
        RuntimeError: if a switch does not change what the model computes, or does not lead back to the same output.
    """
    torch.set_num_threads(options.threads)
    dtype, device = getattr(torch, options.dtype), backend.device()
    recorded = options.recorded()
    settings = {key: recorded[key] for key in ("dtype", "rounds", "warmup", "threads", "malloc", "clock", "seed")}
    settings |= {"switches_a_round": SWITCHES_A_ROUND, "switches_before_comparing": AFTERWARDS}
    result = SwitchResult(command, settings, describe(backend), options.shape, clock, {})
    x = stack.batch(options.shape, dtype, device, options.seed)[0].detach()
    ways: dict[str, Way] = {}
    with tqdm(total=len(WAYS) * (options.rounds + options.warmup + 2), unit="step") as bar, torch.no_grad():

        def progress(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        for name, kind in WAYS.items():
            progress(f"build {name}")
            way = ways[name] = kind(options.shape, dtype, device, options.seed)
            result.ways[name] = WayResult(kind.label, way.rank, way.adapter_parameters)
            _check_that_it_switches(name, way, x)
        _time_rounds(ways, result, x, options, backend, progress)
        pristine = dict(stack.build(options.shape, dtype, device, options.seed).named_parameters())
        for name, way in ways.items():
            progress(f"compare {name}")
            choices = random.Random(options.seed)
            for _ in range(AFTERWARDS):
                way.switch(choices.choice(ADAPTERS))
            way.undo()
            result.ways[name].changed = _changed(way.weights(), pristine)
    return result


def _check_that_it_switches(name: str, way: Way, x: Tensor) -> None:
    outputs = []
    for adapter in (*reversed(ADAPTERS), *reversed(ADAPTERS)):
        way.switch(adapter)
        outputs.append(stack.run(way.model, x))
    if torch.equal(outputs[0], outputs[1]):
        raise RuntimeError(f"{name}: a switch does not change the output")
    bound = 1e-2 * outputs[0].abs().max().item()
    if any((a - b).abs().max().item() > bound for a, b in zip(outputs[:2], outputs[2:], strict=True)):
        raise RuntimeError(f"{name}: the same adapter gives another output the second time")


def _time_rounds(
    ways: dict[str, Way],
    result: SwitchResult,
    x: Tensor,
    options: Options,
    backend: Backend,
    progress: Callable[[str], None],
) -> None:
    order, names = random.Random(options.seed), list(ways)
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into somebody's time
    try:
        for number in range(-options.warmup, options.rounds):
            gc.collect()
            order.shuffle(names)
            load = round(os.getloadavg()[0], 2)
            for name in names:
                progress(name)
                way = ways[name]
                start = _now(backend)
                for turn in range(SWITCHES_A_ROUND):
                    way.switch(ADAPTERS[turn % 2])
                switched = _now(backend)
                stack.run(way.model, x)
                done = _now(backend)
                if number >= 0:
                    result.ways[name].switch.append(_between(start, switched, SWITCHES_A_ROUND))
                    result.ways[name].forward.append(_between(switched, done, 1))
            if number >= 0:
                result.load.append(load)
    finally:
        if collecting:
            gc.enable()


def _now(backend: Backend) -> tuple[float, float]:
    backend.synchronize()
    return time.process_time(), time.perf_counter()


def _between(start: tuple[float, float], end: tuple[float, float], parts: int) -> Seconds:
    return Seconds(round((end[0] - start[0]) / parts, 9), round((end[1] - start[1]) / parts, 9))


def _changed(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the share of entries of all parameters that are not the same bits."""
    different = sum(int((found[name] != wanted[name]).sum()) for name in wanted)
    return different / sum(parameter.numel() for parameter in wanted.values())


def tables(result: SwitchResult) -> list[Table]:
    """Return the one table."""
    reference = result.ways[REFERENCE]
    fastest = min(_median(way.forward, result.clock) for way in result.ways.values())
    rows = [
        [
            f"{way.label} (r={way.rank})",
            f"{way.adapter_parameters:,}",
            f"{1e6 * _median(way.switch, result.clock):,.0f}",
            f"{_median(reference.switch, result.clock) / _median(way.switch, result.clock):,.1f}",
            f"{1e3 * _median(way.forward, result.clock):,.2f}",
            f"{_median(way.forward, result.clock) / fastest:.3f}",
            "-" if way.changed is None else f"{100 * way.changed:.2f} %",
        ]
        for way in result.ways.values()
    ]
    count = result.settings["switches_before_comparing"]
    head = ["way", "parameters", "switch µs", "x faster than fusing", "forward ms", "x fastest", "base changed"]
    title = f"Switching between two adapters; base changed: share of weights not restored after {count:,} switches"
    return [Table(title, head, rows)]


def _median(samples: list[Seconds], clock: str) -> float:
    return float(statistics.median(getattr(sample, clock) for sample in samples))


def backend_of(options: Options) -> Backend:
    """Put the chosen backend in use."""
    return paca.set_backend(options.backend) if options.backend else paca.get_backend()
