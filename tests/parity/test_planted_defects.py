"""A defect of each kind that a device can have is caught by the tier that should, and only what has it is blamed."""

from __future__ import annotations

import planted
import pytest
import torch

from paca import registry
from paca.parity.command import main
from paca.parity.findings import Status
from paca.parity.operations import OPERATIONS
from paca.parity.record import REFERENCE, Record, read
from paca.parity.verify import BLOCK, MODEL, Selection, verify

HALVES = {torch.bfloat16, torch.float16}
ALL = {torch.float32, *HALVES}
# The class, the tier, the operation that must fail, and in which dtypes.
CAUGHT = [
    # Sums in bfloat16 are too coarse for every dtype: also for bfloat16 itself, whose results would be exact.
    (planted.SumsInBfloat16, "bitwise", "forward", ALL),
    (planted.SumsInBfloat16, "bitwise", "grad_columns", ALL),
    (planted.SumsInBfloat16, "bounded", "forward", ALL),
    (planted.SumsInBfloat16, "bounded", "grad_columns", ALL),
    (planted.TF32, "bitwise", "forward", {torch.float32}),
    (planted.TF32, "bitwise", "grad_input", {torch.float32}),
    (planted.TF32, "bounded", "forward", {torch.float32}),
    (planted.TF32, "bounded", "grad_input", {torch.float32}),
    (planted.TF32, "trajectory", MODEL, {torch.float32}),
    (planted.UnsortedIndex, "bitwise", "gather", ALL),
    (planted.UnsortedIndex, "bitwise", "layer, resident", ALL),
    (planted.UnsortedIndex, "bounded", "layer, resident", ALL),
    (planted.ScaledTwice, "bitwise", "write_columns", ALL),
    (planted.ScaledTwice, "bitwise", "layer, swap", ALL),
    (planted.ScaledTwice, "bounded", "write_columns", ALL),
    (planted.StaleColumns, "bitwise", "layer, resident", ALL),
    (planted.StaleColumns, "bitwise", BLOCK, ALL),
    (planted.StaleColumns, "trajectory", MODEL, {torch.float32, torch.bfloat16}),
    (planted.NarrowGradient, "bitwise", "grad_columns", HALVES),
    (planted.NarrowGradient, "bounded", "grad_columns", HALVES),
    (planted.NarrowGradient, "bounded", "layer, resident", HALVES),
    (planted.ScaledTwice, "trajectory", MODEL, {torch.float32, torch.bfloat16}),
    # Exact numbers have nothing to chop.
    (planted.ChoppedCasts, "bounded", "forward", HALVES),
    (planted.ChoppedCasts, "bounded", "grad_input", HALVES),
    (planted.UpdateRoundedFirst, "bounded", "write_columns", HALVES),
    (planted.FirstBlockOnly, "bitwise", "grad_columns", ALL),
    (planted.FirstBlockOnly, "bounded", "grad_columns", ALL),
    (planted.FirstReaderOnly, "bitwise", "grad_input_sum", ALL),
    (planted.FirstReaderOnly, "trajectory", MODEL, {torch.float32, torch.bfloat16}),
    (planted.FirstReaderOnly, "bounded", "grad_input_sum", ALL),
    (planted.OldColumnsLeft, "bitwise", "switch_columns", ALL),
    (planted.OldColumnsLeft, "bounded", "switch_columns", ALL),
]
# The only operations that the defect is in.
FAULTY = {
    planted.SumsInBfloat16: {"forward", "grad_columns"},
    planted.TF32: {"forward", "grad_input"},
    planted.UnsortedIndex: {"gather"},
    planted.ScaledTwice: {"write_columns"},
    planted.StaleColumns: set(),  # a single write is right
    planted.NarrowGradient: {"grad_columns"},
    planted.ChoppedCasts: {"forward", "grad_input"},
    planted.UpdateRoundedFirst: {"write_columns"},
    planted.FirstBlockOnly: {"grad_columns"},
    planted.FirstReaderOnly: {"grad_input_sum"},
    planted.OldColumnsLeft: {"switch_columns"},
}


@pytest.fixture(scope="module")
def record() -> Record:
    return read(REFERENCE)


@pytest.fixture(scope="module")
def reports(record: Record):
    """What `verify` says of each planted backend, found once."""
    found = {}

    def report_of(backend):
        if backend not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(registry.BUILT_IN, "planted", f"planted:{backend.__name__}")
                tiers = {tier for defect, tier, *_ in CAUGHT if defect is backend}
                found[backend] = verify(record, Selection(["planted"], sorted(tiers)))
        return found[backend]

    return report_of


@pytest.mark.parametrize(
    ("backend", "tier", "operation", "dtypes"), CAUGHT, ids=lambda value: getattr(value, "__name__", None)
)
def test_is_caught(reports, backend, tier, operation, dtypes):
    report = reports(backend)
    assert not report.passed
    found = [f for f in report.findings if f.backend == "planted" and f.tier == tier and f.operation == operation]
    assert {f.dtype for f in found if f.status is Status.FAILED} == dtypes
    assert all(f.detail for f in found if f.status is Status.FAILED)


@pytest.mark.parametrize("backend", FAULTY, ids=lambda backend: backend.__name__)
def test_no_other_operation_is_blamed(reports, backend):
    failed = {finding.operation for finding in reports(backend).failed}
    assert failed & set(OPERATIONS) == FAULTY[backend]
    if backend is not planted.OldColumnsLeft:  # no training step switches
        assert failed - set(OPERATIONS), "no training step noticed"


def test_the_same_backend_without_a_defect_passes(record, monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN, "planted", "planted:Planted")
    report = verify(record, Selection(backends=["planted"], tiers=["bitwise", "bounded"]))
    assert report.failed == []
    assert report.passed


def test_the_message_names_operation_case_element_and_distance(reports):
    found = next(f for f in reports(planted.UnsortedIndex).failed if f.operation == "gather")
    assert str(found).startswith("planted: gather, ")
    assert "bitwise/odd/float32 gathered: [0, 0] is " in found.detail
    assert " ulp apart; " in found.detail


def test_what_a_device_cannot_do_is_a_failure_with_its_words(record, monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN, "planted", "planted:Raising")
    report = verify(record, Selection(backends=["planted"], tiers=["bitwise"]))
    assert "raised NotImplementedError: this device has no gather" in {finding.detail for finding in report.failed}


def test_the_command_fails_with_status_1_and_prints_what_failed(monkeypatch, capsys):
    monkeypatch.setitem(registry.BUILT_IN, "planted", "planted:ScaledTwice")
    assert main(["verify", "--backend", "planted", "--tier", "bitwise"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "planted: write_columns, all=planted, float32, bitwise: FAILED: bitwise/odd/float32 adapted: [" in printed
