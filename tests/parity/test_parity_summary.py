"""The end of a test run says which devices were compared with what, and which were not."""

from __future__ import annotations

import torch
from parity_summary import LEFT_OUT, lines, note

from paca.parity.findings import Finding, Status


def test_each_backend_has_a_line_with_what_was_compared_and_the_result():
    noted = []
    shared = {"operation": "gather", "dtype": torch.bfloat16, "tier": "bitwise"}
    findings = [
        Finding("cpu", strategy="a", graph="eager", status=Status.IDENTICAL, **shared),
        Finding("cpu", strategy="b", graph="compile", status=Status.IDENTICAL, **shared),
        Finding("cpu", strategy="b", graph="compile", status=Status.FAILED, **shared),
        Finding("the record", strategy="", graph="", status=Status.IDENTICAL, **shared),
    ]
    note(lambda name, value: noted.append((name, value)), findings)
    noted.append((LEFT_OUT, ("far", "it is not here")))
    assert lines(noted) == [
        "cpu (2 strategies; eager, compile; bfloat16) compared with the shipped record: 2 identical, 1 FAILED",
        "the record (bfloat16) compared with float64 computed here: 1 identical",
        "far not compared: it is not here",
    ]
    assert lines([]) == []
