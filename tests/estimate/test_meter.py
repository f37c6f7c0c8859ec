"""The meter counts each storage once, from its making to its end."""

from __future__ import annotations

import torch

from paca.estimate.meter import Meter


def test_the_peak_is_where_most_lives_at_once() -> None:
    meter = Meter(lambda tensor: str(tensor.dtype))
    kept = torch.zeros(100)
    meter.record(kept, "before")
    with meter:
        first = torch.ones(1000)
        view = first.view(10, 100)  # the same storage
        sum_ = view.sum()
        del first, view
        second = torch.ones(500, dtype=torch.float64)
        third = second + 1
        del second, third
        last = torch.ones(10)
    use = meter.use_at(meter.peak(0, meter.moment))
    assert use == {"before": 400, "torch.float32": 4, "torch.float64": 8000}
    assert meter.use_at(meter.moment) == {"before": 400, "torch.float32": sum_.nbytes + last.nbytes}


def test_a_part_of_the_time_has_its_own_peak() -> None:
    meter = Meter(lambda tensor: "any")
    with meter:
        large = torch.ones(1000)
        del large
        middle = meter.moment
        small = torch.ones(10)
        end = meter.moment
    assert sum(meter.use_at(meter.peak(0, end)).values()) == 4000
    assert sum(meter.use_at(meter.peak(middle, end)).values()) == small.nbytes
