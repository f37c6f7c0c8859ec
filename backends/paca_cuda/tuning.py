"""Finds the fastest of several ways to run a kernel on this device, and remembers it beyond the process."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paca.whole import write_text

logger = logging.getLogger("paca")

FORMAT = 1  # of the file; another number, and it is measured anew


def cache_folder() -> Path:
    """Where choices are kept: `PACA_CACHE`, else `paca` in the user's cache folder."""
    if named := os.environ.get("PACA_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paca"


class Tuner:
    """Chooses among candidates by time, once for each problem; a file of the device keeps the choices.

    Args:
        device: what the choices depend on beside the problem: device and versions.
        time: runs a candidate some times and returns its milliseconds.
    """

    def __init__(self, device: str, time: Callable[[Callable[[], Any]], float]) -> None:
        self._file = cache_folder() / f"tuned-{re.sub('[^A-Za-z0-9.]+', '-', device)}.json"
        self._time = time
        self._chosen = _read(self._file)

    def known(self, problem: str) -> str | None:
        """Return the name of the candidate that was chosen, if it was."""
        return self._chosen.get(problem)

    def choose(self, problem: str, candidates: Mapping[str, Callable[[], Any]]) -> str:
        """Return the name of the fastest candidate; measured only if the problem is new.

        A candidate that fails (one that needs more shared memory than the device has) is out.

        Raises:
            RuntimeError: if all of them fail, from the last failure.
            torch.OutOfMemoryError: if there is no memory to measure in; nothing is remembered then.
        """
        known = self._chosen.get(problem)
        if known is not None and known in candidates:
            return known
        times: dict[str, float] = {}
        failure: Exception | None = None
        for name, run in candidates.items():
            try:
                run()  # compiles
                times[name] = self._time(run)
            except torch.OutOfMemoryError:  # says nothing of the candidate
                raise
            except Exception as error:
                failure = error
                logger.debug("paca: %s: %s cannot run: %s", problem, name, error)
        if not times:
            raise RuntimeError(f"no way to run {problem} works on this device") from failure
        best = min(times, key=lambda name: times[name])
        slowest = max(times.values())
        logger.info("paca: tuned %s: %s, %.3f ms (slowest %.3f ms)", problem, best, times[best], slowest)
        self._remember(problem, best)
        return best

    def _remember(self, problem: str, best: str) -> None:
        """Add a choice to the file; other processes may have added theirs since it was read."""
        self._chosen = {**_read(self._file), **self._chosen, problem: best}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps({"format": FORMAT, "chosen": self._chosen}, indent=1))
        except OSError as error:  # a read-only home costs a measurement in each process, no more
            logger.warning("paca: choices cannot be kept in %s (%s); set PACA_CACHE to a folder", self._file, error)


def _read(file: Path) -> dict[str, str]:
    """Return the file's choices; none if there is no file or it is not ours."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return (
            {str(problem): str(name) for problem, name in found["chosen"].items()} if found["format"] == FORMAT else {}
        )
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("paca: %s is unreadable (%s) and will be written anew", file, error)
        return {}


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below the number."""
    return 1 << max(0, number - 1).bit_length()


def bucket(tokens: int) -> int:
    """Return the size class of a number of tokens: batches of nearly the same size share one choice."""
    return power_of_two(tokens)


def names_of(candidates: Sequence[Any]) -> dict[str, Any]:
    """Key candidates by how they print."""
    return {str(candidate): candidate for candidate in candidates}
