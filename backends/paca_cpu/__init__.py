"""The CPU backend: the reference that the others are measured against."""

from __future__ import annotations

import platform
import re
import resource
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

from paca.backend import Backend, Capabilities, GraphMode, Memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class CPUBackend(Backend):
    """Any CPU that torch runs on."""

    name: ClassVar[str] = "cpu"

    @classmethod
    def why_unavailable(cls) -> str | None:
        """There always is a CPU."""
        return None

    @property
    def capabilities(self) -> Capabilities:
        """What torch computes on a CPU."""
        return Capabilities(
            dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
            graph_modes=(GraphMode.EAGER, GraphMode.COMPILE),
            quantised=frozenset({"nf4", "fp4", "int8", "fp8"}),
        )

    def device(self, index: int | None = None) -> torch.device:
        """The CPU has no index."""
        return torch.device("cpu")

    def describe(self) -> str:
        """Processor, cores and the vector instructions torch uses."""
        processor = platform.processor() or platform.machine()
        return f"{processor}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"

    def training_arguments(self) -> dict[str, Any]:
        """Stay on the CPU where there is another device, too."""
        return {"use_cpu": True, "dataloader_pin_memory": False}

    def memory(self) -> Memory:
        """The process's resident set, its high-water mark, and the machine's memory."""
        return Memory(psutil.Process().memory_info().rss, _peak_resident_set(), psutil.virtual_memory().total)

    def reset_peak_memory(self) -> None:
        """Reset the kernel's high-water mark; only Linux can."""
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")


def _peak_resident_set() -> int:
    """Bytes; read from /proc because `getrusage` cannot be reset."""
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
