"""Backends that compute on the CPU with one defect each, of the kinds that devices and their kernels really have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from paca import registry, strategies
from paca.backend import Capabilities, GraphMode, Ops
from paca.strategies import ColumnSwitch, ColumnWrite

CPU = registry._load("cpu")


class Planted(CPU):
    """A CPU with the operations that a subclass gives it."""

    name = "planted"
    ops_in_use = Ops()

    def __init_subclass__(cls) -> None:
        cls.default_ops = cls.ops_in_use
        cls.choices = {"all": {"planted": {field.name: getattr(cls.ops_in_use, field.name) for field in fields(Ops)}}}

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, graph_modes=(GraphMode.EAGER,))


def forward_in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum four parts of the contraction in bfloat16, as a split-K kernel with narrow partial sums does."""
    total = torch.zeros(*x.shape[:-1], len(weight), dtype=torch.bfloat16)
    for xs, ws in zip(x.chunk(4, dim=-1), weight.chunk(4, dim=-1), strict=True):
        total = total + F.linear(xs, ws).bfloat16()
    return (total if bias is None else total + bias).to(x.dtype)


def grad_columns_in_bfloat16(gy: Tensor, xs: Tensor, scale: float) -> Tensor:
    """The same for the gradient of the columns."""
    gy, xs = gy.reshape(-1, gy.shape[-1]), xs.reshape(-1, xs.shape[-1])
    parts = [a.t().float() @ b.float() for a, b in zip(gy.split(4), xs.split(4), strict=True)]
    total = parts[0].bfloat16()
    for part in parts[1:]:
        total = total + part.bfloat16()
    return total.float() * scale


def tf32(x: Tensor) -> Tensor:
    """Round float32 to 11 significant bits; narrower dtypes pass as they are."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def forward_tf32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(tf32(x), tf32(weight), bias)


def grad_input_tf32(gy: Tensor, weight: Tensor) -> Tensor:
    return tf32(gy) @ tf32(weight)


def gather_in_another_order(x: Tensor, index: Tensor) -> Tensor:
    """Pick the right channels, but not in the order of `index`."""
    return x.index_select(-1, index.flip(0))


def write_scaled_twice(writes: Sequence[ColumnWrite]) -> None:
    strategies.write_index_copy([replace(write, scale=write.scale**2) for write in writes])


def write_only_once(writes: Sequence[ColumnWrite]) -> None:
    """Write pretrained columns, but leave those alone that were written before."""
    strategies.write_index_copy(
        [write for write in writes if torch.equal(write.weight.index_select(1, write.index), write.base)]
    )


def grad_columns_narrow(gy: Tensor, xs: Tensor, scale: float) -> Tensor:
    """Return the gradient in the dtype of what was multiplied."""
    return strategies.grad_columns_matmul(gy, xs, scale).to(gy.dtype)


def chopped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a narrower dtype towards zero, as a wrong rounding mode does."""
    narrow = x.to(dtype)
    beyond = narrow.abs().double() > x.abs().double()
    return torch.where(beyond, torch.nextafter(narrow, torch.zeros_like(narrow)), narrow)


def forward_chopped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return chopped(F.linear(x.double(), weight.double(), None if bias is None else bias.double()), x.dtype)


def grad_input_chopped(gy: Tensor, weight: Tensor) -> Tensor:
    return chopped(gy.double() @ weight.double(), gy.dtype)


def write_update_rounded_first(writes: Sequence[ColumnWrite]) -> None:
    """Round the update to the weight's dtype before it is added: half of small updates are lost."""
    strategies.write_index_copy(
        [replace(write, delta=(write.delta * write.scale).to(write.base.dtype), scale=1.0) for write in writes]
    )


def grad_columns_of_first_block(gy: Tensor, xs: Tensor, scale: float) -> Tensor:
    """Leave out the tokens after the first block, as a loop with a wrong end does."""
    gy, xs = gy.reshape(-1, gy.shape[-1]), xs.reshape(-1, xs.shape[-1])
    some = strategies.TOKENS_PER_BLOCK
    return strategies.grad_columns_matmul(gy[:some], xs[:some], scale)


def grad_input_of_first_reader(gys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Leave out the layers after the first that read the same input."""
    return gys[0] @ weights[0]


def switch_without_restoring(switches: Sequence[ColumnSwitch]) -> None:
    """Write the new columns, but restore the old ones only if none of them is new."""
    strategies.switch_scatter([switch if switch.apart else replace(switch, old=None) for switch in switches])


def no_gather(x: Tensor, index: Tensor) -> Tensor:
    raise NotImplementedError("this device has no gather")


class SumsInBfloat16(Planted):
    ops_in_use = Ops(forward=forward_in_bfloat16, grad_columns=grad_columns_in_bfloat16)


class TF32(Planted):
    ops_in_use = Ops(forward=forward_tf32, grad_input=grad_input_tf32)


class UnsortedIndex(Planted):
    ops_in_use = Ops(gather=gather_in_another_order)


class ScaledTwice(Planted):
    ops_in_use = Ops(write_columns=write_scaled_twice)


class StaleColumns(Planted):
    ops_in_use = Ops(write_columns=write_only_once)


class NarrowGradient(Planted):
    ops_in_use = Ops(grad_columns=grad_columns_narrow)


class ChoppedCasts(Planted):
    ops_in_use = Ops(forward=forward_chopped, grad_input=grad_input_chopped)


class UpdateRoundedFirst(Planted):
    ops_in_use = Ops(write_columns=write_update_rounded_first)


class FirstBlockOnly(Planted):
    ops_in_use = Ops(grad_columns=grad_columns_of_first_block)


class FirstReaderOnly(Planted):
    ops_in_use = Ops(grad_input_sum=grad_input_of_first_reader)


class OldColumnsLeft(Planted):
    ops_in_use = Ops(switch_columns=switch_without_restoring)


class Raising(Planted):
    ops_in_use = Ops(gather=no_gather)
