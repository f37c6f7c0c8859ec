"""What fits on a device: the longest sequences and the largest batches whose step needs no more than it has."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from paca.estimate.methods import Method
from paca.estimate.step import Model, Work, footprint

# Assumed, not measured: what caching allocators lose to fragmentation, and what a device's context and libraries take.
ALLOCATOR_SHARE = 0.05
CONTEXT_BYTES = 2**30

WorkOf = Callable[[int, int], Work]  # sequences, length -> how the step is done

TOKENS = 64  # sequences are told in multiples of so many
MOST_SEQUENCES = 1024


@dataclass(frozen=True)
class Device:
    """A device by the size that it is sold with."""

    name: str
    bytes: int

    def holds(self, peak: int) -> bool:
        """Whether a step with this peak of tensors fits."""
        return needed(peak) <= self.bytes


def needed(peak: int) -> int:
    """Bytes that a device must have for a step with this peak of tensors."""
    return round(peak * (1 + ALLOCATOR_SHARE)) + CONTEXT_BYTES


def devices(text: str) -> list[Device]:
    """Read sizes such as "80GB" or "24GB,48GB".

    Vendors' gigabytes of device memory are binary: a card sold with 80GB has 80 GiB, but for a few hundred megabytes.

    Raises:
        ValueError: naming what is no size.
    """
    found = []
    for word in text.split(","):
        size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?\s*", word, re.IGNORECASE)
        if size is None or not float(size[1]):
            raise ValueError(f"--gpu {word.strip() or text!r} is no size; give one such as 80GB, or 24GB,48GB,80GB")
        found.append(Device(f"{size[1]}GB", round(float(size[1]) * 2**30)))
    return found


def longest_sequence(model: Model, method: Method, work_of: WorkOf, sequences: int, device: Device, limit: int) -> int:
    """Tokens of the longest sequences that fit, a multiple of `TOKENS` or the model's limit; 0 if none do."""

    def peak(steps: int) -> int:
        return footprint(model, method, work_of(sequences, min(steps * TOKENS, limit))).peak

    return min(_largest(peak, device, -(-limit // TOKENS)) * TOKENS, limit)


def largest_batch(model: Model, method: Method, work_of: WorkOf, length: int, device: Device) -> int:
    """How many sequences fit at once, at most `MOST_SEQUENCES`; 0 if not one does."""
    return _largest(lambda n: footprint(model, method, work_of(n, length)).peak, device, MOST_SEQUENCES)


def _largest(peak: Callable[[int], int], device: Device, most: int) -> int:
    """The largest number from 1 to `most` whose peak fits, or 0; peaks rise with the number.

    They rise almost evenly, so that the line through the last two leads near the border at once. Where it leads
    nowhere, because they do not, the interval is halved.
    """
    room = (device.bytes - CONTEXT_BYTES) / (1 + ALLOCATOR_SHARE)
    fits, fails = 0, most + 1
    asked: list[tuple[int, int]] = []
    widths = [most]
    number = 1
    while fails - fits > 1:
        asked.append((number, peak(number)))
        if device.holds(asked[-1][1]):
            fits = number
        else:
            fails = number
        widths.append(fails - fits)
        stuck = len(widths) > 5 and widths[-1] > widths[-4] / 2
        (a, low), (b, high) = asked[-2:] if len(asked) > 1 else [(0, 0), (8, 0)]
        along = b + int((room - high) / (high - low) * (b - a)) if high != low else b + (b - a)
        number = (fits + fails) // 2 if stuck else min(max(along, fits + 1), fails - 1)
    return fits
