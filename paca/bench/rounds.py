"""Times contestants against each other: interleaved, in a new random order each round."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable

from paca.bench.contestant import Contestant
from paca.bench.result import MethodResult


def time_rounds(
    contestants: dict[str, Contestant],
    results: dict[str, MethodResult],
    rounds: int,
    warmup: int,
    seed: int,
    progress: Callable[[str], None],
) -> list[float]:
    """Let every contestant train one step a round and add a sample to its result.

    A round's steps lie close together, so the ratio of two of them is not touched by what else the machine does in the
    long run; the random order takes out what a step leaves behind for the next one.

    Args:
        contestants: by name.
        results: by the same names; samples are added here.
        rounds: that count.
        warmup: rounds before, that do not count.
        seed: of the order.
        progress: is told the name of each contestant before its step.

    Returns:
        The load average at the start of each round that counts.
    """
    order = random.Random(seed)
    names = list(contestants)
    load = []
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into somebody's step
    try:
        for number in range(-warmup, rounds):
            gc.collect()
            order.shuffle(names)
            if number >= 0:
                load.append(round(os.getloadavg()[0], 2))
            for name in names:
                progress(name)
                sample = contestants[name].step()
                if number >= 0:
                    results[name].samples.append(sample)
    finally:
        if collecting:
            gc.enable()
    return load
