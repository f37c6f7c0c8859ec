"""Linear layers that take memory as real ones do, for a run on shapes alone.

Real layers of frozen formats need their packages, and a real PaCA layer reads values (addresses, column numbers), which
shapes do not have. What these make, keep and free is what the real ones make, keep and free.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from paca.backend import Ops
from paca.columns import version_of
from paca.estimate.meter import Meter
from paca.linear import PacaLinear
from paca.strategies import adapted_columns

_Gathered = tuple[int | None, dict[tuple[str, torch.dtype], Tensor]]  # when, and what by columns and dtype

_BLOCK, _NESTED_BLOCK = 64, 256  # weights a scale, scales a scale of scales: bitsandbytes' defaults


def quantised_bytes(weight_format: str, rows: int, columns: int) -> tuple[int, int]:
    """Return the bytes of a quantised weight's codes and of the scales beside them.

    "nf4" is bitsandbytes' with double quantisation (arXiv 2305.14314, section 3): a byte for each scale, a float32 for
    each 256 of these, and two tables. "int8" has a float32 a row, as LLM.int8; "fp8" too, as torchao's weight-only.
    """
    if weight_format != "nf4":
        return rows * columns, 4 * rows
    scales = -(-rows * columns // _BLOCK)
    return -(-rows * columns // 2), scales + 4 * -(-scales // _NESTED_BLOCK) + 4 * (16 + 256 + 1)


class QuantisedLinear(nn.Linear):
    """A frozen linear whose weight is kept in few bits and dequantised for each GEMM.

    Args:
        like: the layer whose place it takes.
        weight_format: "nf4", "int8" or "fp8".
    """

    def __init__(self, like: nn.Linear, weight_format: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        codes, scales = quantised_bytes(weight_format, like.out_features, like.in_features)
        self.weight = nn.Parameter(torch.empty(codes, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.weight_format = weight_format
        self.meter: Meter | None = None  # told what is dequantised

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight dequantised, (out, in); its scales are dequantised on the way.

        Args:
            dtype: of the result.
            out: memory for it, of at least its size.
        """
        size = self.out_features * self.in_features
        scales = torch.empty(size // _BLOCK if self.weight_format == "nf4" else self.out_features)
        weight = out[:size] if out is not None else torch.empty(size, dtype=dtype)
        if self.meter is not None:
            self.meter.record(scales, "dequantised")
            self.meter.record(weight, "dequantised")
        return weight.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, (…, in)."""
        return cast(Tensor, _QuantisedMap.apply(x, self))  # type: ignore[no-untyped-call]


class _QuantisedMap(Function):
    """Dequantises in forward and again in backward; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        return gy @ ctx.layer.dense(gy.dtype), None


class PacaStandIn(nn.Module):
    """A linear with `r` trained columns.

    Args:
        base_layer: a dense or quantised linear.
        r: trained columns.
        drawn_as: layers of one name that read the same input have the same columns, and share one gather.
        dtype: of the kept columns, that of the GEMM.
        swap: whether the columns are put in around each GEMM instead of living in the weight.
        workspace: memory that all quantised layers dequantise into; its size is that of the largest.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        drawn_as: str,
        dtype: torch.dtype,
        swap: bool,
        workspace: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base_layer, self.drawn_as, self.swap = base_layer, drawn_as, swap
        out = base_layer.nf if isinstance(base_layer, Conv1D) else cast(nn.Linear, base_layer).out_features
        self.paca_delta = nn.Parameter(torch.empty(out, r, dtype=torch.promote_types(dtype, torch.float32)))
        self.register_buffer("paca_indices", torch.zeros(r, dtype=torch.int64))
        if not isinstance(base_layer, QuantisedLinear):  # a quantised weight is never written
            self.register_buffer("base_columns", torch.empty(out, r, dtype=dtype))
        self.register_buffer("workspace", workspace)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, (…, in)."""
        layer: Any = self.base_layer
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        index = cast(Tensor, self.paca_indices)
        xs = self._gathered(x, index, dtype)
        if isinstance(layer, QuantisedLinear):
            return cast(Tensor, _OverlaidMap.apply(x.to(dtype), xs, self.paca_delta, index, self))  # type: ignore[no-untyped-call]
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        base = self.base_columns if self.swap else None
        arguments = (x.to(dtype), xs, weight, layer.bias, self.paca_delta, index, 1.0, base, None, plain_ops())
        return cast(Tensor, PacaLinear.apply(*arguments))  # type: ignore[no-untyped-call]

    def overlaid(self, index: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantised weight with its trained columns, (out, in)."""
        weight = cast(QuantisedLinear, self.base_layer).dense(dtype, cast(Tensor, self.workspace))
        return weight.index_copy_(1, index, adapted_columns(weight.index_select(1, index), delta, 1.0))

    def _gathered(self, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The input's channels, shared as `PacaLayer` shares them."""
        shared: Any = x
        version, kept = cast(_Gathered, getattr(shared, "_paca_gathered", (None, {})))
        if version != version_of(x):
            kept = {}
            shared._paca_gathered = version_of(x), kept
        key = self.drawn_as, dtype
        if key not in kept:
            kept[key] = plain_ops().gather(x.detach(), index).to(dtype)
        return kept[key]


class _OverlaidMap(Function):
    """Puts the trained columns into the dequantised weight, in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, xs: Tensor, delta: Tensor, index: Tensor, layer: PacaStandIn) -> Tensor:
        ctx.save_for_backward(xs, delta, index)
        ctx.layer = layer
        return F.linear(x, layer.overlaid(index, delta, x.dtype), cast(nn.Linear, layer.base_layer).bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        xs, delta, index = ctx.saved_tensors
        gx = gy @ ctx.layer.overlaid(index, delta, gy.dtype)
        return gx, None, plain_ops().grad_columns(gy, xs, 1.0), None, None


@cache
def plain_ops() -> Ops:
    """Torch's own operations, which run on shapes alone; a device's kernels may not."""
    return Ops()


@cache
def qlora_layer() -> type[nn.Module]:
    """PEFT's LoRA over a quantised linear; a function, because importing PEFT takes seconds."""
    from peft.tuners.lora import Linear

    class QLoraLinear(Linear):
        """LoRA with the forward of PEFT's own layer for bitsandbytes' 4-bit weights (peft.tuners.lora.bnb).

        It differs from that for dense weights in the dtypes of the sum.
        """

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = self.base_layer(x)
            for name in self.active_adapters:
                down: Any = self.lora_A[name]
                update = self.lora_B[name](down(self.lora_dropout[name](x.to(down.weight.dtype)))) * self.scaling[name]
                result = result + update.to(result.dtype)
            return result

    return QLoraLinear
