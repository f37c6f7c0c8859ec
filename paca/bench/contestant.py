"""One method with its own model, optimizer and batch, and the step that is measured."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import paca
from paca.backend import Backend
from paca.bench import stack
from paca.bench.methods import Method
from paca.bench.result import Sample, Seconds
from paca.bench.setting import PLAIN, Setting
from paca.bench.shapes import Shape

# Enough for any backend to have its graphs: they are captured after some ordinary steps.
STEPS_TO_CAPTURE = 5


class Contestant:
    """A model that is ready to train.

    Args:
        method: how it trains.
        shape: sizes of the model and the batch.
        dtype: of the weights and the batch.
        backend: where it runs.
        seed: all contestants of one seed have equal weights and an equal batch.
        setting: how its model runs.
    """

    def __init__(
        self,
        method: Method,
        shape: Shape,
        dtype: torch.dtype,
        backend: Backend,
        seed: int,
        setting: Setting = PLAIN,
    ) -> None:
        device = backend.device()
        self.backend = backend
        self.seed, self.dtype = seed, dtype
        built = stack.build(shape, dtype, device, seed, setting.base)
        self.model = setting.apply_to(method.prepare(setting.fuse(built), shape))
        self.run = backend.capture(self.model) if setting.graph == "whole" else self.model
        self.resize(shape)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = _adamw(self.trained) if self.trained else None

    def resize(self, shape: Shape) -> None:
        """Take another batch, of a shape that differs from the model's in batch and tokens only."""
        self.x, self.gy = stack.batch(shape, self.dtype, self.backend.device(), self.seed)

    @property
    def last_layer(self) -> nn.Module:
        """The last decoder layer, whatever the model is wrapped in."""
        return [module for module in self.model.modules() if type(module).__name__ == "LlamaDecoderLayer"][-1]

    def forward(self) -> Tensor:
        """Return the output, (batch, tokens, hidden)."""
        return stack.run(self.run, self.x)

    def settle(self) -> None:
        """Train until a model that is to be replayed from graphs is.

        Raises:
            RuntimeError: if it is not: what it then runs as would be measured under a wrong name.
        """
        if self.run is self.model:
            return
        for _ in range(STEPS_TO_CAPTURE):
            self.step()
        if (why := getattr(self.run, "why_eager", None)) is not None:
            raise RuntimeError(f"it is not replayed from graphs: {why}")

    def step(self) -> Sample:
        """Train one step and time it.

        A device with events notes the times itself, and works through the whole step without a stop, as in training.
        Elsewhere what a forward and a backward leave running is waited for, inside their time.
        """
        # The other contestants' optimizers ran since the last step. None of them exists in a real training, but each
        # tells PaCA that unseen values may have changed; without this the next forward would write for nothing.
        paca.refresh(self.model)
        faults = _page_faults()
        self.backend.synchronize()
        times = self.work()
        self.backend.synchronize()
        forward, backward, optimizer = (_between(a, b) for a, b in pairwise(times))
        return Sample(forward, backward, optimizer, _page_faults() - faults)

    def work(self) -> list[_Moment]:
        """Train one step; returns the moments before and after its parts."""
        times = [_now(self.backend)]
        output = self.forward()
        times.append(_now(self.backend))
        output.backward(self.gy)
        times.append(_now(self.backend))
        del output
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.x.grad = None
        times.append(_now(self.backend))
        return times


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where torch has a fused one for these parameters, without decay."""
    settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0}
    try:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    except RuntimeError:  # torch's answer for a device without
        return torch.optim.AdamW(parameters, **settings)


@dataclass(frozen=True)
class _Moment:
    """A moment by the process's CPU time, by the clock on the wall, and by the device."""

    cpu: float
    wall: float
    event: torch.Event | None


def _now(backend: Backend) -> _Moment:
    """Return this moment; without events the device is idle then."""
    event = backend.event()
    if event is None:
        backend.synchronize()
    else:
        event.record()
    return _Moment(time.process_time(), time.perf_counter(), event)


def _between(start: _Moment, end: _Moment) -> Seconds:
    device = None if start.event is None or end.event is None else start.event.elapsed_time(end.event) / 1000
    return Seconds(end.cpu - start.cpu, end.wall - start.wall, device)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
