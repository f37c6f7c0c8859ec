"""The raw result of a benchmark, as it lies in its JSON file. docs/benchmarks.md explains each field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paca.bench.shapes import Shape
from paca.whole import write_text

FORMAT = "paca-bench"
VERSION = 1
CLOCKS = ("cpu", "wall", "device")
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Seconds:
    """One duration by two clocks."""

    cpu: float  # of all threads of the process
    wall: float
    device: float | None = None  # between events in the device's queue, where it has them


@dataclass(frozen=True)
class Sample:
    """One training step. `optimizer` is zero_grad, the optimizer's step and what hangs on it, PaCA's write too."""

    forward: Seconds
    backward: Seconds
    optimizer: Seconds
    page_faults: int  # memory that the allocator had to get from the system during the step

    def seconds(self, phase: str, clock: str) -> float:
        """Return the duration of one phase, or of the "step"."""
        if phase == "step":
            return sum(self.seconds(part, clock) for part in PHASES)
        return float(getattr(getattr(self, phase), clock))


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward, parameters and buffers left out."""

    total: int
    layer: int  # by the last decoder layer, what it saves first


@dataclass(frozen=True)
class Peak:
    """Bytes on the device in a process of its own."""

    built: int  # in use when the model stands and nothing has run
    peak: int  # highest during two steps


@dataclass(frozen=True)
class Limit:
    """What fits in so much memory, and how fast it trains there; 0 where nothing fits."""

    cap: int  # bytes, weights and optimizer included
    longest: int  # tokens of one sequence
    largest: int  # sequences of the shape's length
    tokens_per_second: float  # with that batch


@dataclass(frozen=True)
class Operation:
    """What ran in a step under one name; means of some steps."""

    name: str
    calls: float
    seconds: float


@dataclass
class MethodResult:
    """What was measured of one method.

    Attributes:
        label: its name in tables.
        rank: of the adapter, 0 where there is none.
        trained: parameters that train.
        deviation: largest difference of output or input gradient from the floor's before the first step, relative to
            the largest value; shows that all methods did the same work. None if nothing was timed.
        samples: one a round; sample i of every method belongs to round i.
        limits: what fits in how much memory, if that was asked for.
        profile: what a step runs, if that was asked for; what takes longest first.
    """

    label: str
    rank: int
    trained: int
    deviation: float | None = None
    kept: Kept | None = None
    peak: Peak | None = None
    samples: list[Sample] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    profile: list[Operation] = field(default_factory=list)


@dataclass
class Result:
    """A whole run.

    Attributes:
        command: what was typed.
        settings: the options in force.
        machine: what it ran on, see `paca.bench.machine`.
        shape: sizes of the model and its batch.
        clock: "cpu", "wall" or "device", the clock that the tables use.
        methods: by name, in the order of the tables, the floor first.
        load: the machine's load average over one minute, at the start of each round.
    """

    command: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    shape: Shape
    clock: str
    methods: dict[str, MethodResult]
    load: list[float] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the JSON file in one move, so that a reader never sees half of it."""
        whole = {"format": FORMAT, "version": VERSION, **asdict(self)}
        whole["methods"] = {name: _packed(method) for name, method in whole["methods"].items()}
        write_text(path, json.dumps(whole, indent=1))


def read(path: Path) -> Result:
    """Read a file that `Result.write` made.

    Raises:
        ValueError: if the file is none of ours, of another version or incomplete; the message says which.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'{path} is no result of `paca bench`: its "format" is not {FORMAT!r}')
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {found.get('version')} of the format, this paca reads {VERSION}; "
            "measure again with this paca"
        )
    try:
        fields = {name: found[name] for name in ("command", "settings", "machine", "clock", "load")}
        methods = {name: _unpacked(method) for name, method in found["methods"].items()}
        return Result(shape=Shape(**found["shape"]), methods=methods, **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks a part of a result or has a strange one: {error}") from None


def _packed(method: dict[str, Any]) -> dict[str, Any]:
    """Turn samples into columns: phase → clock → seconds of each round."""
    samples = method.pop("samples")
    columns: dict[str, Any] = {
        phase: {
            clock: [round(sample[phase][clock], 7) for sample in samples]
            for clock in CLOCKS
            if all(sample[phase][clock] is not None for sample in samples)
        }
        for phase in PHASES
    }
    columns["page_faults"] = [sample["page_faults"] for sample in samples]
    return {**method, "rounds": columns}


def _unpacked(method: Mapping[str, Any]) -> MethodResult:
    rounds = method["rounds"]
    samples = [
        Sample(
            **{phase: Seconds(**{clock: times[i] for clock, times in rounds[phase].items()}) for phase in PHASES},
            page_faults=faults,
        )
        for i, faults in enumerate(rounds["page_faults"])
    ]
    return MethodResult(
        label=method["label"],
        rank=method["rank"],
        trained=method["trained"],
        deviation=method["deviation"],
        kept=Kept(**method["kept"]) if method["kept"] else None,
        peak=Peak(**method["peak"]) if method["peak"] else None,
        limits=[Limit(**limit) for limit in method.get("limits", [])],
        profile=[Operation(**operation) for operation in method.get("profile", [])],
        samples=samples,
    )
