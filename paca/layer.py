"""A linear layer some of whose columns train in place, as a PEFT tuner layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca import freshness
from paca.backend import Backend
from paca.errors import BaseMismatchError, StaleColumnsError
from paca.fingerprint import fingerprint, mismatch
from paca.linear import Held, PacaLinear, backwards, columns_in
from paca.select import checked_columns
from paca.strategies import ColumnWrite, adapted_columns

# What an activation remembers: when it was gathered from, and its channels by column set and dtype.
_Gathered = tuple[object, dict[tuple[bytes, torch.dtype], Tensor]]


class PacaLayer(nn.Module, BaseTunerLayer):
    """`base_layer` with trained columns `W[:, index] = W0[:, index] + s·Δ` for each active adapter.

    While an adapter is active `base_layer.weight` *holds* the adapted columns, and `state_dict` still gives the
    pretrained ones. A weight that cannot hold them (`residency == "swap"`) gets them around each GEMM instead.
    Overlapping columns of several adapters add up.

    Args:
        base_layer: an `nn.Linear` or a transformers `Conv1D`.
        name: the module's path in the model, for messages.
        backend: does the tensor work of this layer, for good.
        residency: "resident" or "swap".
    """

    adapter_layer_names = ("paca_delta",)
    other_param_names = ("paca_indices", "r", "paca_alpha", "scaling", "expected_fingerprint")

    def __init__(self, base_layer: nn.Module, name: str, backend: Backend, residency: str = "resident") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.residency = residency
        self.ops = backend.ops
        self.steps_per_check = backend.capabilities.steps_per_check
        self.r: dict[str, int] = {}
        self.paca_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.expected_fingerprint: dict[str, str] = {}
        self.paca_delta = nn.ParameterDict()
        self.paca_indices = BufferDict({}, persistent=True)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._columns: Columns | None = None
        self._held = Held()
        self._home: int | None = None  # id of the weight last seen
        self.in_features, self.out_features = in_out_features(base_layer)
        freshness.watch(self)
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------ adapters

    def get_base_layer(self) -> nn.Linear:
        """Return the wrapped layer; a Conv1D has the same attributes as far as they are used here."""
        return super().get_base_layer()  # type: ignore[return-value]

    def update_layer(
        self,
        adapter_name: str,
        index: Tensor,
        alpha: float,
        *,
        init_weights: bool = True,
        inference_mode: bool = False,
        fingerprint: str = "",
    ) -> None:
        """Add an adapter that trains the columns `index`, (r,) int64.

        Δ starts at 0 unless `init_weights` is False (for tests).
        """
        r = len(index)
        weight = self.get_base_layer().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = torch.zeros(self.out_features, r, dtype=dtype)
        if not init_weights:
            nn.init.normal_(delta, std=0.1)
        self.r[adapter_name], self.paca_alpha[adapter_name], self.scaling[adapter_name] = r, alpha, alpha / r
        self.expected_fingerprint[adapter_name] = fingerprint
        device = delta.device if weight.is_meta else weight.device
        self.paca_delta[adapter_name] = nn.Parameter(delta if delta.is_meta else delta.to(device))
        self.paca_indices[adapter_name] = index.to(device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; the weight holds their columns when this returns."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.sync()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off restores the pretrained weight bit for bit."""
        super().enable_adapters(enabled)
        self.sync()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength relative to its own alpha / r."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.paca_alpha[adapter] / self.r[adapter]
            self.sync()

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for adapter in self._live(self.active_adapters):
            self.scaling[adapter] *= scale
        self.sync()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters, or set it back to alpha / r."""
        for adapter in self._live(self.active_adapters):
            full = self.paca_alpha[adapter] / self.r[adapter]
            self.scaling[adapter] = full if scale is None else self.scaling[adapter] / scale
        self.sync()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the weight's device.

        Its dtype stays: PEFT's own way would round a loaded float32 delta to the weight's dtype.
        """
        device = device or self.get_base_layer().weight.device
        if device.type == "meta" or adapter_name not in self.paca_delta or self.paca_delta[adapter_name].is_meta:
            return
        self.paca_delta[adapter_name] = self.paca_delta[adapter_name].to(device)
        self.paca_indices[adapter_name] = self.paca_indices[adapter_name].to(device)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to `x`, (…, in); returns (…, out)."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "PaCA keeps one set of columns in the weight, so one batch cannot mix adapters: run one batch per "
                "adapter with set_adapter, or export the adapters with paca.convert_to_lora and mix those"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._wanted()
        if not names or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling():
            self.sync()
        columns = self._columns
        if columns is None:
            raise RuntimeError(
                f"{self.name}: weight or adapter is on the meta device; load their values before running the model"
            )
        deltas = [self.paca_delta[name] for name in names]
        bias = self.get_base_layer().bias
        trains = any(delta.requires_grad for delta in deltas)
        resident = self.residency == "resident"
        if not (torch.is_grad_enabled() and (trains or x.requires_grad or (bias is not None and bias.requires_grad))):
            if resident:
                return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
            delta, scale = columns.combined(deltas, [self.scaling[name] for name in names])
            with columns_in(self._weight(), columns.index, columns.base, delta, scale, self.ops):
                return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]

        delta, scale = columns.combined(deltas, [self.scaling[name] for name in names])
        dtype = _compute_dtype(x)
        xs = self._gathered(x, columns, dtype) if trains else None
        held = self._held if resident and not torch.compiler.is_compiling() else None
        y: Tensor = PacaLinear.apply(  # type: ignore[no-untyped-call]
            x.to(dtype),
            xs,
            self._weight(),
            bias,
            delta,
            columns.index,
            scale,
            None if resident else columns.base,
            held,
            self.ops,
        )
        return y

    def _gathered(self, x: Tensor, columns: Columns, dtype: torch.dtype) -> Tensor:
        """Return x[..., index], shared by all layers that read the same `x` at the same columns.

        It is remembered on `x` itself, so that it lives no longer than `x` does.
        """
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return self.ops.gather(x.detach(), columns.index).to(dtype)
        now = (x._version, backwards())
        then, slices = cast(_Gathered, getattr(x, "_paca_gathered", (None, {})))
        if then != now:
            slices = {}
            x._paca_gathered = (now, slices)  # type: ignore[attr-defined]
        key = (columns.key, dtype)
        if key not in slices:
            slices[key] = self.ops.gather(x.detach(), columns.index).to(dtype)
        return slices[key]

    # ------------------------------------------------------------------ write and undo

    @torch.no_grad()
    def sync(self) -> None:
        """Make the weight hold what it should, writing only if something changed.

        Does nothing before values are loaded.
        """
        names = self._wanted()
        if self.merged:
            if self._held.key is None:
                self._write_merged()
        elif not names:
            self._restore()
            self._columns = None
        elif self._ready(names):
            self._check_home()
            if self.residency == "swap":
                self._plan(names)
            elif self._held.key is None or self._held.key != self._key(names):
                freshness.write([self])

    @torch.no_grad()
    def prepare_write(self) -> bool:
        """Plan the columns to be held; returns whether they can be written to the weight now."""
        names = self._wanted()
        if self.merged or not names or not self._ready(names):
            return False
        self._check_home()
        if self.residency == "swap":
            return False
        self._plan(names)
        return True

    def _plan(self, names: Sequence[str]) -> None:
        """Keep the pretrained columns of these adapters, unless that is done already."""
        if is_sharded(self.get_base_layer().weight):
            return  # the next forward sees the whole weight
        if self._columns is None or not self._columns.covers(names, self._weight()):
            self._restore()
            self._columns = Columns(self._weight(), names, [self.paca_indices[name] for name in names])

    def column_write(self) -> ColumnWrite:
        """What is to be written to the weight; after `prepare_write`."""
        columns = self._planned()
        names = columns.names
        delta, scale = columns.combined([self.paca_delta[n].detach() for n in names], [self.scaling[n] for n in names])
        return ColumnWrite(self._weight(), columns.index, columns.base, delta, scale)

    def mark_written(self) -> None:
        """Note that the weight holds the planned columns."""
        self._held.key = self._key(self._planned().names)

    @torch.no_grad()
    def check_columns(self, rows: int | None = None) -> None:
        """Compare the weight's columns with what they should be, bit for bit.

        Args:
            rows: look at this many rows only, spread over the weight; all by default.

        Raises:
            StaleColumnsError: if they differ although no change was seen.
        """
        names = self._wanted()
        if (
            self._columns is None
            or self._held.key is None
            or not self._ready(names)
            or self._held.key != self._key(names)
        ):
            return  # not resident, or known to be out of date: the next forward writes
        write = self.column_write()
        some = slice(0, None, 1 if rows is None else math.ceil(self.out_features / rows))
        found = write.weight[some].index_select(1, write.index)
        wanted = adapted_columns(write.base[some], write.delta[some], write.scale)
        if not torch.equal(found.nan_to_num(), wanted.nan_to_num()):
            raise StaleColumnsError(
                f"{self.name}: the weight does not hold the adapter's columns. Its delta or its weight was changed in "
                "a way torch cannot see (.data, a custom kernel, or an edit of a compiled model). Call "
                "paca.refresh(model) after such a change; edit base weights inside `with model.disable_adapter():`."
            )

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the pretrained columns back, bit for bit."""
        if self._held.key is not None and self._columns is not None:
            self._weight().index_copy_(1, self._columns.index, self._columns.base)
        self._held.key = None

    def _wanted(self) -> list[str]:
        """Name the adapters whose columns the weight should hold."""
        if self.merged_adapters:
            return self.merged_adapters
        return [] if self.disable_adapters else self._live(self.active_adapters)

    def _live(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.paca_delta]

    def _ready(self, names: Sequence[str]) -> bool:
        """Whether all values are there: tensors wait on the meta device until they are loaded."""
        tensors = [
            self.get_base_layer().weight,
            *(self.paca_delta[n] for n in names),
            *(self.paca_indices[n] for n in names),
        ]
        return not any(tensor.is_meta for tensor in tensors)

    def _key(self, names: Sequence[str]) -> object:
        """Say what the weight would hold if it were written now: equal keys mean equal contents."""
        deltas = [self.paca_delta[name] for name in names]
        weight = self.get_base_layer().weight
        return (
            freshness.epoch(),
            weight.data_ptr(),
            weight.dtype,
            *(
                (n, d.data_ptr(), d._version, self.paca_indices[n]._version, self.scaling[n])
                for n, d in zip(names, deltas, strict=True)
            ),
        )

    def _check_home(self) -> None:
        """Leave residency when the weight turns out to be sharded: it then holds the columns for a moment only."""
        weight = self.get_base_layer().weight
        replaced = self._home is not None and self._home != id(weight)
        self._home = id(weight)
        if self.residency == "swap":
            return
        if why := why_not_resident(weight, replaced):
            warnings.warn(
                f"paca: {self.name}: {why}; its columns are swapped in around each GEMM from now on", stacklevel=2
            )
            self.residency = "swap"
            self._held.key = None

    def _weight(self) -> Tensor:
        """The frozen weight as (out, in), a transposed view for Conv1D."""
        return self._oriented(self.get_base_layer().weight)

    def _oriented(self, weight: Tensor) -> Tensor:
        """Turn (out, in) into the weight's own layout, or back."""
        return weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight

    def _planned(self) -> Columns:
        if self._columns is None:
            raise RuntimeError(f"{self.name}: no adapter is active")
        return self._columns

    # ------------------------------------------------------------------ merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave adapters' columns in the weight and run the base layer alone until `unmerge`.

        Args:
            safe_merge: refuse columns that are not finite before anything is written.
            adapter_names: which; the active ones by default.
        """
        names = self._live(check_adapters_to_merge(self, adapter_names))
        for name in names if safe_merge else []:
            merged = adapted_columns(self.base_columns(name), self.paca_delta[name].detach(), self.scaling[name])
            if not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if names:
            self.merged_adapters = [*self.merged_adapters, *names]
            self._write_merged()

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        self._restore()
        self.sync()

    @torch.no_grad()
    def _write_merged(self) -> None:
        """Write the merged columns, also to a weight that is not resident otherwise."""
        names = self._wanted()
        if self._ready(names):
            self._plan(names)
            self.ops.write_columns([self.column_write()])
            self.mark_written()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, holding the adapted columns if `merge`, else the pretrained ones.

        The layer is spent.
        """
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        if not self.merged:  # also if this layer has none of the adapters to be merged
            self.enable_adapters(False)
        freshness.forget(self)
        return self.get_base_layer()

    # ------------------------------------------------------------------ views of the adapter

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s·Δ·Sᵀ in the weight's own layout, dense."""
        delta = self.paca_delta[adapter].detach()
        dense = delta.new_zeros(self.out_features, self.in_features)
        dense.index_copy_(1, self.paca_indices[adapter], delta * self.scaling[adapter])
        return self._oriented(dense)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PaCA is LoRA with a fixed one-hot A; `paca.convert_to_lora` does it without loss."""
        return True

    def base_columns(self, adapter: str) -> Tensor:
        """Return a copy of the pretrained columns that an adapter trains, (out, r), whatever the weight holds now."""
        weight = self._weight().detach()
        columns = weight.index_select(1, self.paca_indices[adapter])
        if self._held.key is not None and self._columns is not None:
            position = torch.searchsorted(self._columns.index, self.paca_indices[adapter])
            position = position.clamp(max=len(self._columns.index) - 1)
            kept = self._columns.index[position] == self.paca_indices[adapter]
            columns = torch.where(kept, self._columns.base[:, position], columns)
        return columns

    def pretrained_weight(self) -> Tensor:
        """Return the pretrained weight, (out, in); a copy if it holds adapted columns now."""
        weight = self._weight().detach()
        if self._held.key is None or self._columns is None:
            return weight
        return weight.index_copy(1, self._columns.index, self._columns.base)

    def has_values(self, adapter: str) -> bool:
        """Whether weight and adapter are loaded, not on the meta device or one rank's part."""
        return self._ready([adapter]) and not is_sharded(self.get_base_layer().weight)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As `nn.Module.state_dict`, with the pretrained weight.

        The copy costs memory for as long as the caller keeps it.
        """
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        key = f"{prefix}base_layer.weight"
        if self._held.key is not None and self._columns is not None and not self.merged and key in state:
            state[key] = state[key].detach().clone()
            self._oriented(state[key]).index_copy_(1, self._columns.index, self._columns.base)
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Restore the weight before it may be overwritten; `_after_load` writes the columns again."""
        self._restore()
        self._columns = self._home = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PacaLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._columns is not None:
            self._columns.apply(fn)
        self._home = None
        return self

    def train(self, mode: bool = True) -> PacaLayer:
        """Set the mode.

        A change of mode writes the columns anew, because averaged weights are often copied in just before.
        """
        changed = mode != self.training
        super().train(mode)
        if changed and self._held.key is not None and not self.merged:
            with torch.no_grad():
                freshness.write([self])
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._home = None
        freshness.watch(self)

    def extra_repr(self) -> str:
        """Show what `print(model)` should say."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, residency={self.residency}"
        )


class Columns:
    """The columns of one weight that a set of adapters trains, and the pretrained values there.

    Attributes:
        names: the adapters.
        index: (u,) int64, the sorted union of their columns.
        base: (out, u) in the weight's dtype.
        key: equal for equal `index`, cheap to compare.
    """

    def __init__(self, weight: Tensor, names: Sequence[str], indices: Sequence[Tensor]) -> None:
        self.names = list(names)
        with torch.inference_mode(False):  # or autograd could not use them later
            self.index = indices[0] if len(indices) == 1 else torch.cat(list(indices)).unique()
            self.base = weight.detach().index_select(1, self.index)
            one = len(indices) == 1
            self.positions = None if one else [torch.searchsorted(self.index, index) for index in indices]
        self.key = self.index.cpu().numpy().tobytes()

    def covers(self, names: Sequence[str], weight: Tensor) -> bool:
        """Whether this plan still serves: the same adapters on the same device."""
        return self.names == list(names) and self.base.device == weight.device

    def combined(self, deltas: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, float]:
        """Return one delta (out, u) and one scale that stand for all adapters; differentiable."""
        if self.positions is None:
            return deltas[0], scales[0]
        total = torch.zeros(self.base.shape, dtype=deltas[0].dtype, device=self.base.device)
        for delta, scale, position in zip(deltas, scales, self.positions, strict=True):
            total = total.index_add(1, position, delta * scale)
        return total, 1.0

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the model."""
        self.index, self.base = fn(self.index), fn(self.base)
        if self.positions is not None:
            self.positions = [fn(position) for position in self.positions]


def in_out_features(layer: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a layer that can be adapted.

    Raises:
        TypeError: if it is of another kind.
    """
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        return layer.in_features, layer.out_features
    own = (
        " Its forward is its own; quantised and fp8 layers are not supported yet."
        if isinstance(layer, nn.Linear)
        else ""
    )
    raise TypeError(
        f"PaCA adapts torch.nn.Linear and transformers Conv1D, found "
        f"{type(layer).__module__}.{type(layer).__name__}.{own}"
    )


def is_sharded(weight: Tensor) -> bool:
    """Whether this is one rank's part of a weight (FSDP1, FSDP2, tensor parallel)."""
    return hasattr(weight, "_fsdp_flattened") or any(cls.__name__ == "DTensor" for cls in type(weight).__mro__)


def why_not_resident(weight: Tensor, replaced: bool = False) -> str:
    """Say why a weight cannot hold columns between steps, or nothing if it can.

    Args:
        weight: the frozen weight.
        replaced: whether another tensor has taken the place of the one seen before.
    """
    if hasattr(weight, "ds_id"):
        return "the weight is partitioned by DeepSpeed ZeRO-3"
    if is_sharded(weight):
        return "the weight is sharded"
    if replaced and torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the weight was replaced while running distributed, as sharding does"
    return ""


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would run a linear layer on `x`."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _after_load(layer: PacaLayer, incompatible_keys: Any) -> None:
    """Check what was loaded and write it to the weight. Runs when the layer and its base layer have been loaded."""
    for name, expected in layer.expected_fingerprint.items():
        index, delta = layer.paca_indices[name], layer.paca_delta[name]
        if index.is_meta or delta.is_meta or layer.get_base_layer().weight.is_meta:
            continue
        columns = checked_columns(index, layer.in_features, f"{layer.name}, adapter {name!r}")
        if len(columns) != delta.shape[1]:
            raise ValueError(f"{layer.name}, adapter {name!r}: {len(columns)} indices for {delta.shape[1]} columns")
        with torch.no_grad():  # all else relies on sorted columns
            delta.copy_(delta[:, index.argsort()])
            index.copy_(columns)
        found = fingerprint(layer.base_columns(name), layer.in_features)
        if expected and (why := mismatch(expected, found, layer.get_base_layer().weight.dtype)):
            raise BaseMismatchError(
                f"{layer.name}: adapter {name!r} was made for another base model: {why}. Load it on the base it was "
                "trained on, or, if you mean it, pass a config with check_base=False: "
                "config = PeftConfig.from_pretrained(…); config.check_base = False"
            )
    layer.sync()
