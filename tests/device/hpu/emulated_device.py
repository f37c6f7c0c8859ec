"""Builds and loads a device that torch calls "hpu" and that computes on the CPU, for tests in a process of their own.

The build needs g++ and takes about a minute; it is kept in `.cache` of the checkout, keyed by its source and torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "emulated" / "device.cpp"
CACHE = Path(__file__).resolve().parents[3] / ".cache" / "emulated-hpu"


def why_not() -> str | None:
    """Say why it cannot be built here, or None."""
    if shutil.which("g++") is None and not _library().exists():
        return "no g++ to build the emulated device with"
    if not (Path(torch.__file__).parent / "include").is_dir() and not _library().exists():
        return "this torch comes without its C++ headers"
    return None


def install() -> None:
    """Build the device if need be, load it, and put it behind the stand-in's `torch.hpu`."""
    torch.ops.load_library(str(_build()))
    torch.utils.rename_privateuse1_backend("hpu")
    import habana_frameworks.torch.hpu as hpu

    hpu.use_emulated_device(Statistics())
    torch._register_device_module("hpu", hpu)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=False, for_storage=False)


class Statistics:
    """What the device's allocator has done."""

    def read(self) -> dict[str, int]:
        """As the vendor's `memory_stats` names it."""
        names = ("InUse", "MaxInUse", "NumAllocs", "NumFrees", "ToDevice", "ToHost", "Items")
        return dict(zip(names, torch.ops.paca_emulated_hpu.statistics(), strict=True))

    def reset_peak(self) -> None:
        """Let the peak start from what is in use."""
        torch.ops.paca_emulated_hpu.reset_peak()


def _library() -> Path:
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    return CACHE / f"hpu-{key}.so"


def _build() -> Path:
    library = _library()
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}.so")
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    command = [
        *("g++", "-std=c++20", "-O0", "-fPIC", "-shared", "-w", str(SOURCE), "-o", str(unfinished)),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
        *(f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"),
    ]
    subprocess.run(command, check=True)
    os.replace(unfinished, library)
    return library
