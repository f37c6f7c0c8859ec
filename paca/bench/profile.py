"""Says what the time of a step goes to: the device's kernels, or a CPU's operations, by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.profiler import profile, supported_activities

from paca.bench.contestant import Contestant
from paca.bench.result import Operation

STEPS = 3
LONGEST_NAME = 200  # of a kernel made from templates


def profile_steps(contestant: Contestant) -> list[Operation]:
    """Train some steps under the profiler and return what one of them ran, what took longest first.

    Where a device works beside the CPU its kernels and copies are listed, else the CPU's operations, each with its own
    time without that of others it calls.
    """
    contestant.step()  # after steps of others this one may write its columns again
    with profile(activities=supported_activities()) as profiler:
        for _ in range(STEPS):
            contestant.work()
        contestant.backend.synchronize()
    return operations(profiler.key_averages())


def operations(events: Iterable[Any]) -> list[Operation]:
    """Return those of the device, or else of the CPU, by name; a name's further variants count with it."""
    ran = [event for event in events if not event.is_user_annotation]
    kernels = [(event.key, event.count, event.self_device_time_total) for event in ran if _on_device(event)]
    found: dict[str, Operation] = {}
    for name, calls, microseconds in kernels or [(e.key, e.count, e.self_cpu_time_total) for e in ran]:
        short = name[:LONGEST_NAME]
        before = found.get(short, Operation(short, 0.0, 0.0))
        seconds = before.seconds + microseconds / 1e6 / STEPS
        found[short] = Operation(short, before.calls + calls / STEPS, seconds)
    return sorted(found.values(), key=lambda operation: -operation.seconds)


def _on_device(event: Any) -> bool:
    return bool(event.device_type.name != "CPU" and event.self_device_time_total > 0)
