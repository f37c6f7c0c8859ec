"""What a comparison found, one line at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch

from paca.parity.formats import name_of

SCHEMA = 1


class Status(str, Enum):
    """How a result compares, best first."""

    IDENTICAL = "identical"
    WITHIN_BOUND = "within bound"
    SKIPPED = "skipped"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Finding:
    """One operation in one configuration, dtype and tier.

    Attributes:
        backend: its name, or "the record" for what the record itself holds.
        operation: e.g. "grad_columns", or "layer, resident" for a whole training step.
        strategy: e.g. "gather=one_hot"; "defaults" for the backend's own choice.
        graph: the graph mode; "" for single operations, which run eagerly.
        dtype: that was computed in.
        tier: "bitwise", "bounded" or "trajectory".
        status: the worst of all cases.
        fraction: the largest error as a part of what is allowed; None where bits are compared.
        detail: why it failed or was skipped: case, tensor, first differing element, distance; of a trajectory how far
            it is from the reference and may be.
    """

    backend: str
    operation: str
    strategy: str
    graph: str
    dtype: torch.dtype
    tier: str
    status: Status
    fraction: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        where = ", ".join(filter(None, [self.operation, self.strategy, self.graph, name_of(self.dtype), self.tier]))
        return f"{self.backend}: {where}: {self.status.value}{f': {self.detail}' if self.detail else ''}"


@dataclass(frozen=True)
class Report:
    """All findings of one run, with what was compared and what was not.

    Attributes:
        record: the machine that made the record, as `record.environment` describes it.
        machines: this one, by backend.
        unavailable: why a backend was left out, by its name.
        interrupted: whether the run ended before all was compared.
    """

    record: Mapping[str, str]
    machines: Mapping[str, Mapping[str, str]]
    unavailable: Mapping[str, str]
    findings: Sequence[Finding] = field(default_factory=tuple)
    interrupted: bool = False

    @property
    def failed(self) -> list[Finding]:
        """The findings that no rounding explains."""
        return [finding for finding in self.findings if finding.status is Status.FAILED]

    @property
    def passed(self) -> bool:
        """Whether this machine computed something to compare, nothing failed, and the run came to its end."""
        compared = any(f.backend in self.machines and f.status is not Status.SKIPPED for f in self.findings)
        return compared and not self.failed and not self.interrupted

    def count(self, backend: str, status: Status) -> int:
        """Count the findings of a backend with a status."""
        return sum(finding.backend == backend and finding.status is status for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "interrupted": self.interrupted,
            "record": dict(self.record),
            "machines": {name: dict(machine) for name, machine in self.machines.items()},
            "unavailable": dict(self.unavailable),
            "findings": [
                asdict(finding)
                | {"dtype": name_of(finding.dtype), "status": finding.status.value}
                | ({"fraction": "infinite"} if finding.fraction == math.inf else {})  # JSON has no number for it
                for finding in self.findings
            ],
        }
