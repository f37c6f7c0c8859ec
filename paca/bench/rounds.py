"""Times contestants against each other: interleaved, in a new random order each round."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable

from paca.bench.contestant import Contestant
from paca.bench.result import Result


def time_rounds(
    contestants: dict[str, Contestant],
    result: Result,
    rounds: int,
    warmup: int,
    seed: int,
    progress: Callable[[str], None],
    save: Callable[[Result], None],
    leave_out: Callable[[str, Exception], None],
) -> None:
    """Let every contestant train one step a round and add a sample, and each round's load average, to the result.

    A round's steps lie close together, so the ratio of two of them is not touched by what else the machine does in the
    long run; the random order takes out what a step leaves behind for the next one.

    Args:
        contestants: by name.
        result: has the same names; samples and load are added here.
        rounds: that count.
        warmup: rounds before, that do not count.
        seed: of the order.
        progress: is told the name of each contestant before its step.
        save: is given the result after each round that counts.
        leave_out: is told of a contestant whose step failed, and raises the error if the others are not to go on.
    """
    order = random.Random(seed)
    names = list(contestants)
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into somebody's step
    try:
        for number in range(-warmup, rounds):
            gc.collect()
            order.shuffle(names)
            load = round(os.getloadavg()[0], 2)
            for name in list(names):
                progress(name)
                try:
                    sample = contestants[name].step()
                except Exception as error:
                    leave_out(name, error)
                    names.remove(name)
                    del contestants[name]
                    continue
                if number >= 0:
                    result.methods[name].samples.append(sample)
            if number >= 0:
                result.load.append(load)
                save(result)
    finally:
        if collecting:
            gc.enable()
