"""PaCA's linear map and its gradients (arXiv 2503.01905, section 3).

    Y  = X W'ᵀ + b               W' = W0 + s·Δ·Sᵀ, S picks the trained columns
    dX = dY W'
    dΔ = s · dYᵀ X[..., index]   the only use of X: nothing else of it is kept
    db = Σ dY                    if the bias trains

The value of Δ is not needed here: the weight that is passed in holds it already (*resident*), or is made to hold it
around each GEMM (*swap*).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from paca.backend import Ops
from paca.errors import StaleColumnsError
from paca.keeping import keep, kept
from paca.strategies import ColumnWrite, adapted_columns


class Held:
    """What a resident weight holds now, as an opaque key; None for the pretrained values.

    It is `settled` from an optimizer step that has written it until a gradient asks for another one.

    The weight is saved for backward by reference and is written in place, so a backward compares the key with that of
    its forward. Autograd's own version count would refuse a weight that was restored and written again with the same
    values in between, as a reference model does.
    """

    __slots__ = ("key", "settled")

    def __init__(self) -> None:
        self.key: object = None
        self.settled = False


CHANGED = (
    "the adapted columns changed between forward and backward (by an optimizer step, a switch of adapters or a load); "
    "run backward before changing them, or repeat the forward"
)
_backwards = 0


def backwards() -> int:
    """Count the backward passes of eager layers so far.

    Between two of them an activation's channels may be remembered.
    """
    return _backwards


class PacaLinear(Function):
    """`PacaLinear.apply(x, xs, weight, bias, delta, index, scale, base, held, ops)` returns y, (…, out).

    Args of `apply`:
        x: (…, in); xs: x[..., index], (…, r), or None if no delta trains; both in the dtype of the GEMM.
        weight: (out, in), frozen.
        bias: (out,) or None.
        delta: (out, r), float32; takes the gradient.
        index: (r,) int64. scale: s.
        base: None if the weight holds the adapted columns; else its pretrained columns (out, r), and they are swapped
            in.
        held: the weight's `Held`, None under torch.compile and when swapping.
        ops: the backend's operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xs: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        index: Tensor,
        scale: float,
        base: Tensor | None,
        held: Held | None,
        ops: Ops,
    ) -> Tensor:
        """Compute Y and keep what the gradients need."""
        ctx.scale, ctx.ops, ctx.held = scale, ops, held
        if held is None:
            keep(ctx, xs, weight, *(() if base is None else (delta, index, base)))
        else:
            keep(ctx, xs)
            ctx.weight, ctx.key = weight, held.key
        with columns_in(weight, index, base, delta, scale, ops) as adapted:
            return ops.forward(x, adapted, bias)  # under autocast the GEMM casts the weight by itself

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute dX, db and dΔ, each only if asked for."""
        global _backwards
        if not torch.compiler.is_compiling():
            _backwards += 1
        xs, *rest = kept(ctx)
        weight = ctx.weight if ctx.held is not None else rest[0]
        delta, index, base = rest[1:] if len(rest) > 1 else (None, None, None)
        gx = gbias = gdelta = None
        if ctx.needs_input_grad[0]:
            if ctx.held is not None and ctx.held.key != ctx.key:
                raise StaleColumnsError(CHANGED)
            with columns_in(weight, index, base, delta, ctx.scale, ctx.ops) as adapted:
                gx = ctx.ops.grad_input(gy, adapted.to(gy.dtype))
        if ctx.needs_input_grad[3]:
            gbias = grad_bias(gy)
        if ctx.needs_input_grad[4]:
            gdelta = ctx.ops.grad_columns(gy, xs, ctx.scale)
            if ctx.held is not None:
                ctx.held.settled = False
        return gx, None, None, gbias, gdelta, None, None, None, None, None


class Reader(NamedTuple):
    """One of several layers that read the same input."""

    weight: Tensor  # (out, in), resident
    held: Held
    scale: float
    first: int  # its channels among those gathered for all
    last: int


class PacaLinears(Function):
    """`PacaLinears.apply(x, xs, readers, ops, bias, delta, bias, delta, …)` returns a y, (…, out), for each reader.

    The same as one `PacaLinear` for each, except that their dX are summed by `ops.grad_input_sum`.

    Args of `apply`:
        x: (…, in); xs: the channels of x that any of them trains, (…, all r).
        readers: a `Reader` for each layer.
        ops: the backend's operations.
        bias, delta: (out,) or None, and (out, r), of each reader in turn.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, xs: Tensor, readers: Sequence[Reader], ops: Ops, *tensors: Any) -> Any:
        """Compute each Y and keep what the gradients need."""
        ctx.readers, ctx.ops = readers, ops
        ctx.keys = [reader.held.key for reader in readers]
        keep(ctx, xs)
        ctx.set_materialize_grads(False)
        return tuple(ops.forward(x, reader.weight, bias) for reader, bias in zip(readers, tensors[::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Any, ...]:
        """Compute dX, and db and dΔ of each, only if asked for and of the outputs that were used."""
        global _backwards
        _backwards += 1
        (xs,) = kept(ctx)
        gx = None
        used = [(gy, reader, key) for gy, reader, key in zip(gys, ctx.readers, ctx.keys, strict=True) if gy is not None]
        if ctx.needs_input_grad[0] and used:
            if any(reader.held.key != key for _, reader, key in used):
                raise StaleColumnsError(CHANGED)
            gx = ctx.ops.grad_input_sum(
                [gy for gy, _, _ in used], [reader.weight.to(gy.dtype) for gy, reader, _ in used]
            )
        grads: list[Tensor | None] = []
        for number, (gy, reader) in enumerate(zip(gys, ctx.readers, strict=True)):
            wants_bias, wants_delta = ctx.needs_input_grad[4 + 2 * number : 6 + 2 * number]
            grads.append(grad_bias(gy) if wants_bias and gy is not None else None)
            columns = xs[..., reader.first : reader.last]
            grads.append(ctx.ops.grad_columns(gy, columns, reader.scale) if wants_delta and gy is not None else None)
            reader.held.settled = reader.held.settled and not wants_delta
        return gx, None, None, None, *grads


def grad_bias(gy: Tensor) -> Tensor:
    """Return Σ dY over tokens, (out,); zeros for an empty batch."""
    return gy.reshape(-1, gy.shape[-1]).sum(0) if gy.numel() else gy.new_zeros(gy.shape[-1])


def columns_in(
    weight: Tensor, index: Tensor | None, base: Tensor | None, delta: Tensor | None, scale: float, ops: Ops
) -> AbstractContextManager[Tensor]:
    """Give the weight with its adapted columns.

    Where `base` is given they are put in for the block and taken out after it.
    """
    if base is None or index is None or delta is None:
        return nullcontext(weight)
    return _swapped_in(weight, index, base, delta, scale, ops)


@contextmanager
def _swapped_in(weight: Tensor, index: Tensor, base: Tensor, delta: Tensor, scale: float, ops: Ops) -> Iterator[Tensor]:
    if torch.compiler.is_compiling():  # a graph may not write to its inputs and back: it gets an adapted copy
        yield weight.index_copy(1, index, adapted_columns(base, delta, scale))
        return
    # `.data` has a version count of its own: other layers that saved a tied weight for backward see it unchanged, as it
    # is by then.
    plain = weight.data
    before = plain.index_select(1, index)
    ops.write_columns([ColumnWrite(plain, index, base, delta.detach(), scale)])
    try:
        yield weight
    finally:
        plain.index_copy_(1, index, before)
