"""Fixtures shared by all tests. Nothing here may need a device."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from parity_summary import pytest_terminal_summary

from paca import registry

__all__ = ["pytest_terminal_summary"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run demand devices: what is named and missing is an error, what is not named and missing is skipped."""
    parser.addoption("--backend", action="append", default=[], metavar="NAME", help="compare this backend; repeatable")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test one seed, one thread and no chosen backend."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(registry, "_current", None)
    monkeypatch.delenv("PACA_BACKEND", raising=False)
