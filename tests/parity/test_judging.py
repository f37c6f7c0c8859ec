"""A result that differs anywhere, or is missing, fails; what was not compared is not counted as compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paca.parity import verify as verifying
from paca.parity.cases import BITWISE, BOUNDED, Case, new_cases
from paca.parity.findings import Finding, Report, Status
from paca.parity.judge import Verdict, judge, judge_trajectory, worst
from paca.parity.record import REFERENCE, read
from paca.parity.recording import make_record
from paca.parity.training_step import RESTORED, layer_results
from paca.parity.trajectory import Tolerance, Trajectory
from paca.parity.verify import Selection, audit

CASES = {case.name: case for case in new_cases(torch.bfloat16)}
WITH_BIAS = "conv1d/bfloat16"


def results(case: Case) -> dict[str, torch.Tensor]:
    """What a machine without a defect gives."""
    return {name: value.clone() for name, value in case.expected.items()} | {RESTORED: case.inputs["weight"].clone()}


def names(case: Case) -> list[str]:
    return [*case.output_names, RESTORED]


@pytest.mark.parametrize("tier", [BITWISE, BOUNDED])
def test_right_results_pass(tier):
    case = CASES[f"{tier}/{WITH_BIAS}"]
    verdict = judge(case, results(case), names(case))
    assert verdict.status is (Status.IDENTICAL if tier == BITWISE else Status.WITHIN_BOUND)


@pytest.mark.parametrize("tier", [BITWISE, BOUNDED])
@pytest.mark.parametrize("name", names(CASES[f"bitwise/{WITH_BIAS}"]))
def test_each_result_is_compared(tier, name):
    case = CASES[f"{tier}/{WITH_BIAS}"]
    found = results(case)
    found[name].view(-1)[-1] += 64
    verdict = judge(case, found, names(case))
    assert verdict.status is Status.FAILED
    assert verdict.detail.startswith(f"{case.name} {name}: [")


@pytest.mark.parametrize("name", ["y", "y_after", "grad_input", "grad_bias"])
def test_no_rounding_explains_three_ulps(name):
    case = CASES[f"{BOUNDED}/{WITH_BIAS}"]
    found = results(case)
    value = found[name].view(-1)
    largest = value.abs().argmax()
    for _ in range(3):
        value[largest] = torch.nextafter(value[largest], value[largest] * 2)
    assert judge(case, found, names(case)).status is Status.FAILED


@pytest.mark.parametrize("name", names(CASES[f"bitwise/{WITH_BIAS}"]))
def test_each_result_must_be_there(name):
    case = CASES[f"{BITWISE}/{WITH_BIAS}"]
    found = results(case)
    del found[name]
    verdict = judge(case, found, names(case))
    assert (verdict.status, verdict.detail) == (Status.FAILED, f"{case.name} {name}: nothing was computed")


@pytest.mark.parametrize("tier", [BITWISE, BOUNDED])
@pytest.mark.parametrize(
    ("change", "message"),
    [(torch.Tensor.float, "came in float32"), (lambda value: value[:-1], "came in shape")],
    ids=["dtype", "shape"],
)
def test_another_dtype_or_shape_fails(tier, change, message):
    case = CASES[f"{tier}/{WITH_BIAS}"]
    for name in set(names(case)) - {"grad_delta"}:
        found = results(case)
        found[name] = change(found[name])
        assert message in judge(case, found, names(case)).detail


def test_a_training_step_gives_all_but_what_only_single_operations_do():
    for case in CASES.values():
        assert {*layer_results(case)} == {*names(case)} - {"gathered", "grad_input_sum"}


def test_the_worst_of_several_counts_and_the_largest_fraction():
    verdicts = [
        Verdict(Status.WITHIN_BOUND, 0.5),
        Verdict(Status.FAILED, 3.0, "first"),
        Verdict(Status.FAILED, 7.0, "second"),
    ]
    assert worst(verdicts) == Verdict(Status.FAILED, 7.0, "first")


REFERENCE_RUN = Trajectory((2.0, 1.5), {"a": torch.ones(3, 2), "b": torch.ones(2, 2)})
ALLOWED = Tolerance((0.01, 0.02), 0.05)


@pytest.mark.parametrize(
    ("losses", "factor", "status", "detail"),
    [
        ((2.0, 1.5), 1.0, Status.WITHIN_BOUND, "the deltas are 0 of their size from the reference's, and 0.05"),
        ((2.009, 1.481), 1.04, Status.WITHIN_BOUND, "the deltas are 0.04 of their size"),
        ((2.0, 1.5), 1.06, Status.FAILED, "the deltas are 0.06 of their size"),
        ((2.011, 1.5), 1.0, Status.FAILED, "the loss of step 1 is 2.011"),
        ((2.0, 1.475), 1.0, Status.FAILED, "the loss of step 2 is 1.475"),
        ((2.0, float("nan")), 1.0, Status.FAILED, "the loss of step 2 is nan"),
        ((2.0, 1.5), float("nan"), Status.FAILED, "the deltas are nan"),
    ],
)
def test_losses_and_deltas_are_both_held_to_their_tolerance(losses, factor, status, detail):
    run = Trajectory(losses, {name: delta * factor for name, delta in REFERENCE_RUN.deltas.items()})
    verdict = judge_trajectory(run, REFERENCE_RUN, ALLOWED)
    assert verdict.status is status
    assert verdict.detail.startswith(detail)


def test_a_run_that_trained_other_layers_is_no_match():
    with pytest.raises(ValueError, match="trained a, the reference a, b"):
        judge_trajectory(Trajectory((2.0, 1.5), {"a": torch.ones(3, 2)}), REFERENCE_RUN, ALLOWED)


def test_only_what_was_compared_here_can_pass():
    def report(*findings: Finding) -> bool:
        return Report({}, {"cpu": {}}, {}, findings).passed

    here = Finding("cpu", "gather", "", "", torch.float32, BITWISE, Status.IDENTICAL)
    assert report(here)
    assert not report(replace(here, backend="the record"))
    assert not report(replace(here, status=Status.SKIPPED))
    assert not report(here, replace(here, status=Status.FAILED))


@pytest.mark.parametrize(
    ("tier", "damage"),
    [
        (BITWISE, lambda record: first(record, BITWISE).expected["y"][0].add_(1)),
        (BOUNDED, lambda record: first(record, BOUNDED).expected["y"][0].mul_(1.1)),
        (BITWISE, lambda record: record.block_expected["q_proj.delta"][0, 0].add_(1)),
        ("trajectory", lambda record: next(iter(record.trajectories.values())).deltas.popitem()[1].mul_(2)),
    ],
    ids=["bitwise layer", "bounded layer", "block", "trajectory"],
)
def test_every_part_of_a_record_is_audited(tier, damage):
    record = read(REFERENCE)
    damage(record)
    failed = [finding for finding in audit(record, Selection(tiers=[tier])) if finding.status is Status.FAILED]
    assert failed
    assert {finding.backend for finding in failed} == {verifying.THE_RECORD}


def first(record, tier):
    return next(case for case in record.cases if case.tier == tier)


def test_nothing_is_recorded_that_is_not_proved_exact(monkeypatch):
    import paca
    from paca.parity import recording
    from paca.parity.certificate import NotExactError

    def rounded(dtype, seed):
        case = next(new_cases(dtype, seed))
        case.inputs["x"].add_(2.0**-20)
        yield case

    monkeypatch.setattr(recording, "new_cases", rounded)
    with pytest.raises(NotExactError, match="a partial sum can need"):
        make_record(paca.set_backend("cpu"))
