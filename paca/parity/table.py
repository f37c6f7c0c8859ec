"""Lays findings out for people: a table and summary as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from paca.parity.cases import TRAJECTORY
from paca.parity.findings import Finding, Report, Status
from paca.parity.formats import name_of


@dataclass(frozen=True)
class Row:
    """One operation, strategy, graph mode and tier of a backend; its findings by dtype."""

    backend: str
    words: tuple[str, str, str, str]  # operation, strategy, graph, tier
    by_dtype: Mapping[str, Finding]


HEAD = ("operation", "strategy", "graph", "tier")


def dtypes(report: Report) -> list[str]:
    """List the dtypes that occur, in the order in which they do."""
    return list(dict.fromkeys(name_of(finding.dtype) for finding in report.findings))


def rows(report: Report) -> list[Row]:
    """Gather the findings that differ in dtype only."""
    grouped: dict[tuple[str, tuple[str, str, str, str]], dict[str, Finding]] = {}
    for finding in report.findings:
        words = (finding.operation, finding.strategy, finding.graph, finding.tier)
        grouped.setdefault((finding.backend, words), {})[name_of(finding.dtype)] = finding
    return [Row(backend, words, by_dtype) for (backend, words), by_dtype in grouped.items()]


def cell(finding: Finding | None) -> str:
    """Say a finding in a few words; the number is the largest error as a part of its bound."""
    if finding is None:
        return "-"
    if finding.status is Status.WITHIN_BOUND and finding.fraction is not None:
        return f"within bound ({finding.fraction:.2f})"
    return finding.status.value


def machine_line(machine: Mapping[str, str]) -> str:
    """Say in a line what computed."""
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "paca") if name in machine)
    return f"{machine['backend']}: {machine['device']}; {machine['strategies']}; {packages}"


def summary(report: Report) -> Iterator[str]:
    """Say for each backend what was compared with what."""
    made_by = report.record
    of = f"the record of {made_by['backend']} (torch {made_by['torch']}, paca {made_by['paca']})"
    for name in report.machines:
        counts = ", ".join(f"{count} {status.value}" for status in Status if (count := report.count(name, status)))
        kinds = list(dict.fromkeys(finding.dtype for finding in report.findings if finding.backend == name))
        yield f"{name}, {', '.join(map(name_of, kinds)) or 'nothing'}, compared with {of}: {counts or 'no case'}"
    for name, why in report.unavailable.items():
        yield f"{name}: not compared: {why}"
    if report.interrupted:
        yield "interrupted: the rest was not compared"


def text(report: Report) -> str:
    """Return the report for a terminal."""
    columns = dtypes(report)
    lines = [f"record  {machine_line(report.record)}"]
    lines += [f"here    {machine_line(machine)}" for machine in report.machines.values()]
    for backend in dict.fromkeys(finding.backend for finding in report.findings):
        body = [
            (*row.words, *(cell(row.by_dtype.get(dtype)) for dtype in columns))
            for row in rows(report)
            if row.backend == backend
        ]
        lines += ["", backend, *_aligned([(*HEAD, *columns), *body])]
    drifts = [f for f in report.findings if f.tier == TRAJECTORY and f.status is Status.WITHIN_BOUND]
    lines += ["", "trajectories"] * bool(drifts) + [f"  {finding}" for finding in drifts]
    for status, title in ((Status.SKIPPED, "skipped"), (Status.FAILED, "FAILED")):
        found = [finding for finding in report.findings if finding.status is status]
        lines += ["", title] * bool(found) + [f"  {finding}" for finding in found]
    return "\n".join([*lines, "", *summary(report)])


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
