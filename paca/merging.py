"""Writes the base model with an adapter in its weights, as an ordinary transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paca.model import model_dtype
from paca.quantised import dequantise_
from paca.whole import new_folder


def merge(
    model: Any, tokenizer: Any, target: Path, max_shard_size: str | None = None, requantize: bool = False
) -> None:
    """Merge the active adapter and save model and tokenizer; the folder appears when it is whole.

    A quantised model is dequantised, all of it, so that the trained columns stay as they are.

    Args:
        model: a PEFT model; it is taken apart.
        tokenizer: saved with it.
        target: a folder that is empty or does not exist.
        max_shard_size: size of a file, such as "2GB"; transformers' own choice by default.
        requantize: quantise a quantised model's merged weights again; how far that moves them is warned about.

    Raises:
        ValueError: if a merged weight is not finite, or there is nothing to quantise again.
    """
    merged = _requantised(model) if requantize else model.merge_and_unload(safe_merge=True)
    if not requantize and getattr(merged, "is_quantized", False):  # layers that had no adapter
        dequantise_(merged, model_dtype(merged))
    with new_folder(target) as unfinished:
        merged.save_pretrained(unfinished, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
        tokenizer.save_pretrained(unfinished)


def _requantised(model: Any) -> Any:
    from paca.requantise import merge_requantised

    merged, _ = merge_requantised(model)
    return merged
