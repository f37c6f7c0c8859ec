"""How far a run may drift is what one ulp of change does on the reference, times a stated allowance."""

from __future__ import annotations

import pytest
import torch

import paca
from paca.parity import trajectory
from paca.parity.formats import ulp_distance
from paca.parity.trajectory import Trajectory, calibrated, draw_model, drift, one_ulp_off


@pytest.mark.parametrize("dtype", trajectory.DTYPES)
def test_every_number_moves_to_a_neighbour_some_up_and_some_down(dtype):
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = one_ulp_off(values, torch.Generator().manual_seed(1))
    assert ulp_distance(moved, values).tolist() == [1] * 500
    assert 100 < int((moved > values).sum()) < 400


def test_the_tolerance_is_twice_the_farthest_of_six_perturbed_runs(monkeypatch):
    losses = iter([2.0, 2.01, 2.0, 2.0, 2.0, 2.0, 1.98])  # the reference's, then those of the perturbed
    sizes = iter([1.0, 1.0, 1.125, 1.0, 1.0, 1.0, 1.25])
    monkeypatch.setattr(
        trajectory,
        "train_model",
        lambda numbers, dtype, backend: Trajectory((next(losses), 1.0), {"a": torch.full((2, 2), next(sizes))}),
    )
    _, tolerance = calibrated({"a": torch.ones(2)}, torch.float32, paca.set_backend("cpu"))
    assert tolerance.deltas == pytest.approx(0.5)
    assert tolerance.losses == pytest.approx((0.04, 0.04))  # what one step may drift, later ones may


def test_a_loss_is_allowed_its_own_rounding(monkeypatch):
    monkeypatch.setattr(trajectory, "train_model", lambda *given: Trajectory((4.0,), {"a": torch.ones(2, 2)}))
    _, tolerance = calibrated({"a": torch.ones(2)}, torch.float32, paca.set_backend("cpu"))
    assert tolerance.losses == pytest.approx((2 * 4.0 * torch.finfo(torch.float32).eps,))


def test_drift_is_absolute_in_losses_and_relative_in_deltas():
    reference = Trajectory((2.0, 1.0), {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])})
    run = Trajectory((2.5, 0.0), {"a": torch.tensor([[3.0]]), "b": torch.tensor([[5.0]])})
    assert drift(run, reference) == ([0.5, 1.0], pytest.approx(1 / 5))


def test_training_leaves_the_recorded_numbers_alone():
    numbers = draw_model()
    before = {name: value.clone() for name, value in numbers.items()}
    run = trajectory.train_model(numbers, torch.float32, paca.set_backend("cpu"))
    assert all(torch.equal(numbers[name], value) for name, value in before.items())
    assert run.losses[-1] < run.losses[0] - 1
