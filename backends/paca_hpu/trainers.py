"""Which Trainer a Gaudi gets, and what it is told."""

from __future__ import annotations

from typing import Any

from paca.backend import GraphMode


def defaults(mode: GraphMode) -> dict[str, Any]:
    """TrainingArguments for a run in a graph mode; those that the Trainer does not know are left out by the caller."""
    arguments: dict[str, Any] = {"logging_nan_inf_filter": False}  # it would read the loss back after every backward
    if mode is GraphMode.COMPILE:
        arguments |= {"torch_compile": True, "torch_compile_backend": "hpu_backend"}
    return arguments


def classes(mode: GraphMode) -> tuple[type[Any], type[Any]]:
    """The Trainer and TrainingArguments classes."""
    from transformers import Trainer, TrainingArguments

    return Trainer, TrainingArguments
