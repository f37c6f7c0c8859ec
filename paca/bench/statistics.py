"""What the tables and the plot say about a raw result; nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from paca.bench.methods import FLOOR
from paca.bench.result import MethodResult, Result


@dataclass(frozen=True)
class Ratio:
    """One method's time over another's.

    Attributes:
        median: of the ratios of each round.
        low: their first quartile.
        high: their third quartile.
        quietest: smallest time over smallest time, which other load on the machine disturbs least.
    """

    median: float
    low: float
    high: float
    quietest: float


def milliseconds(method: MethodResult, phase: str, clock: str) -> float:
    """Return the median duration of a phase."""
    return 1000 * statistics.median(sample.seconds(phase, clock) for sample in method.samples)


def ratio(method: MethodResult, other: MethodResult, phase: str, clock: str) -> Ratio:
    """Compare two methods of one run, round by round."""
    mine = [sample.seconds(phase, clock) for sample in method.samples]
    theirs = [sample.seconds(phase, clock) for sample in other.samples]
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    low, median, high = _quartiles(ratios)
    return Ratio(median, low, high, min(mine) / min(theirs))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def kept_above_floor(result: Result, method: MethodResult) -> float | None:
    """Return the bytes kept beyond the floor's, a token and layer."""
    floor = result.methods[FLOOR].kept
    if method.kept is None or floor is None:
        return None
    return (method.kept.total - floor.total) / (result.shape.tokens_per_step * result.shape.layers)


def peak_above_build(method: MethodResult) -> int | None:
    """Return the bytes that training needs at its highest beyond the built model."""
    return None if method.peak is None else method.peak.peak - method.peak.built


def lora_of_rank(result: Result, method: MethodResult) -> MethodResult | None:
    """Return plain LoRA of the same rank, if it was measured."""
    return result.methods.get(f"lora-r{method.rank}") if method.rank else None
