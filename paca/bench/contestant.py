"""One method with its own model, optimizer and batch, and the step that is measured."""

from __future__ import annotations

import resource
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import paca
from paca.backend import Backend
from paca.bench import stack
from paca.bench.methods import Method
from paca.bench.result import Sample, Seconds
from paca.bench.shapes import Shape


class Contestant:
    """A model that is ready to train.

    Args:
        method: how it trains.
        shape: sizes of the model and the batch.
        dtype: of the weights and the batch.
        backend: where it runs.
        seed: all contestants of one seed have equal weights and an equal batch.
    """

    def __init__(self, method: Method, shape: Shape, dtype: torch.dtype, backend: Backend, seed: int) -> None:
        device = backend.device()
        self.backend = backend
        self.model = method.prepare(stack.build(shape, dtype, device, seed), shape)
        self.x, self.gy = stack.batch(shape, dtype, device, seed)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = _adamw(self.trained) if self.trained else None

    @property
    def last_layer(self) -> nn.Module:
        """The last decoder layer, whatever the model is wrapped in."""
        return [module for module in self.model.modules() if type(module).__name__ == "LlamaDecoderLayer"][-1]

    def forward(self) -> Tensor:
        """Return the output, (batch, tokens, hidden)."""
        return stack.run(self.model, self.x)

    def step(self) -> Sample:
        """Train one step and time it.

        What a forward and a backward leave running on the device is waited for, inside their time.
        """
        # The other contestants' optimizers ran since the last step. None of them exists in a real training, but each
        # tells PaCA that unseen values may have changed; without this the next forward would write for nothing.
        paca.refresh(self.model)
        faults = _page_faults()
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
        forward, backward, optimizer = (_between(a, b) for a, b in pairwise(times))
        return Sample(forward, backward, optimizer, _page_faults() - faults)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where torch has a fused one for these parameters, without decay."""
    settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0}
    try:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    except RuntimeError:  # torch's answer for a device without
        return torch.optim.AdamW(parameters, **settings)


def _now(backend: Backend) -> tuple[float, float]:
    """Process CPU seconds and wall seconds, once the device is idle."""
    backend.synchronize()
    return time.process_time(), time.perf_counter()


def _between(start: tuple[float, float], end: tuple[float, float]) -> Seconds:
    return Seconds(end[0] - start[0], end[1] - start[1])


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
