"""Where the kernels run in this process: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_no_kernels() -> str | None:
    if not (INTERPRETED or torch.cuda.is_available()):
        return "Triton kernels need a CUDA device, or its interpreter: make test-kernels"
    if importlib.util.find_spec("triton") is None:
        assert not INTERPRETED, "TRITON_INTERPRET=1 asks for Triton, which is not installed"
        return "Triton is not installed"
    return None


@pytest.fixture
def device() -> torch.device:
    """The device that Triton's kernels run on."""
    if why := why_no_kernels():
        pytest.skip(why)
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def gpu() -> torch.device:
    """A GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Choices that tests make are not those of the user."""
    from paca_cuda import ops

    monkeypatch.setenv("PACA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    ops._tuner.cache_clear()
    ops._decided.cache_clear()
    ops._loaded.clear()
    ops._tables.clear()
