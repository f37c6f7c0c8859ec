"""Fixtures shared by all tests. Nothing here may need a device."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from paca import registry


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test one seed, one thread and no chosen backend."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(registry, "_current", None)
    monkeypatch.delenv("PACA_BACKEND", raising=False)
