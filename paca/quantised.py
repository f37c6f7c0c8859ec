"""Adapting a linear layer whose frozen weight is kept in fewer bits (QPaCA).

A quantised weight cannot hold trained columns, so nothing is ever written to it. Each product is made in one of two
forms, and a backend says which (`Ops.quantised_form`):

    overlay   W = dequantise(Q);  W[:, index] += s·Δ;  Y = X Wᵀ + b              one GEMM
    split     Y = library(X) + X[..., index]·(s·Δ)ᵀ                             the library's own kernel

The gradients are those of the weight with its trained columns in full precision: dX = dY W, with W dequantised once
more, and dΔ = s·dYᵀ X[..., index]. Only the r channels are kept in between. A format that its library cannot dequantise
takes the split form, and leaves its own part of dX to the library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2s
from itertools import chain
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from paca.backend import Ops
from paca.columns import AdaptedWeight, Adapter, ColumnSet
from paca.keeping import keep, kept
from paca.linear import grad_bias
from paca.strategies import Form, adapted_columns

# Of each stored tensor as many blocks of as many bytes, evenly spaced, go into the fingerprint of a quantised base.
SAMPLED_BLOCKS, BYTES_PER_BLOCK = 64, 64
# Rows of the identity that a weight is multiplied by at a time, where its library does not dequantise.
CHANNELS_AT_A_TIME = 1024


def library_of(layer: nn.Module) -> QuantizationBackend | None:
    """Return PEFT's access to the library that quantised a layer's weight, or None for an ordinary one."""
    if isinstance(layer, Conv1D):
        return None
    if type(layer).forward is nn.Linear.forward and type(layer.weight) in (nn.Parameter, Tensor):
        return None  # PEFT would import each quantisation library to find that out
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=_no_torchao_config)


def is_of_own_class(layer: nn.Module) -> bool:
    """Whether a layer is a quantised linear whose class is no kind of torch's, as those of HQQ and gptqmodel are."""
    return hasattr(layer, "in_features") and not isinstance(layer, nn.Linear) and library_of(layer) is not None


def _no_torchao_config() -> Any:
    raise NotImplementedError("torchao does not record how a weight was quantised, so it cannot be done again")


def base_weight(layer: nn.Module, library: QuantizationBackend) -> Tensor:
    """Return a quantised layer's weight as a matrix of its own, (out, in), in a dtype of the library's choice."""
    weight: Any = getattr(layer, "weight", None)
    if library.backend_name == "torchao" and type(weight).dequantize is Tensor.dequantize:
        return _by_products(weight)
    found: Tensor = library.get_base_weight(layer)
    return found


@torch.no_grad()
def _by_products(weight: Tensor) -> Tensor:
    """Return what multiplies, (out, in), of a type that can do nothing else, as torchao's packed int4 ones.

    Products with the rows of the identity: each is a sum with one non-zero term, so nothing is rounded.
    """
    rows, inputs = weight.shape
    dense = torch.empty(rows, inputs, dtype=weight.dtype, device=weight.device)
    for first in range(0, inputs, CHANNELS_AT_A_TIME):
        some = torch.arange(first, min(first + CHANNELS_AT_A_TIME, inputs), device=weight.device)
        dense[:, some] = F.linear(F.one_hot(some, inputs).to(weight.dtype), weight).t()
    return dense


class QuantisedWeight(AdaptedWeight):
    """A quantised weight and the adapters that train columns of it.

    Args:
        layer: the quantised linear layer.
        name: its path in the model, for messages.
        ops: the backend's operations.
        library: PEFT's access to the library that quantised it.
        dtype: what the weight counts as when it is dequantised for good: the dtype of the model around it.
    """

    def __init__(self, layer: nn.Module, name: str, ops: Ops, library: QuantizationBackend, dtype: torch.dtype) -> None:
        super().__init__(layer, name, ops, residency="quantised")
        self.library = library
        self._chosen: ColumnSet | None = None
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        self._dtype: torch.dtype = getattr(state, "dtype", dtype)

    # ------------------------------------------------------------------ what it is

    @property
    def parameter(self) -> Tensor:
        """One stored tensor, which tells the device."""
        stored = chain(self.layer.parameters(), self.layer.buffers())
        weight = getattr(self.layer, "weight", None)
        return weight if isinstance(weight, Tensor) else next(stored)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight dequantised for good."""
        return self._dtype

    @property
    def matrix(self) -> Tensor:
        """The dequantised weight, (out, in), a tensor of its own."""
        return self.dequantised(self.dtype)

    @property
    def chosen(self) -> ColumnSet | None:
        """Which columns train, once that is planned."""
        return self._chosen

    @property
    def format(self) -> str:
        """What the library calls it: nf4, fp4, int8, …."""
        state = getattr(self.parameter, "quant_state", None)
        if state is not None:
            return str(state.quant_type)
        if methods := getattr(self.layer, "SUPPORTS_METHODS", None):  # gptqmodel's; PEFT takes its AWQ layers for GPTQ
            return str(methods[0].value)
        return {"bnb 8bit": "int8", "torchao": type(self.parameter).__name__}.get(
            self.library.backend_name, self.library.backend_name
        )

    @property
    def can_dequantise(self) -> bool:
        """Whether the library gives the weight back as an ordinary matrix."""
        return bool(self.library.supports_merge)

    @property
    def is_bnb_4bit(self) -> bool:
        """Whether it is one of bitsandbytes' 4-bit layers, whose training forward dequantises and multiplies."""
        return self.library.backend_name == "bnb 4bit"

    def compute_dtype(self, x: Tensor, low: torch.dtype) -> torch.dtype:
        """The dtype in which the library multiplies: bitsandbytes' 4-bit layers do not follow autocast."""
        if not self.is_bnb_4bit:
            return low
        own: torch.dtype | None = self.layer.compute_dtype  # type: ignore[assignment]
        return own or x.dtype

    # ------------------------------------------------------------------ values

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a matrix of its own, (out, in)."""
        state = getattr(self.parameter, "quant_state", None)
        if state is None:
            return base_weight(self.layer, self.library).to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        self._unpack()
        state = copy.copy(self.parameter.quant_state)  # type: ignore[attr-defined]
        state.dtype = dtype  # at once: rounding to the recorded dtype first would not be what the library multiplies
        return dequantize_4bit(self.parameter.data, state)

    def _unpack(self) -> None:
        """Undo what bitsandbytes' eval forward does to a 4-bit weight, in place, on CPUs with AVX512-BF16."""
        if getattr(getattr(self.parameter, "quant_state", None), "packing_format_for_cpu", False):
            self.layer.state_dict()

    def overlaid(self, index: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """Return the dequantised weight with its trained columns, (out, in).

        The caller drops it after its product: the allocator gives the same memory to the next layer.
        """
        weight = self.dequantised(dtype)
        return weight.index_copy_(1, index, adapted_columns(weight.index_select(1, index), delta, scale))

    @property
    def inputs(self) -> int:
        """How many columns the weight has."""
        return int(self.layer.in_features)  # type: ignore[arg-type]

    def check_can_merge(self) -> None:
        """Refuse a format whose library cannot dequantise.

        Raises:
            TypeError: saying what can be done instead.
        """
        if not self.can_dequantise:
            raise TypeError(
                f"{self.name}: {self.format} weights cannot be dequantised, so nothing can be merged into them; keep "
                "the adapter beside the base, or export it with paca.convert_to_lora"
            )

    def dense(self, adapters: Sequence[Adapter]) -> nn.Linear:
        """Return an ordinary layer with the dequantised weight, and the adapters' columns in it exactly.

        Raises:
            TypeError: if the library cannot dequantise.
        """
        self.check_can_merge()
        columns = ColumnSet(adapters) if adapters else None
        weight = self.matrix
        if columns is not None:
            delta, scale = columns.combined(adapters)
            base = weight.index_select(1, columns.index)
            weight.index_copy_(1, columns.index, adapted_columns(base, delta.detach(), scale))
        bias: Tensor | None = getattr(self.layer, "bias", None)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=bias.requires_grad)
        return layer.train(self.layer.training)

    def fingerprint(self, index: Tensor) -> str:
        """Return `"<in>:<format>:<digest>"` of blocks spread over what is stored.

        Stored bytes are the same on every device; dequantised values need not be. A base that a device move corrupted,
        or that was quantised otherwise, differs.
        """
        self._unpack()
        digest = blake2s(digest_size=8)
        for stored in self._stored():
            raw = stored.detach().contiguous().flatten().view(torch.uint8)
            length = min(BYTES_PER_BLOCK, len(raw))
            starts = torch.linspace(0, len(raw) - length, SAMPLED_BLOCKS, dtype=torch.float64).long()
            sampled = (starts[:, None] + torch.arange(length)).flatten().to(raw.device)
            digest.update(raw[sampled].cpu().numpy().tobytes())
        return f"{self.inputs}:{self.format}:{digest.hexdigest()}"

    def _stored(self) -> Iterator[Tensor]:
        """Give the tensors that the weight is made of."""
        weight = self.parameter
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield weight.data
            yield state.absmax
            if state.nested:
                yield from (state.state2.absmax, state.state2.code, state.offset)
        elif self.format == "int8":
            own: Any = self.layer
            yield weight.data
            yield own.state.SCB if own.state.SCB is not None else own.weight.SCB
        elif self.format == "hqq":
            yield self.parameter
            meta: Any = self.layer.meta
            yield from (meta[name] for name in sorted(meta) if isinstance(meta[name], Tensor))
        elif hasattr(weight, "__tensor_flatten__"):
            for name in weight.__tensor_flatten__()[0]:
                yield getattr(weight, name)
        else:
            # Not the scales: AWQ's layers cast theirs to the dtype of the input.
            stored = chain(self.layer.parameters(), self.layer.buffers())
            yield from (tensor for tensor in stored if not tensor.is_floating_point())

    # ------------------------------------------------------------------ what AdaptedWeight does for written weights

    def plan(self, adapters: Sequence[Adapter]) -> None:
        """Note which columns train; nothing of the weight is kept."""
        if self._chosen is None or not self._chosen.covers(adapters, self.parameter):
            self._chosen = ColumnSet(adapters, self.ops.runs_to_slice)

    def check(self, adapters: Sequence[Adapter], rows: int | None = None, first: int = 0) -> None:
        """Nothing is held, so nothing can be stale."""

    def forget(self) -> None:
        """Plan anew."""
        super().forget()
        self._chosen = None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move of the model."""
        super().apply(fn)
        if self._chosen is not None:
            self._chosen.apply(fn)

    @torch.no_grad()
    def applied(self, x: Tensor, adapter: Adapter) -> Tensor:
        """Apply the layer with one adapter, in the split form."""
        y: Tensor = self.layer(x)
        xs = self.ops.gather(x, adapter.index)
        return y + (xs @ (adapter.delta * adapter.scale).to(xs.dtype).t()).to(y.dtype)

    # ------------------------------------------------------------------ forward

    def forward(
        self, x: Tensor, gather: Callable[[Tensor, Tensor], Tensor], adapters: Sequence[Adapter], low: torch.dtype
    ) -> Tensor:
        """Apply the layer, (…, in) to (…, out).

        Args:
            x: the input.
            gather: returns the trained channels of x in the dtype of its second argument, x as the GEMM takes it.
            adapters: those to apply.
            low: the dtype that autocast, or x, asks for.
        """
        columns = self.chosen
        assert columns is not None
        delta, scale = columns.combined(adapters)
        bias: Tensor | None = getattr(self.layer, "bias", None)
        cast_x = x.to(self.compute_dtype(x, low))
        trainable = delta.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
        trains = torch.is_grad_enabled() and trainable
        form = Form.SPLIT
        if self.can_dequantise:
            # Reentrant checkpointing runs the forward without gradients that it recomputes with them.
            recomputed = trainable and self.layer.training
            form = self.ops.quantised_form(self.is_bnb_4bit, trains or recomputed, x.shape[:-1].numel())
        xs = gather(x, cast_x) if (trains and delta.requires_grad) or form is Form.SPLIT else None
        y: Tensor
        if not self.can_dequantise:
            y = self.layer(x)
            if trains and x.requires_grad and not y.requires_grad:
                raise RuntimeError(
                    f"{self.name}: the kernel that this {self.format} layer has settled on gives no gradient, so "
                    "layers before it would not train. gptqmodel's choice lasts from the first use: load the base anew "
                    "and train before you evaluate, or load it with a kernel for both: "
                    "GPTQConfig(bits=…, backend='gptq_torch')"
                )
            y = y + ColumnsAlone.apply(x, xs, delta, columns.index, scale, self.ops).to(y.dtype)  # type: ignore[no-untyped-call]
            return y
        given = x if form is Form.SPLIT else cast_x  # the library casts as it likes
        y = QuantisedLinear.apply(given, xs, bias, delta, columns.index, scale, self, form)  # type: ignore[no-untyped-call]
        return y.to(x.dtype) if self.is_bnb_4bit else y


class QuantisedLinear(Function):
    """`QuantisedLinear.apply(x, xs, bias, delta, index, scale, weight, form)` returns y, (…, out).

    Args of `apply`:
        x: (…, in) in the dtype of the GEMM; xs: x[..., index], (…, r), or None if neither form nor gradient needs it.
        bias: (out,) or None.
        delta: (out, r); takes the gradient. index: (r,) int64. scale: s.
        weight: the `QuantisedWeight`.
        form: how y is made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xs: Tensor | None,
        bias: Tensor | None,
        delta: Tensor,
        index: Tensor,
        scale: float,
        weight: QuantisedWeight,
        form: Form,
    ) -> Tensor:
        """Compute Y and keep the r channels."""
        ctx.scale, ctx.weight = scale, weight
        keep(ctx, xs if ctx.needs_input_grad[3] else None, delta, index)
        if form is Form.OVERLAY:
            return weight.ops.forward(x, weight.overlaid(index, delta, scale, x.dtype), cast_bias(bias, x.dtype))
        assert xs is not None
        y: Tensor = weight.layer(x)
        return y + (xs @ (delta * scale).to(xs.dtype).t()).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute dX, db and dΔ, each only if asked for."""
        xs, delta, index = kept(ctx)
        weight: QuantisedWeight = ctx.weight
        gx = gbias = gdelta = None
        if ctx.needs_input_grad[0]:
            gx = weight.ops.grad_input(gy, weight.overlaid(index, delta, ctx.scale, gy.dtype))
        if ctx.needs_input_grad[2]:
            gbias = grad_bias(gy)
        if ctx.needs_input_grad[3]:
            gdelta = weight.ops.grad_columns(gy, xs.to(gy.dtype), ctx.scale)
        return gx, None, gbias, gdelta, None, None, None, None


class ColumnsAlone(Function):
    """`ColumnsAlone.apply(x, xs, delta, index, scale, ops)` returns x[..., index]·(s·Δ)ᵀ, (…, out).

    The trained part of a layer whose library does the rest, backward included. Args as in `QuantisedLinear`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, xs: Tensor, delta: Tensor, index: Tensor, scale: float, ops: Ops) -> Tensor:
        """Multiply the trained columns alone."""
        ctx.scale, ctx.ops, ctx.shape, ctx.dtype = scale, ops, x.shape, x.dtype
        keep(ctx, xs if ctx.needs_input_grad[2] else None, delta, index)
        return xs @ (delta * scale).to(xs.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the trained columns' part of dX, and dΔ."""
        xs, delta, index = kept(ctx)
        gx = gdelta = None
        if ctx.needs_input_grad[0]:
            part = ctx.ops.grad_input(gy, (delta * ctx.scale).to(gy.dtype))
            gx = gy.new_zeros(ctx.shape, dtype=ctx.dtype).index_copy_(-1, index, part.to(ctx.dtype))
        if ctx.needs_input_grad[2]:
            gdelta = ctx.ops.grad_columns(gy, xs.to(gy.dtype), ctx.scale)
        return gx, None, gdelta, None, None, None


def cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the bias in the dtype of the GEMM, as the libraries do."""
    return None if bias is None else bias.to(dtype)


def is_noted_quantised(model: nn.Module) -> bool:
    """Whether transformers takes a model for quantised."""
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def has_quantised_layers(model: nn.Module) -> bool:
    """Whether any layer is still quantised."""
    return any(True for _ in _quantised_layers(model))


def _quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizationBackend]]:
    for name, module in model.named_modules():
        if not list(module.children()) and (library := library_of(module)) is not None:
            yield name, module, library


def dequantise_(model: nn.Module, dtype: torch.dtype) -> None:
    """Make ordinary layers of those that are quantised; transformers does so for some libraries only.

    Args:
        model: a transformers model.
        dtype: as in `QuantisedWeight`.
    """
    for name, layer, library in list(_quantised_layers(model)):
        model.set_submodule(name, QuantisedWeight(layer, name, Ops(), library, dtype).dense([]))
    forget_quantisation(model)


def forget_quantisation(model: nn.Module) -> None:
    """Make transformers take a model for what it now is, an ordinary one; else its `save_pretrained` would not."""
    transformers_model: Any = model
    transformers_model.hf_quantizer.remove_quantization_config(model)
    for note in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(note, None)
