"""What a process must be started with to be measured: allocator settings and thread counts."""

from __future__ import annotations

import os
import sys

# glibc by default returns large blocks to the system at each free and faults them in again at the next step, which
# costs most where a method makes large temporaries. These settings keep memory in the process.
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
# For reading memory the opposite: each block of 64 KiB or more goes back to the system when it is freed, so that the
# resident set is what is in use.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
MALLOC_SETTINGS = ("tuned", "default")


def wanted_environment(malloc: str, threads: int) -> dict[str, str]:
    """Return the variables that a measurement with these options must find set at its start.

    Args:
        malloc: "tuned", or "default" to leave the allocator as the caller has it.
        threads: for OpenMP and MKL.
    """
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**count, **TUNED_MALLOC} if malloc == "tuned" else count


def start_again_unless_set(arguments: list[str], wanted: dict[str, str]) -> None:
    """Replace this process by one that runs the same command in the wanted environment; return if this one has it."""
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "paca.bench", *arguments]
    os.execve(sys.executable, command, {**child_environment(1), **wanted})


def child_environment(threads: int) -> dict[str, str]:
    """Return this process's environment for a Python child that must find the same packages and use so many threads."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def exact_environment(threads: int) -> dict[str, str]:
    """Return the environment of a child whose memory is to be read."""
    environment = child_environment(threads)
    return {name: value for name, value in environment.items() if name not in TUNED_MALLOC} | EXACT_MALLOC


def malloc_in_force() -> str:
    """Say which allocator settings this process was started with."""
    found = {name: os.environ[name] for name in [*TUNED_MALLOC, "LD_PRELOAD"] if os.environ.get(name)}
    return " ".join(f"{name}={value}" for name, value in found.items()) or "system default"
