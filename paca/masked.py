"""Layers whose single entries train in place: unstructured masks (SHiRA, arXiv 2406.13175).

A weight laid out as one row, (1, out·in), has its entries for columns. So a mask is a choice of columns of that row;
writing, checking, undoing, uniting and saving them is what `paca.columns` does. Other than there is the gradient:

    dΔ = s · (dYᵀ X)[mask]      all of X is kept, and dW is formed, for one layer at a time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from paca.backend import Ops
from paca.columns import AdaptedWeight, Adapter, is_sharded
from paca.entries import best_entries, random_entries
from paca.errors import StaleColumnsError
from paca.keeping import keep, kept
from paca.layer import PacaLayer
from paca.linear import CHANGED, Held, columns_in, grad_bias
from paca.strategies import write_scatter


class Layout(NamedTuple):
    """How a weight that is laid out as one row is read."""

    shape: tuple[int, int]  # of the weight in its layer
    transposed: bool  # whether that is (in, out), as Conv1D's

    def matrix(self, row: Tensor) -> Tensor:
        """The row, (1, n), as (out, in); a view."""
        weight = row.view(self.shape)
        return weight.t() if self.transposed else weight

    def entries(self, matrix: Tensor, index: Tensor) -> Tensor:
        """Some entries of a matrix (out, in), as a row (1, k)."""
        own = matrix.t() if self.transposed else matrix
        return own[index // self.shape[1], index % self.shape[1]].unsqueeze(0)


class MaskedProduct(Function):
    """`MaskedProduct.apply(x, row, bias, delta, index, scale, base, held, ops, layout)` returns y, (…, out).

    Args of `apply`: those of `PacaLinear`, but for the weight, which is a `row` (1, out·in) with its `layout`, and for
    delta (1, k), index (k,) and base (1, k), which are of the row's entries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        index: Tensor,
        scale: float,
        base: Tensor | None,
        held: Held | None,
        ops: Ops,
        layout: Layout,
    ) -> Tensor:
        """Compute Y and keep what the gradients need."""
        ctx.scale, ctx.held, ctx.ops, ctx.layout = scale, held, ops, layout
        needed = x if ctx.needs_input_grad[3] else None
        if held is None:
            keep(ctx, needed, index, row, *(() if base is None else (delta, base)))
        else:
            keep(ctx, needed, index)
            ctx.row, ctx.key = row, held.key
        with columns_in(row, index, base, delta, scale, ops) as adapted:
            return ops.forward(x, layout.matrix(adapted), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute dX, db and dΔ, each only if asked for."""
        x, index, *rest = kept(ctx)
        row = ctx.row if ctx.held is not None else rest[0]
        delta, base = rest[1:] if len(rest) > 1 else (None, None)
        gx = gbias = gdelta = None
        if ctx.needs_input_grad[0]:
            if ctx.held is not None and ctx.held.key != ctx.key:
                raise StaleColumnsError(CHANGED)
            with columns_in(row, index, base, delta, ctx.scale, ctx.ops) as adapted:
                gx = ctx.ops.grad_input(gy, ctx.layout.matrix(adapted).to(gy.dtype))
        if ctx.needs_input_grad[2]:
            gbias = grad_bias(gy)
        if ctx.needs_input_grad[3]:  # all columns of the weight, of which the mask's entries are taken
            gdelta = ctx.layout.entries(ctx.ops.grad_columns(gy, x, ctx.scale), index)
            if ctx.held is not None:
                ctx.held.settled = False
        return gx, None, gbias, gdelta, None, None, None, None, None, None


class MaskedWeight(AdaptedWeight):
    """A frozen weight and the adapters' entries in it, which are columns of the weight as one row."""

    def __init__(self, layer: nn.Module, name: str, ops: Ops, residency: str) -> None:
        if ops.copy_frozen is not None:
            raise ValueError(
                f"{name}: the chosen gemm multiplies with a copy of the columns that do not train, and a mask leaves "
                "hardly any column alone; choose another gemm, or columns"
            )
        # Kernels that write columns are made for few of them, and many rows.
        super().__init__(layer, name, replace(ops, write_columns=write_scatter), residency)
        if not self.parameter.is_contiguous():
            raise ValueError(f"{name}: a mask needs a weight that is contiguous in memory; .contiguous() makes a copy")
        rows, width = self.parameter.shape
        self.layout = Layout((rows, width), transposed=isinstance(layer, Conv1D))

    @property
    def matrix(self) -> Tensor:
        """The weight as one row, (1, out·in); a view."""
        return self.oriented(self.parameter)

    def oriented(self, weight: Tensor) -> Tensor:
        """Lay a tensor of the layer's own layout out as one row."""
        return weight.view(1, -1)

    def shaped(self, matrix: Tensor) -> Tensor:
        """The row as (out, in)."""
        return self.layout.matrix(matrix)

    def pretrained_row(self) -> Tensor:
        """Return the pretrained weight as one row; a copy if it holds adapted entries now."""
        return super().pretrained()

    def pretrained(self) -> Tensor:
        """Return the pretrained weight, (out, in); a copy if it holds adapted entries now."""
        return self.shaped(self.pretrained_row())

    def _clean_shard(self) -> None:
        """See whether a weight that was sharded holds anything to be undone, which is possible once it is gathered."""
        if not is_sharded(self.parameter):
            super()._clean_shard()


class MaskedLinear(PacaLayer):
    """`base_layer` with trained entries: the weight, as one row, is `W0[index] + s·Δ` at each mask's `index`."""

    weight_class: ClassVar[type[AdaptedWeight]] = MaskedWeight

    @property
    def grid(self) -> tuple[int, int]:
        """One row, whose columns are the weight's entries."""
        return 1, self.out_features * self.in_features

    def choose(self, selection: str, r: int, seed: int) -> Tensor:
        """Choose as many entries as r columns have, by seed or magnitude; (r·out,) int64 on the CPU.

        A weight without values yet gets random ones: the file that brings the values has the mask.
        """
        count = r * self.out_features
        if selection == "mask_magnitude" and not self.adapted.parameter.is_meta:
            assert isinstance(self.adapted, MaskedWeight)
            return best_entries(self.adapted.pretrained_row().abs(), count)
        return random_entries(self.grid[1], count, seed, self.name)

    def _forward_trained(self, x: Tensor, cast_x: Tensor, adapters: Sequence[Adapter], trains: bool) -> Tensor:
        """Apply the layer with a gradient to come."""
        adapted, columns = self.adapted, self.adapted.columns
        assert isinstance(adapted, MaskedWeight)
        assert columns is not None
        resident = adapted.residency == "resident"
        delta, scale = columns.combined(adapters)
        y: Tensor = MaskedProduct.apply(  # type: ignore[no-untyped-call]
            cast_x,
            adapted.matrix,
            adapted.bias,
            delta,
            columns.index,
            scale,
            None if resident else columns.base,
            adapted.held if resident and not torch.compiler.is_compiling() else None,
            adapted.ops,
            adapted.layout,
        )
        return y

    def trains_resident(self, adapters: Sequence[Adapter], device: torch.device) -> bool:
        """Never together with layers that read the same input: what these share is a gather."""
        return False

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s·Δ in the weight's own layout, dense."""
        delta = self.paca_delta[adapter].detach()
        dense: Tensor = delta.new_zeros(self.adapted.parameter.shape)
        dense.view(1, -1).index_copy_(1, self.paca_indices[adapter], delta * self.scaling[adapter])
        return dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A mask has full rank, and LoRA has not."""
        return False
