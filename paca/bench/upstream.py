"""The mechanism of PEFT 0.22's PaCA, written anew from its description, to be compared with; nothing else uses it.

Every product works on the frozen weight with the adapted columns put in just before and the pretrained ones put back
just after, in forward and again in backward; each layer gathers for itself and keeps both sets of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from paca.select import random_columns


class _SwapLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor, index: Tensor) -> Tensor:
        original = weight[:, index].clone()
        adapted = (original + delta).to(weight.dtype)
        ctx.save_for_backward(x[..., index], original, adapted, index)
        ctx.weight = weight
        weight.index_copy_(1, index, adapted)
        try:
            return F.linear(x, weight)
        finally:
            weight.index_copy_(1, index, original)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = grads
        xs, original, adapted, index = ctx.saved_tensors
        ctx.weight.index_copy_(1, index, adapted)
        try:
            gx = gy @ ctx.weight
        finally:
            ctx.weight.index_copy_(1, index, original)
        gdelta = gy.reshape(-1, gy.shape[-1]).t() @ xs.reshape(-1, xs.shape[-1])
        return gx, None, gdelta.float(), None


class UpstreamLinear(nn.Module):
    """A frozen linear layer without bias whose columns are swapped in for each product.

    Args:
        base: the layer; its weight is used in place.
        index: the columns that train, (r,) int64.
    """

    index: Tensor

    def __init__(self, base: nn.Linear, index: Tensor) -> None:
        super().__init__()
        self.base_layer = base
        self.register_buffer("index", index.to(base.weight.device))
        self.delta = nn.Parameter(torch.zeros(base.out_features, len(index), device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, (…, in)."""
        y: Tensor = _SwapLinear.apply(x, self.base_layer.weight.detach(), self.delta, self.index)  # type: ignore[no-untyped-call]
        return y


def adapt(model: nn.Module, r: int) -> nn.Module:
    """Give every linear layer of a frozen stack `r` trained columns, in place; returns the stack."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        index = random_columns(linear.in_features, r, 0, name)
        setattr(model.get_submodule(parent), leaf, UpstreamLinear(linear, index))
    return model
