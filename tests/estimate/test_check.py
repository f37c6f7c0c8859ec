"""Predicted peaks are those of real processes."""

from __future__ import annotations

import pytest

from paca.estimate.check import Case, compare
from paca.registry import available_backends


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "paca", "qpaca"])
def test_a_process_takes_what_was_predicted(method: str) -> None:
    if method.startswith("q"):
        pytest.importorskip("bitsandbytes")
    compared = compare(Case(method))
    assert abs(compared.ratio - 1) < 0.15, compared


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", ["lora", "paca", "qlora", "qpaca"])
def test_a_gpu_takes_what_was_predicted(method: str, checkpointing: bool) -> None:
    if why := available_backends().get("cuda", "there is no CUDA backend"):
        pytest.skip(f"no GPU: {why}")
    if method.startswith("q"):
        pytest.importorskip("bitsandbytes")
    shape = {"layers": 4, "hidden": 2048, "ffn": 5632, "heads": 16, "vocabulary": 32000, "length": 2048}
    compared = compare(Case(method, "bfloat16", checkpointing, **shape), "cuda")
    assert abs(compared.ratio - 1) < 0.07, compared
