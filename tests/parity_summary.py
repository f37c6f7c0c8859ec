"""Says at the end of a test run which devices were compared with what, and which were not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from paca.parity.findings import Finding, Status
from paca.parity.formats import name_of
from paca.parity.verify import THE_RECORD

COMPARED, LEFT_OUT = "parity compared", "parity left out"


def note(record_property: Callable[[str, object], None], findings: Iterable[Finding]) -> None:
    """Remember what a test compared; the properties of a test reach the summary from every worker."""
    for finding in findings:
        record_property(
            COMPARED,
            (finding.backend, finding.strategy, finding.graph, name_of(finding.dtype), finding.status.value),
        )


def lines(properties: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the summary of everything that was noted, a line for each backend."""
    noted = list(properties)
    compared = [tuple(value) for name, value in noted if name == COMPARED]
    found = []
    for backend in dict.fromkeys(value[0] for value in compared):
        mine = [value for value in compared if value[0] == backend]
        strategies, graphs, dtypes = (
            list(dict.fromkeys(word for value in mine if (word := value[position]))) for position in (1, 2, 3)
        )
        count = Counter(value[4] for value in mine)
        results = ", ".join(f"{count[status.value]} {status.value}" for status in Status if count[status.value])
        ways = [f"{len(strategies)} strategies", ", ".join(graphs)] if strategies else []
        what = "float64 computed here" if backend == THE_RECORD else "the shipped record"
        found.append(
            f"{backend} ({'; '.join([*filter(None, ways), ', '.join(dtypes)])}) compared with {what}: {results}"
        )
    found += [f"{backend} not compared: {why}" for backend, why in dict.fromkeys(v for n, v in noted if n == LEFT_OUT)]
    return found


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print it, if any test compared devices."""
    reports = [report for of_kind in terminalreporter.stats.values() for report in of_kind]
    noted = [
        (name, tuple(value))
        for report in reports
        if getattr(report, "when", "") == "call" or getattr(report, "skipped", False)
        for name, value in getattr(report, "user_properties", [])
    ]
    if printed := lines(noted):
        terminalreporter.section("device parity")
        for line in printed:
            terminalreporter.write_line(line)
