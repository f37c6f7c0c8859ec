"""What `paca env` prints: everything a bug report needs about the machine, in lines to paste."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from paca.versions import versions

HEADER = "Copy-paste the following information when reporting an issue:"

_PACKAGES = (
    *("paca-torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "tokenizers"),
    *("numpy", "bitsandbytes", "torchao", "triton", "deepspeed", "optimum-habana", "habana-torch-plugin"),
)

# Named by prefix, so that no token or password can be among them.
_VARIABLES = ("PACA_", "PT_HPU_", "HABANA_", "PYTORCH_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")

_TOOLS = {
    "hl-smi": ["-Q", "name,driver_version,memory.total", "-f", "csv,noheader"],
    "nvidia-smi": ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
}


def report() -> str:
    """Return the report, a header and `- Key: value` lines."""
    lines = [*_machine(), *_packages(), *_gaudi(), *_variables(), *_backends(), *_tools()]  # backends may set variables
    return "\n".join([HEADER, "", *(f"- {key}: {value}" for key, value in lines)])


def _machine() -> Iterator[tuple[str, str]]:
    import psutil

    memory = psutil.virtual_memory()
    yield "Platform", platform.platform()
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "CPU", f"{processor()}, {psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads"
    yield "Memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"


def processor() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _packages() -> Iterator[tuple[str, str]]:
    found = versions(*_PACKAGES)
    yield "paca", f"{found['paca']} ({Path(__file__).parent})"
    for name in ("torch", *_PACKAGES):
        yield name, found.get(name, "not installed")


def _backends() -> Iterator[tuple[str, str]]:
    from paca.registry import available_backends, get_backend, use_backend

    for name, why in available_backends().items():
        if why is not None:
            yield f"Backend {name}", f"unavailable: {why}"
            continue
        with use_backend(name) as backend:
            capabilities = backend.capabilities
            dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in capabilities.dtypes))
            strategies = ", ".join(f"{kind}={choice}" for kind, choice in backend.strategies.items())
            yield f"Backend {name}", f"available: {backend.describe()}"
            yield f"Backend {name}, strategies", strategies
            yield f"Backend {name}, dtypes", dtypes
            yield f"Backend {name}, quantised bases", _formats(capabilities.quantised)
    try:
        yield "Backend in use", get_backend().name
    except (ValueError, RuntimeError) as error:
        yield "Backend in use", f"none: {error}"


def _formats(formats: Collection[str]) -> str:
    """Say which formats of a frozen weight can be used as things are, and what the others need."""
    from importlib.util import find_spec

    from paca.quantising import EXTRA, PACKAGES

    missing = {name: PACKAGES[name] for name in sorted(formats) if find_spec(PACKAGES[name]) is None}
    usable = ", ".join(sorted(set(formats) - set(missing))) or "none"
    if not missing:
        return usable
    return f"{usable}; {', '.join(missing)} with {' and '.join(sorted(set(missing.values())))}: pip install '{EXTRA}'"


def _gaudi() -> Iterator[tuple[str, str]]:
    """The Gaudi software, told without importing it: an import would start the device and fix its mode."""
    from importlib.util import find_spec

    if find_spec("habana_frameworks") is None:
        yield "habana_frameworks", "not installed"
        return
    names = ("habana-torch-plugin", "habana-torch-dataloader")
    found = versions(*names)
    told = next((f"{found[name]} ({name})" for name in names if name in found), "installed, version unknown")
    yield "habana_frameworks", told
    if "PT_HPU_LAZY_MODE" not in os.environ:
        yield (
            "PT_HPU_LAZY_MODE",
            "not set: the hpu backend takes 0 (eager and torch.compile), optimum-habana alone would take 1 (lazy)",
        )


def _variables() -> Iterator[tuple[str, str]]:
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES):
            yield name, os.environ[name]


def _tools() -> Iterator[tuple[str, str]]:
    for tool, options in _TOOLS.items():
        if shutil.which(tool) is None:
            continue
        try:
            done = subprocess.run([tool, *options], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            yield tool, f"failed: {error}"
            continue
        text = done.stdout if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr or done.stdout}"
        yield tool, "; ".join(line.strip() for line in text.splitlines() if line.strip())
