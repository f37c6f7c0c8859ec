"""A linear layer some of whose columns train in place, as a PEFT tuner layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from paca import freshness
from paca.backend import Backend
from paca.columns import AdaptedWeight, Adapter, Columns, ColumnSet, is_sharded, version_of
from paca.errors import BaseMismatchError
from paca.fingerprint import mismatch
from paca.linear import PacaLinear, backwards, columns_in
from paca.permutation import ORDER
from paca.quantised import QuantisedWeight, library_of
from paca.remembered import Remembered
from paca.schedule import Groups, Prefixes, Schedule
from paca.select import checked_columns
from paca.shared_input import SharedInput
from paca.strategies import ColumnWrite, adapted_columns, gather_slices

BASE = "__base__"  # PEFT's name for "no adapter" in a list of adapter names

# What an activation remembers: when it was gathered from, and its channels by column set and dtype.
_Gathered = tuple[object, dict[tuple[bytes, torch.dtype], Tensor]]


class PacaLayer(nn.Module, BaseTunerLayer):
    """`base_layer` with trained columns `W[:, index] = W0[:, index] + s·Δ` for each active adapter.

    While an adapter is active `base_layer.weight` *holds* the adapted columns, and `state_dict` still gives the
    pretrained ones. A weight that cannot hold them (`residency == "swap"`) gets them around each GEMM instead.
    Quantised weights are never written (`paca.quantised`). Overlapping columns of several adapters add up.

    Args:
        base_layer: an `nn.Linear`, a transformers `Conv1D`, or a linear layer that PEFT knows to be quantised.
        name: the module's path in the model, for messages.
        backend: does the tensor work of this layer, for good.
        residency: "resident" or "swap"; of no account for a quantised weight.
        dtype: of the model around a quantised weight.
    """

    adapter_layer_names = ("paca_delta",)
    weight_class: ClassVar[type[AdaptedWeight]] = AdaptedWeight  # of a weight that is not quantised
    other_param_names = ("paca_indices", "r", "paca_alpha", "scaling", "expected_fingerprint", "checked_indices")

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        backend: Backend,
        residency: str = "resident",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_out_features(base_layer)
        self.base_layer = base_layer
        self.name = name
        self.quantization_backend = library_of(self.get_base_layer())
        self.adapted = (
            self.weight_class(self.get_base_layer(), name, backend.ops, residency)
            if self.quantization_backend is None
            else QuantisedWeight(self.get_base_layer(), name, backend.ops, self.quantization_backend, dtype)
        )
        self.steps_per_check = backend.capabilities.steps_per_check
        self.r: dict[str, int] = {}
        self.paca_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.expected_fingerprint: dict[str, str] = {}
        self.checked_indices: dict[str, tuple[Tensor, int]] = {}  # and their version: other ones were loaded since
        self.paca_delta = nn.ParameterDict()
        self.paca_indices = BufferDict({}, persistent=True)
        self.merged_adapters: list[str] = []
        # In a mixed batch: the adapter of each row, and of each row that beam search makes of it.
        self.row_adapters: tuple[Sequence[str], Sequence[str]] | None = None
        self.schedules: list[Schedule] = []
        self._prefixes: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # an adapter's columns, and so many of them
        self._parts: dict[bytes, ColumnSet] = {}
        self.shared_input: SharedInput | None = None  # the layers that read what this one reads
        self._remembered: Remembered | None = None
        self._disable_adapters = False
        freshness.watch(self)
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------ adapters

    def get_base_layer(self) -> nn.Linear:
        """Return the wrapped layer; a Conv1D has the same attributes as far as they are used here."""
        return super().get_base_layer()  # type: ignore[return-value]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows of the matrix whose columns train, and columns to choose from."""
        return self.out_features, self.in_features

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
        rows = self.grid[0]
        r = len(index) * rows // self.out_features
        weight = self.adapted.parameter
        dtype = torch.promote_types(self.adapted.dtype, torch.float32)
        delta = torch.zeros(rows, len(index), dtype=dtype)
        if not init_weights:
            nn.init.normal_(delta, std=0.1)
        self.r[adapter_name], self.paca_alpha[adapter_name], self.scaling[adapter_name] = r, alpha, alpha / r
        self.expected_fingerprint[adapter_name] = fingerprint
        device = delta.device if weight.is_meta else weight.device
        self.paca_delta[adapter_name] = nn.Parameter(delta if delta.is_meta else delta.to(device))
        self.paca_indices[adapter_name] = index.to(device)
        self._mark_checked(adapter_name)
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
        device = device or self.adapted.parameter.device
        if device.type == "meta" or adapter_name not in self.paca_delta or self.paca_delta[adapter_name].is_meta:
            return
        delta, index = self.paca_delta[adapter_name], self.paca_indices[adapter_name]
        delta.data = delta.data.to(device)
        self.paca_indices[adapter_name] = index.to(device)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to `x`, (…, in); returns (…, out)."""
        if self.row_adapters is not None:
            return self._forward_rows(x, *self.row_adapters)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.held_adapters()
        if not adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        adapted = self.adapted
        if not torch.compiler.is_compiling():
            self.sync(adapters)
        columns = adapted.columns
        if isinstance(adapted, QuantisedWeight):
            return adapted.forward(x, self._gathered, adapters, _compute_dtype(x))
        if columns is None:
            raise RuntimeError(
                f"{self.name}: weight or adapter is on the meta device; load their values before running the model"
            )
        bias = adapted.bias
        trains = True in [adapter.delta.requires_grad for adapter in adapters]  # any() costs a generator
        if not (torch.is_grad_enabled() and (trains or x.requires_grad or (bias is not None and bias.requires_grad))):
            base = None if adapted.residency == "resident" else columns.base
            ops = adapted.step_ops(self.training)
            delta, scale = columns.combined(adapters)
            with columns_in(adapted.matrix, columns.index, base, delta, scale, adapted.ops) as weight:
                if base is not None and torch.compiler.is_compiling():  # the columns are in a copy of the weight
                    return ops.forward(x, adapted.shaped(weight), bias)
                if ops is not adapted.ops:  # a forward that is recomputed for its backward must be the same then
                    return ops.forward(x.to(_compute_dtype(x)), weight, bias)
                return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]

        if adapted.parameter.requires_grad:
            raise ValueError(
                f"{self.name}: the base weight requires a gradient, but PaCA trains its columns through the adapter "
                "only; freeze it (requires_grad_(False)), or train the module in full with modules_to_save"
            )
        return self._forward_trained(x, x.to(_compute_dtype(x)), adapters, trains)

    def _forward_trained(self, x: Tensor, cast_x: Tensor, adapters: Sequence[Adapter], trains: bool) -> Tensor:
        """Apply the layer with a gradient to come, of a delta if it `trains`; `cast_x` is `x` in the GEMM's dtype."""
        adapted, columns = self.adapted, self.adapted.columns
        assert columns is not None
        resident = adapted.residency == "resident"
        delta, scale = columns.combined(adapters)
        if trains and self.schedules and (group := self._group(adapters)) is not None:
            return self._forward_group(x, cast_x, group, adapters[0], columns)
        if self.shared_input is not None:
            shared = self.shared_input.output(self, adapters, x, cast_x)
            if shared is not None:
                return shared
        y: Tensor = PacaLinear.apply(  # type: ignore[no-untyped-call]
            cast_x,
            self._gathered(x, cast_x) if trains else None,
            adapted.matrix,
            adapted.bias,
            delta,
            columns.index,
            scale,
            None if resident else columns.base,
            adapted.held if resident and not torch.compiler.is_compiling() else None,
            adapted.step_ops(self.training),
        )
        return y

    def _forward_group(self, x: Tensor, cast_x: Tensor, group: slice, adapter: Adapter, columns: Columns) -> Tensor:
        """Apply the layer, and train one group of the columns that the weight holds: only its channels are kept."""
        key = columns.key + f"{group.start}:{group.stop}".encode()
        if key not in self._parts:
            grouped = replace(adapter, index=columns.index[group].clone())
            self._parts[key] = ColumnSet([grouped], self.adapted.ops.runs_to_slice)
        part = self._parts[key]
        return PacaLinear.apply(  # type: ignore[no-any-return,no-untyped-call]
            cast_x,
            self._gathered(x, cast_x, part),
            self.adapted.matrix,
            self.adapted.bias,
            adapter.delta[:, group],
            part.index,
            adapter.scale,
            None,
            None if torch.compiler.is_compiling() else self.adapted.held,
            self.adapted.step_ops(self.training),
        )

    def trains_resident(self, adapters: Sequence[Adapter], device: torch.device) -> bool:
        """Whether a forward on that device would train all `held_adapters()` with the columns in the weight."""
        weight = self.adapted.parameter
        return bool(
            adapters
            and not self.merged
            and self.row_adapters is None
            and self._group(adapters) is None
            and self.adapted.columns is not None
            and self.adapted.residency == "resident"
            and all(adapter.delta.requires_grad for adapter in adapters)
            and not weight.requires_grad
            and weight.device == device
        )

    @torch.no_grad()
    def _forward_rows(self, x: Tensor, names: Sequence[str], rows: Sequence[str]) -> Tensor:
        """Apply the layer to each row of `x`, (batch, …, in), with its own adapter; the weight holds pretrained values.

        Raises:
            ValueError: if the rows are not those of the batch.
        """
        each = rows if len(x) == len(rows) else names  # an encoder sees a batch before beam search widens it
        if len(x) != len(each):
            raise ValueError(
                f"{self.name}: Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(each)} and {len(x)} respectively."
            )
        y: Tensor | None = None
        for name in dict.fromkeys(each):
            own = torch.tensor([row for row, other in enumerate(each) if other == name], device=x.device)
            if name in self.paca_delta and not self.disable_adapters:
                index, delta = self.paca_indices[name], self.paca_delta[name]
                part = self.adapted.applied(x[own], Adapter(name, delta, index, self.scaling[name]))
            else:
                part = self.base_layer(x[own])
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[own] = part
        assert y is not None
        return y

    def _gathered(self, x: Tensor, cast_x: Tensor, part: ColumnSet | None = None) -> Tensor:
        """Return x[..., index] in the dtype of the GEMM, shared by all layers that read the same `x` at these columns.

        It is remembered on `x` itself, so that it lives no longer than `x` does.

        Args:
            x: what the layer was given.
            cast_x: the same in the dtype of the GEMM.
            part: which columns, if not all that train.
        """
        columns, dtype = part or self.adapted.chosen, cast_x.dtype
        assert columns is not None
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return self._gather(cast_x.detach(), columns)
        now = (x._version, x.data_ptr(), backwards())
        then, slices = cast(_Gathered, getattr(x, "_paca_gathered", (None, {})))
        if then != now:
            slices = {}
            x._paca_gathered = (now, slices)  # type: ignore[attr-defined]
        key = (columns.key, dtype)
        if key not in slices:
            slices[key] = self._gather(cast_x.detach(), columns)
        return slices[key]

    def _gather(self, x: Tensor, columns: ColumnSet) -> Tensor:
        if columns.slices is not None:
            return gather_slices(x, columns.slices)
        return self.adapted.ops.gather(x, columns.index)

    # ------------------------------------------------------------------ what the weight holds

    def held_adapters(self) -> Sequence[Adapter]:
        """List the adapters whose columns the weight should hold."""
        if torch.compiler.is_compiling():  # a graph guards what it read
            return self._found_adapters()
        if self._remembered is None or not self._remembered.serves(self):
            adapters = self._found_adapters()
            lasting = len(adapters) == len(self.active_adapters) and not (self.merged or self.schedules)
            self._remembered = Remembered(adapters) if lasting else None
            return adapters
        return self._remembered.adapters

    def _found_adapters(self) -> list[Adapter]:
        unmerged = [] if self.disable_adapters else self._live(self.active_adapters)
        names = self.merged_adapters or unmerged
        return [self._adapter(name) for name in names]

    def _adapter(self, name: str) -> Adapter:
        """Return an adapter; in training those of its columns that the step runs with."""
        delta, index = self.paca_delta[name], self.paca_indices[name]
        prefixes = next((s for s in self.schedules if isinstance(s, Prefixes) and s.adapter == name), None)
        if prefixes is not None and self.training and not self.merged_adapters and delta.requires_grad:
            count = prefixes.part(len(index))[1]
            whole, first = self._prefixes.get((name, count), (None, index))
            if whole is not index:
                first = index[:count].clone()
                self._prefixes[name, count] = index, first
            delta, index = delta[:, :count], first
        return Adapter(name, delta, index, self.scaling[name])

    def _group(self, adapters: Sequence[Adapter]) -> slice | None:
        """Return which of the columns train in this step, if it is one group of them."""
        groups = next((s for s in self.schedules if isinstance(s, Groups) and s.adapter == adapters[0].name), None)
        if groups is None or not self.training or len(adapters) > 1:
            return None
        return slice(*groups.part(len(adapters[0].index)))

    def replace_columns(self, adapter: str, index: Tensor) -> None:
        """Let an adapter train other columns, (r,) sorted; those given up get their pretrained values back."""
        self.paca_indices[adapter] = index.to(self.paca_indices[adapter].device)
        self.expected_fingerprint[adapter] = ""  # that of the columns it was loaded with
        self._mark_checked(adapter)

    def _live(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.paca_delta]

    def sync(self, adapters: Sequence[Adapter] | None = None) -> None:
        """Make the weight hold what it should, writing only if something changed.

        Does nothing before values are loaded.

        Args:
            adapters: `held_adapters()`, if the caller has them.
        """
        adapters = self.held_adapters() if adapters is None else adapters
        if adapters and self.adapted.is_fresh(adapters):
            return
        with torch.no_grad():
            if not adapters:
                self.adapted.restore()
                self.adapted.columns = None
            elif self.merged or not self.adapted.ready(adapters):
                return  # `merge` has written; the load that brings the values will
            elif self.adapted.residency != "resident":
                self._plan(adapters)
            else:
                freshness.write([self])

    def _plan(self, adapters: Sequence[Adapter]) -> None:
        """Keep the pretrained columns of these adapters.

        Column numbers that came in by another way than `load_state_dict` (transformers' `load_adapter` sets tensors)
        are checked first.
        """
        for adapter in adapters:
            index, version = self.checked_indices[adapter.name]
            if index is not adapter.index or version != version_of(index):
                self.check_loaded(adapter.name)
        self.adapted.plan(adapters)

    def planned_write(self, adapters: Sequence[Adapter]) -> ColumnWrite | None:
        """Return what is to be written to the weight now, if it can hold its columns.

        Args:
            adapters: `held_adapters()`.
        """
        adapted = self.adapted
        if self.merged or not adapters:
            return None
        if (planned := adapted.planned(adapters)) is not None:
            return planned
        if not adapted.ready(adapters):
            return None
        self._plan(adapters)
        return adapted.column_write(adapters) if adapted.residency == "resident" else None

    @torch.no_grad()
    def check_columns(self, rows: int | None = None, first: int = 0) -> None:
        """Raise `StaleColumnsError` if the weight does not hold what it should; see `AdaptedWeight.check`."""
        self.adapted.check(self.held_adapters(), rows, first)

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
        if names and isinstance(self.adapted, QuantisedWeight):
            self.adapted.check_can_merge()
        if names:
            self.merged_adapters = [*self.merged_adapters, *names]
            self._write_merged()

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        if self.quantization_backend is not None:
            self._set_base_layer(self.adapted.layer)
        self.adapted.restore()
        self.sync()

    def write_again(self) -> None:
        """Write what the weight should hold after its values were replaced."""
        if self.merged:
            self._write_merged()
        else:
            self.sync()

    @torch.no_grad()
    def _write_merged(self) -> None:
        """Write the merged columns, also to a weight that is not resident otherwise."""
        adapters = self.held_adapters()
        self._plan(adapters)
        if isinstance(self.adapted, QuantisedWeight):  # its own weight stays as it is, for `unmerge`
            self._set_base_layer(self.adapted.dense(adapters))
            return
        self.adapted.ops.write_columns([self.adapted.column_write(adapters)])
        self.adapted.mark_written(adapters)

    def _set_base_layer(self, layer: nn.Module) -> None:
        """Exchange the wrapped layer, below another method's wrapper if there is one."""
        owner: Any = self
        while isinstance(owner.base_layer, BaseTunerLayer):
            owner = owner.base_layer
        owner.base_layer = layer

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
        self.adapted.leave()
        freshness.forget(self)
        return self.get_base_layer()

    # ------------------------------------------------------------------ views of the adapter

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s·Δ·Sᵀ in the weight's own layout, dense."""
        delta = self.paca_delta[adapter].detach()
        dense = delta.new_zeros(self.out_features, self.in_features)
        dense.index_copy_(1, self.paca_indices[adapter], delta * self.scaling[adapter])
        return self.adapted.oriented(dense)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PaCA is LoRA with a fixed one-hot A; `paca.convert_to_lora` does it without loss."""
        return True

    @property
    def residency(self) -> str:
        """Where the columns live between steps: "resident" or "swap"; "quantised" if they are never in the weight."""
        return self.adapted.residency

    def pretrained_weight(self) -> Tensor:
        """Return the pretrained weight, (out, in); a copy if it holds adapted columns now."""
        return self.adapted.pretrained()

    def base_columns(self, adapter: str) -> Tensor:
        """Return a copy of the pretrained columns that an adapter trains, (out, r), whatever the weight holds now."""
        return self.adapted.pretrained_columns(self.paca_indices[adapter])

    @property
    def order(self) -> Tensor | None:
        """The original column at each position of a co-permuted weight, (in,) int64; None if nothing was moved."""
        return getattr(self.get_base_layer(), ORDER, None)

    def fingerprint(self, adapter: str) -> str:
        """Digest the pretrained columns that an adapter trains, in their original order."""
        index = self.paca_indices[adapter]
        if self.order is not None:
            index = index[self.order[index.cpu()].argsort().to(index.device)]
        return self.adapted.fingerprint(index)

    def has_values(self, adapter: str) -> bool:
        """Whether weight and adapter are loaded, not on the meta device or one rank's part."""
        mine = Adapter(adapter, self.paca_delta[adapter], self.paca_indices[adapter], self.scaling[adapter])
        return self.adapted.ready([mine]) and not is_sharded(self.adapted.parameter)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As `nn.Module.state_dict`, with the pretrained weight.

        The copy costs memory for as long as the caller keeps it.
        """
        if self.adapted.is_adapted:
            self.adapted.look_at_weight()
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        key = f"{prefix}base_layer.weight"
        if self.adapted.is_adapted and not self.merged and key in state:
            state[key] = state[key].detach().clone()
            self.adapted.pretrained_into(state[key])
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Refuse broken column numbers, then restore the weight before it may be overwritten."""
        for name, r in self.r.items():
            index = state_dict.get(f"{prefix}paca_indices.{name}")
            if index is None or index.is_meta:
                continue
            rows, width = self.grid
            found = len(checked_columns(index, width, f"{self.name}, adapter {name!r}"))
            wanted = r * self.out_features // rows
            if found != wanted:
                raise ValueError(
                    f"{self.name}, adapter {name!r}: its config trains {wanted} columns, its file has {found}"
                )
        if self.merged and f"{prefix}base_layer.weight" in state_dict:
            raise ValueError(
                f"{self.name}: base weights cannot be loaded while an adapter is merged into them, because nobody "
                "could tell merged columns from pretrained ones; call unmerge_adapter() first"
            )
        self.adapted.forget()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_loaded(self, adapter: str) -> None:
        """Sort the column numbers of an adapter that was loaded, and see whether it was made for this base weight.

        Raises:
            ValueError: if the numbers cannot be columns of this weight.
            BaseMismatchError: if the adapter was made for another base.
        """
        index, delta = self.paca_indices[adapter], self.paca_delta[adapter]
        columns = checked_columns(index, self.grid[1], f"{self.name}, adapter {adapter!r}")
        with torch.no_grad():  # all else relies on sorted columns
            delta.copy_(delta[:, index.argsort()])
            index.copy_(columns)
        found = self.fingerprint(adapter)
        expected = self.expected_fingerprint[adapter]
        if expected and (why := mismatch(expected, found)):
            raise BaseMismatchError(
                f"{self.name}: adapter {adapter!r} was made for another base model: {why}. Load it on the base it was "
                "trained on, or, if you mean it, pass a config with check_base=False: "
                "config = PeftConfig.from_pretrained(…); config.check_base = False"
            )
        self._mark_checked(adapter)

    def _mark_checked(self, adapter: str) -> None:
        index = self.paca_indices[adapter]
        self.checked_indices[adapter] = index, version_of(index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PacaLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.adapted.apply(fn)
        return self

    def _replicate_for_data_parallel(self) -> PacaLayer:
        raise RuntimeError(
            "torch.nn.DataParallel copies the model in every step, which resident columns do not survive; start one "
            "process per device instead (torchrun or accelerate launch), or make a single device visible"
        )

    def train(self, mode: bool = True) -> PacaLayer:
        """Set the mode.

        A change of mode writes the columns anew, because averaged weights are often copied in just before.
        """
        changed = mode != self.training
        super().train(mode)
        if changed and self.adapted.held.key is not None and not self.merged:
            with torch.no_grad():
                freshness.write_changed([self])
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._remembered = None
        freshness.watch(self)

    def extra_repr(self) -> str:
        """Show what `print(model)` should say."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, residency={self.residency}"
        )


class AdaptedLinear(PacaLayer):
    """The layer that takes a linear's place.

    PEFT's "all-linear" recognises a layer that has an adapter already by the word Linear in its class's name.
    """


def in_out_features(layer: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a layer that can be adapted.

    Raises:
        TypeError: if it is of another kind.
    """
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TypeError("MultiheadAttention reads the weight of its out_proj without calling it, so it cannot train.")
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        return layer.in_features, layer.out_features
    if library_of(layer) is not None:
        features: Any = layer
        return int(features.in_features), int(features.out_features)
    own = (
        " Its forward is its own, and it is of no kind of quantised layer that PEFT knows."
        if isinstance(layer, nn.Linear)
        else ""
    )
    raise TypeError(
        f"PaCA adapts torch.nn.Linear and transformers Conv1D, found "
        f"{type(layer).__module__}.{type(layer).__name__}.{own}"
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would run a linear layer on `x`."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _after_load(layer: PacaLayer, incompatible_keys: Any) -> None:
    """Check what was loaded and write it to the weight. Runs when the layer and its base layer have been loaded."""
    for name in layer.paca_delta:
        if layer.has_values(name):
            layer._move_adapter_to_device_of_base_layer(name)  # PEFT does so later, and may have read it to another
            layer.check_loaded(name)
    layer.write_again()
