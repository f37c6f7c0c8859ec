"""Decides whether a computed result is the one it should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paca.parity.cases import BITWISE, Case
from paca.parity.findings import Status
from paca.parity.formats import first_difference, name_of, ulp_distance
from paca.parity.training_step import RESTORED
from paca.parity.trajectory import Tolerance, Trajectory, drift
from paca.parity.truth import Truth, truths


@dataclass(frozen=True)
class Verdict:
    """How a result compares; see `Finding`."""

    status: Status
    fraction: float | None = None
    detail: str = ""


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst status with the first reason for it, and the largest fraction."""
    listed = list(verdicts)
    order = list(Status)
    found = max(listed, key=lambda verdict: order.index(verdict.status))  # the first of several
    fractions = [verdict.fraction for verdict in listed if verdict.fraction is not None]
    return Verdict(found.status, max(fractions, default=None), found.detail)


def judge(case: Case, found: Mapping[str, Tensor], wanted: Iterable[str]) -> Verdict:
    """Compare results of a case with what they should be.

    In the bitwise tier they must be the recorded bits. In the bounded tier each must be within its bound of float64;
    products are held to the weight that this machine wrote, which is compared by itself.

    Args:
        case: which.
        found: results by name; see `truths`.
        wanted: the names of those that must be there.
    """
    verdicts = []
    weights = {}
    for name in ("adapted", "adapted_after"):
        weight = found.get(name, case.expected[name])
        usable = not _other_kind(weight, case.expected[name].shape, case.expected[name].dtype)
        weights[name] = weight if usable else case.expected[name]  # the mismatch itself is found below
    exact = truths(case, **weights)
    for name in sorted(wanted, key=lambda name: name not in weights):  # a wrong weight explains wrong products
        place = f"{case.name} {name}"
        value = found.get(name)
        if value is None:
            verdicts.append(Verdict(Status.FAILED, detail=f"{place}: nothing was computed"))
        elif name == RESTORED:
            verdicts.append(same_bits(value, case.inputs["weight"], place))
        elif case.tier == BITWISE or exact[name].bound is None:
            verdicts.append(same_bits(value, case.expected[name], place))
        else:
            verdicts.append(within_bound(value, exact[name], place))
    return worst(verdicts)


def same_bits(found: Tensor, expected: Tensor, place: str) -> Verdict:
    """Demand the same shape, dtype and bits; the sign of a zero aside."""
    if mismatch := _other_kind(found, expected.shape, expected.dtype):
        return Verdict(Status.FAILED, detail=f"{place}: {mismatch}")
    difference = first_difference(found, expected)
    if difference is None:
        return Verdict(Status.IDENTICAL)
    return Verdict(Status.FAILED, detail=f"{place}: {difference}")


def within_bound(found: Tensor, truth: Truth, place: str) -> Verdict:
    """Demand the shape, dtype and, for each element, an error within the bound."""
    if mismatch := _other_kind(found, truth.exact.shape, truth.dtype):
        return Verdict(Status.FAILED, detail=f"{place}: {mismatch}")
    assert truth.bound is not None
    error = (found.double() - truth.exact).abs()
    outside = ~(error <= truth.bound)  # a nan is outside
    fractions = torch.where(truth.bound > 0, error / truth.bound, torch.where(error > 0, torch.inf, 0.0))
    fraction = float(fractions.nan_to_num(torch.inf, posinf=torch.inf).max()) if found.numel() else 0.0
    if not bool(outside.any()):
        return Verdict(Status.WITHIN_BOUND, fraction)
    index = tuple(outside.nonzero()[0].tolist())
    apart = int(ulp_distance(found[index], truth.exact[index].to(truth.dtype)))
    where = ", ".join(map(str, index))
    detail = (
        f"{place}: [{where}] is {float(found[index]):.9g}, exactly {float(truth.exact[index]):.9g}, {apart} ulp apart: "
        f"an error of {float(error[index]):.3g} where rounding explains {float(truth.bound[index]):.3g}; "
        f"{int(outside.sum())} of {found.numel()} elements are outside their bounds"
    )
    return Verdict(Status.FAILED, fraction, detail)


def judge_trajectory(run: Trajectory, reference: Trajectory, tolerance: Tolerance) -> Verdict:
    """Demand losses and deltas within their tolerances of the reference's."""
    of_losses, of_deltas = drift(run, reference)
    parts = [apart / allowed for apart, allowed in zip(of_losses, tolerance.losses, strict=True)]
    parts.append(of_deltas / tolerance.deltas)
    fraction = max((part if part == part else torch.inf for part in parts), default=0.0)  # a nan is outside
    detail = f"the deltas are {of_deltas:.2g} of their size from the reference's, and {tolerance.deltas:.2g} is allowed"
    if fraction <= 1:
        return Verdict(Status.WITHIN_BOUND, fraction, detail)
    for step, part in enumerate(parts[:-1]):
        if not part <= 1:
            loss = (
                f"the loss of step {step + 1} is {run.losses[step]:.9g}, the reference's {reference.losses[step]:.9g}, "
                f"and {tolerance.losses[step]:.3g} apart is allowed"
            )
            return Verdict(Status.FAILED, fraction, loss)
    return Verdict(Status.FAILED, fraction, detail)


def _other_kind(found: Tensor, shape: torch.Size, dtype: torch.dtype) -> str:
    """Say how shape or dtype differ from those wanted, or nothing."""
    if found.dtype != dtype:
        return f"came in {name_of(found.dtype)}, expected {name_of(dtype)}"
    if found.shape != shape:
        return f"came in shape {tuple(found.shape)}, expected {tuple(shape)}"
    return ""
