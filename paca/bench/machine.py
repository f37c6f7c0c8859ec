"""Describes what a benchmark ran on, so that it can be judged and repeated."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from paca.backend import Backend
from paca.bench.environment import malloc_in_force
from paca.report import processor
from paca.versions import versions


def describe(backend: Backend) -> dict[str, Any]:
    """Return the machine, the software and the settings that a measurement depends on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": backend.name,
        "device": backend.describe(),
        "strategies": backend.strategies,
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "packages": versions("transformers", "peft"),
        "revision": _revision(),
        "threads": torch.get_num_threads(),
        "malloc": malloc_in_force(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _revision() -> str | None:
    """The checkout's commit, with "-dirty" if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
