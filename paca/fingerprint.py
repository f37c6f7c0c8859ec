"""Tells whether an adapter meets the base columns it was trained on.

Deltas mean nothing on other weights, and shapes alone do not show it. The digest is taken of the columns rounded to
bfloat16, so that a float32 and a bfloat16 copy of one checkpoint agree.
"""

from __future__ import annotations

from hashlib import blake2s

import torch
from torch import Tensor


def fingerprint(columns: Tensor, in_features: int) -> str:
    """Return `"<in>:<digest>"` of pretrained columns (out, r) of a weight with `in` inputs."""
    if columns.dtype == torch.float16:  # rounds the smallest values differently from a bfloat16 copy
        return size_only(in_features)
    rounded = columns.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16)
    return f"{in_features}:{blake2s(rounded.numpy().tobytes(), digest_size=8).hexdigest()}"


def size_only(in_features: int) -> str:
    """Return the fingerprint of a weight whose values are not to be compared, or not known."""
    return f"{in_features}:float16"


def in_features_of(recorded: str) -> int:
    """Return the number of inputs that a fingerprint was made with."""
    return int(recorded.partition(":")[0])


def mismatch(expected: str, found: str) -> str:
    """Say how two fingerprints differ, or nothing if they agree.

    A float16 weight, on either side, is compared by size only. Quantised weights have the format between size and
    digest (`paca.quantised`).
    """
    if in_features_of(expected) != in_features_of(found):
        return f"its layer has {in_features_of(expected)} inputs, this one {in_features_of(found)}"
    if (trained_on := _format_of(expected)) != (loaded := _format_of(found)):
        return f"its base was {trained_on or 'not quantised'}, this one is {loaded or 'not quantised'}"
    if expected != found and "float16" not in (expected.partition(":")[2], found.partition(":")[2]):
        return f"the pretrained values of its columns differ (fingerprint {expected}, found {found})"
    return ""


def _format_of(recorded: str) -> str:
    """Return the format of a quantised weight, or nothing."""
    return ":".join(recorded.split(":")[1:-1])
