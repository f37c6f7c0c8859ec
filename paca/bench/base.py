"""The format of the measured model's frozen linear weights: as they are, or quantised by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

BASES = ("none", "nf4", "int8")
# Methods whose adapters PEFT and paca put beside quantised weights; the others train or write the weights themselves.
FAMILIES = ("floor", "paca", "paca-unshared", "lora", "lora-match", "lora-nocast", "lora-match-nocast", "dora")


def check(base: str) -> None:
    """Refuse a format whose package is missing.

    Raises:
        ValueError: naming the option.
    """
    if base != "none" and find_spec("bitsandbytes") is None:
        raise ValueError(f"--base {base} needs the package bitsandbytes: pip install 'paca-torch[quant]'")


def quantise(layer: nn.Module, base: str, dtype: torch.dtype) -> nn.Module:
    """Exchange the linear layers in a module, and return it.

    Args:
        layer: a decoder layer where it will run; used up.
        base: one of `BASES`. "nf4" is QLoRA's: NF4 with double quantisation; "int8" is LLM.int8.
        dtype: in which products are made.
    """
    if base != "none":
        for name, linear in [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]:
            layer.set_submodule(name, _MAKE[base](linear, dtype))
    return layer


def _nf4(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    bnb: Any = import_module("bitsandbytes.nn")
    made = bnb.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta")
    made.weight = bnb.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    )
    quantised: nn.Module = made.to(linear.weight.device)
    return quantised


def _int8(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    bnb: Any = import_module("bitsandbytes.nn")
    made = bnb.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    # from the CPU: elsewhere bitsandbytes does not quantise what is there already
    made.weight = bnb.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    quantised: nn.Module = made.to(linear.weight.device)
    return quantised


_MAKE: dict[str, Callable[[nn.Linear, torch.dtype], nn.Module]] = {"nf4": _nf4, "int8": _int8}
