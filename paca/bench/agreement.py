"""Checks that all methods do the same work, before any of them is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from paca.bench.contestant import Contestant

# Largest deviation from the floor that rounding explains, in epsilons of the dtype: a stack adds up thousands of terms.
_ROUNDINGS = 256


def first_step(contestant: Contestant) -> tuple[Tensor, Tensor]:
    """Return output and input gradient of an untouched contestant, and leave no gradient behind.

    Raises:
        RuntimeError: if a parameter that should train gets no gradient.
    """
    output = contestant.forward()
    output.backward(contestant.gy)
    gradient = contestant.x.grad
    idle = sum(parameter.grad is None for parameter in contestant.trained)
    if gradient is None or idle:
        raise RuntimeError(f"{idle} of {len(contestant.trained)} trained parameters, or the input, got no gradient")
    contestant.model.zero_grad()
    contestant.x.grad = None
    return output.detach(), gradient


def deviation(name: str, found: tuple[Tensor, Tensor], floor: tuple[Tensor, Tensor]) -> float:
    """Return the largest difference from the floor, relative to the floor's largest value.

    Raises:
        RuntimeError: if it is more than rounding explains: every method here starts as the pretrained model, so another
            output or input gradient means that it does other work and its time says nothing.
    """
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, floor, strict=True))
    limit = _ROUNDINGS * torch.finfo(floor[0].dtype).eps
    if not worst <= limit:
        raise RuntimeError(
            f"{name} deviates from the frozen floor by {worst:.1e} of the largest value (rounding explains "
            f"{limit:.1e}): it does not compute the same function, so it cannot be compared"
        )
    return worst
