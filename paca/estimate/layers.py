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
from paca.masked import Layout, MaskedProduct
from paca.quantised import QuantisedLinear
from paca.strategies import Form, adapted_columns

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


class FrozenLinear(nn.Linear):
    """A frozen linear whose weight is kept in few bits and dequantised for each GEMM.

    It is also what `paca.quantised.QuantisedLinear` asks of a quantised weight.

    Args:
        like: the layer whose place it takes.
        weight_format: "nf4", "int8" or "fp8".
        dtype: of the GEMM.
    """

    def __init__(self, like: nn.Linear, weight_format: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        codes, scales = quantised_bytes(weight_format, like.out_features, like.in_features)
        self.weight = nn.Parameter(torch.empty(codes, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.weight_format, self.dtype, self.ops = weight_format, dtype, plain_ops()
        self.meter: Meter | None = None  # told what is dequantised

    @property
    def layer(self) -> FrozenLinear:
        """What the library's own kernel is called through."""
        return self

    def form(self, x: Tensor) -> Form:
        """How trained columns are applied to `x`, (…, in), in training and by default."""
        return self.ops.quantised_form(self.weight_format == "nf4", True, x.shape[:-1].numel())

    def gemm_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the GEMM; bitsandbytes' 4-bit layers do not follow autocast."""
        return self.dtype if self.weight_format == "nf4" else _gemm_dtype(x)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight as a matrix, (out, in); its scales are dequantised on the way."""
        size = self.out_features * self.in_features
        scales = torch.empty(size // _BLOCK if self.weight_format == "nf4" else self.out_features)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)
        if self.meter is not None:
            self.meter.record(scales, "dequantised")
            self.meter.record(weight, "dequantised")
        return weight

    def overlaid(self, index: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """The dequantised weight with its trained columns, (out, in)."""
        weight = self.dequantised(dtype)
        return weight.index_copy_(1, index, adapted_columns(weight.index_select(1, index), delta, scale))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, (…, in)."""
        y: Tensor = _FrozenMap.apply(x.to(self.gemm_dtype(x)), self)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)


class _FrozenMap(Function):
    """Dequantises in forward and again in backward; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, layer.dequantised(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        return gy @ ctx.layer.dequantised(gy.dtype), None


class PacaStandIn(nn.Module):
    """A linear with `r` trained columns.

    Args:
        base_layer: a dense or quantised linear.
        r: trained columns.
        drawn_as: layers of one name that read the same input have the same columns, and share one gather.
        dtype: of the kept columns, that of the GEMM.
        swap: whether the columns are put in around each GEMM instead of living in the weight.
        float8_gemm: whether the frozen weight has copies in float8 for its two products.
    """

    def __init__(
        self, base_layer: nn.Module, r: int, drawn_as: str, dtype: torch.dtype, swap: bool, float8_gemm: bool = False
    ) -> None:
        super().__init__()
        self.base_layer, self.drawn_as, self.swap = base_layer, drawn_as, swap
        out = base_layer.nf if isinstance(base_layer, Conv1D) else cast(nn.Linear, base_layer).out_features
        self.paca_delta = nn.Parameter(torch.empty(out, r, dtype=torch.promote_types(dtype, torch.float32)))
        self.register_buffer("paca_indices", torch.zeros(r, dtype=torch.int64))
        if not isinstance(base_layer, FrozenLinear):  # a quantised weight is never written
            self.register_buffer("base_columns", torch.empty(out, r, dtype=dtype))
            size, sides = cast(Tensor, base_layer.weight).numel(), sum(cast(Tensor, base_layer.weight).shape)
            if float8_gemm and not swap:
                self.register_buffer("copies", torch.empty(2 * size + 4 * sides, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, (…, in)."""
        layer: Any = self.base_layer
        index, delta = cast(Tensor, self.paca_indices), self.paca_delta
        if isinstance(layer, FrozenLinear):
            cast_x = x.to(layer.gemm_dtype(x))
            xs = self._gathered(x, cast_x, index)
            form = layer.form(x)
            given = x if form is Form.SPLIT else cast_x
            y: Tensor = QuantisedLinear.apply(given, xs, layer.bias, delta, index, 1.0, layer, form)  # type: ignore[no-untyped-call]
            return y.to(x.dtype) if layer.weight_format == "nf4" else y
        cast_x = x.to(_gemm_dtype(x))
        xs = self._gathered(x, cast_x, index)
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        base = self.base_columns if self.swap else None
        arguments = (cast_x, xs, weight, layer.bias, delta, index, 1.0, base, None, plain_ops())
        return cast(Tensor, PacaLinear.apply(*arguments))  # type: ignore[no-untyped-call]

    def _gathered(self, x: Tensor, cast_x: Tensor, index: Tensor) -> Tensor:
        """The input's channels, shared as `PacaLayer` shares them."""
        shared: Any = x
        version, kept = cast(_Gathered, getattr(shared, "_paca_gathered", (None, {})))
        if version != version_of(x):
            kept = {}
            shared._paca_gathered = version_of(x), kept
        key = self.drawn_as, cast_x.dtype
        if key not in kept:
            kept[key] = plain_ops().gather(cast_x.detach(), index)
        return kept[key]


class MaskStandIn(nn.Module):
    """A linear with trained entries, as many as `r` columns have.

    Args:
        base_layer: a dense linear.
        r: trained columns in number of entries.
        dtype: of the GEMM.
        swap: whether the entries are put in around each GEMM instead of living in the weight.
    """

    def __init__(self, base_layer: nn.Module, r: int, dtype: torch.dtype, swap: bool) -> None:
        super().__init__()
        self.base_layer, self.swap = base_layer, swap
        out = base_layer.nf if isinstance(base_layer, Conv1D) else cast(nn.Linear, base_layer).out_features
        self.paca_delta = nn.Parameter(torch.empty(1, r * out, dtype=torch.promote_types(dtype, torch.float32)))
        self.register_buffer("paca_indices", torch.zeros(2, r * out, dtype=torch.int64))  # the adapter's, the weight's
        self.register_buffer("base_columns", torch.empty(1, r * out, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, (…, in)."""
        layer: Any = self.base_layer
        rows, width = layer.weight.shape
        index = cast(Tensor, self.paca_indices)[0]
        base = self.base_columns if self.swap else None
        layout = Layout((rows, width), isinstance(layer, Conv1D))
        row = layer.weight.view(1, -1)
        arguments = (
            x.to(_gemm_dtype(x)),
            row,
            layer.bias,
            self.paca_delta,
            index,
            1.0,
            base,
            None,
            plain_ops(),
            layout,
        )
        return cast(Tensor, MaskedProduct.apply(*arguments))  # type: ignore[no-untyped-call]


def _gemm_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would run a linear layer on `x`."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


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
