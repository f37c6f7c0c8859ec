"""What the trained columns of one frozen weight hold: planned, written, checked, and put back bit for bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca.backend import FrozenProducts, Ops
from paca.errors import StaleColumnsError
from paca.fingerprint import fingerprint
from paca.linear import Held, columns_in
from paca.strategies import ColumnWrite, adapted_columns


@dataclass(frozen=True)
class Adapter:
    """One adapter's part of a layer: the weight becomes `W0[:, index] + scale·delta` there."""

    name: str
    delta: Tensor  # (out, r)
    index: Tensor  # (r,) int64, sorted
    scale: float

    def key(self) -> tuple[object, ...]:
        """Change whenever torch can tell that a value changed."""
        delta, index = self.delta, self.index
        return self.name, delta.data_ptr(), version_of(delta), version_of(index), self.scale, index.shape[0]


def version_of(tensor: Tensor) -> int:
    """Count the in-place changes that torch has seen; tensors made in inference mode are not followed."""
    return 0 if tensor.is_inference() else tensor._version


def runs_of(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return sorted numbers as runs of neighbours, (first, last + 1) each.

    >>> runs_of([2, 3, 4, 9])
    ((2, 5), (9, 10))
    """
    runs: list[tuple[int, int]] = []
    for number in numbers:
        first = runs.pop()[0] if runs and runs[-1][1] == number else number
        runs.append((first, number + 1))
    return tuple(runs)


class ColumnSet:
    """The columns of one weight that a set of adapters trains.

    Attributes:
        index: (u,) int64, the sorted union of their columns.
        key: equal for equal `index`, cheap to compare.
        first: of columns that lie side by side; None if they do not.
        slices: the runs of neighbours if channels are to be gathered by slices, else None. Compiled code looks at
            nothing else of these: layers that only differ in which columns they train share one graph.

    Args:
        adapters: at least one.
        runs_to_slice: as in `Ops`.
    """

    def __init__(self, adapters: Sequence[Adapter], runs_to_slice: int | None = 0) -> None:
        indices = [adapter.index for adapter in adapters]
        self._made_of = [(adapter.name, adapter.index, version_of(adapter.index)) for adapter in adapters]
        one = len(indices) == 1
        with torch.inference_mode(False):  # or autograd could not use them later
            self.index = indices[0].clone() if one else torch.cat(indices).unique()
            self.positions = None if one else [torch.searchsorted(self.index, index) for index in indices]
        numbers = self.index.cpu()
        self.key = numbers.numpy().tobytes()
        self._numbers = numbers
        self.first = int(numbers[0]) if int(numbers[-1] - numbers[0]) + 1 == len(numbers) else None
        one_run, few = self.first is not None, runs_to_slice
        sliced = few is None or (one_run and few > 0) or (few > 1 and len(self.runs) <= few)
        self.slices = self.runs if sliced else None

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The columns as runs of neighbours, (first, last + 1) each, on the host."""
        return runs_of(self._numbers.tolist())

    def covers(self, adapters: Sequence[Adapter], weight: Tensor) -> bool:
        """Whether this plan still serves: the same columns of the same adapters on the same device."""
        if self.index.device != weight.device or len(adapters) != len(self._made_of):
            return False
        for adapter, (name, index, version) in zip(adapters, self._made_of, strict=True):
            if adapter.name != name or adapter.index is not index or version_of(index) != version:
                return False
        return True

    def has(self, index: Tensor) -> bool:
        """Whether these are the columns of `index`, on the same device."""
        return self.index.device == index.device and torch.equal(self.index, index)

    def combined(self, adapters: Sequence[Adapter]) -> tuple[Tensor, float]:
        """Return one delta (out, u) and one scale that stand for all adapters; differentiable."""
        if self.positions is None:
            return adapters[0].delta, adapters[0].scale
        dtype = reduce(torch.promote_types, (adapter.delta.dtype for adapter in adapters))
        total = torch.zeros(len(adapters[0].delta), len(self.index), dtype=dtype, device=self.index.device)
        for adapter, position in zip(adapters, self.positions, strict=True):
            total = total.index_add(1, position, adapter.delta.to(dtype) * adapter.scale)
        return total, 1.0

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the model."""
        self.index = fn(self.index)
        if self.positions is not None:
            self.positions = [fn(position) for position in self.positions]


class Columns(ColumnSet):
    """Those columns, and the pretrained values there.

    Attributes:
        base: (out, u) in the weight's dtype.
        products: the products of a training step, where the backend makes them with a copy of the frozen part.
        ops: then the operations of that step.

    Args:
        adapters: at least one.
        pretrained: gives the pretrained columns of an index, (out, len(index)), as a tensor of their own.
        runs_to_slice: as in `Ops`.
    """

    def __init__(
        self, adapters: Sequence[Adapter], pretrained: Callable[[Tensor], Tensor], runs_to_slice: int | None
    ) -> None:
        super().__init__(adapters, runs_to_slice)
        with torch.inference_mode(False):
            self.base = pretrained(self.index)
        self.products: FrozenProducts | None = None
        self.ops: Ops | None = None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the model."""
        super().apply(fn)
        self.base = fn(self.base)


class AdaptedWeight:
    """A frozen weight and the adapters' columns in it.

    *Resident*: between steps the weight itself holds the adapted columns; `held.key` says which values. *Swap*: it
    holds the pretrained ones, and the adapted ones are put in around each GEMM. Either way the pretrained columns are
    kept once, in `columns.base`.

    Args:
        layer: the `nn.Linear` or `Conv1D` that owns the weight.
        name: its path in the model, for messages.
        ops: the backend's operations.
        residency: "resident", "swap", or "quantised" (`paca.quantised`).
    """

    def __init__(self, layer: nn.Module, name: str, ops: Ops, residency: str) -> None:
        self.layer = layer
        self.name = name
        self.ops = ops
        self.residency = residency
        self.columns: Columns | None = None
        self.held = Held()
        self.left_behind = False  # whether the weight was sharded while it held adapted columns, and still has them
        self.changes = 0  # changes of the deltas that torch cannot tell from their tensors
        self._planned: _Planned | None = None
        self.suspect: int | None = None  # number of an optimizer that may have changed the deltas without a trace
        self._seen: int | None = None  # id of the weight last used

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _seen=None, _planned=None)

    @property
    def parameter(self) -> Tensor:
        """The weight in its layer's own layout."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, (out,)."""
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return bias

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in); a transposed view for Conv1D."""
        return self.oriented(self.parameter)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pretrained values."""
        return self.parameter.dtype

    def fingerprint(self, index: Tensor) -> str:
        """Identify the pretrained weight by some of its columns."""
        return fingerprint(self.pretrained_columns(index), self.matrix.shape[1])

    @property
    def chosen(self) -> ColumnSet | None:
        """Which columns train, once that is planned."""
        return self.columns

    def oriented(self, weight: Tensor) -> Tensor:
        """Turn (out, in) into the layer's own layout, or back."""
        return weight.t() if isinstance(self.layer, Conv1D) else weight

    def shaped(self, matrix: Tensor) -> Tensor:
        """The matrix whose columns train as (out, in), which it is."""
        return matrix

    @property
    def is_adapted(self) -> bool:
        """Whether the weight holds adapted columns now."""
        return self.held.key is not None or self.left_behind

    def ready(self, adapters: Sequence[Adapter]) -> bool:
        """Whether all values are there: tensors wait on the meta device until they are loaded."""
        if self.parameter.is_meta:
            return False
        return not any([adapter.delta.is_meta or adapter.index.is_meta for adapter in adapters])

    # ------------------------------------------------------------------ write

    def is_fresh(self, adapters: Sequence[Adapter]) -> bool:
        """Whether a resident weight holds these adapters as they are now, as far as torch can tell.

        After an optimizer step that may have changed them without a trace the values themselves decide.
        """
        if not self._is_written(adapters):
            return False
        if self.suspect is not None:
            if not self.holds(adapters):
                self.changes += 1
                return False
            self.suspect = None
        return True

    def _is_written(self, adapters: Sequence[Adapter]) -> bool:
        return self.held.key is not None and self.held.key == self._key(adapters)

    def plan(self, adapters: Sequence[Adapter]) -> None:
        """Keep the pretrained columns of these adapters, unless that is done already."""
        weight = self.look_at_weight()
        if is_sharded(weight):
            return  # the next forward sees the whole weight
        self._refuse_second_holder(weight)
        if self.columns is not None and self.columns.base.dtype != weight.dtype:
            self.columns.base = self.columns.base.to(weight.dtype)  # the layer alone was cast
        if self.columns is None or not self.columns.covers(adapters, weight):
            self._turn_to(adapters)

    def _turn_to(self, adapters: Sequence[Adapter]) -> None:
        """Plan for other adapters; where they train the same columns, the weight is left to be written over."""
        before = self.columns

        def pretrained(index: Tensor) -> Tensor:
            if before is not None and not self.left_behind and before.has(index):
                return before.base
            self.restore()
            return self.matrix.detach().index_select(1, index)

        self.columns = Columns(adapters, pretrained, self.ops.runs_to_slice)
        self._copy_frozen()

    def _copy_frozen(self) -> None:
        """Let the backend copy the columns that do not train, if it multiplies with such a copy."""
        columns, ops = self.columns, self.ops
        if columns is None or ops.copy_frozen is None or self.residency != "resident":
            return
        with torch.inference_mode(False), torch.no_grad():
            columns.products = products = ops.copy_frozen(self.matrix.detach(), columns.index)
        if products is not None:
            columns.ops = replace(ops, forward=products.forward, grad_input=products.grad_input)
        else:
            columns.ops = None

    def step_ops(self, training: bool) -> Ops:
        """The operations of a forward and its backward; in evaluation always those that read the weight itself."""
        if training and self.residency == "resident" and self.columns is not None and self.columns.ops is not None:
            return self.columns.ops
        return self.ops

    def column_write(self, adapters: Sequence[Adapter]) -> ColumnWrite:
        """What is to be written to the weight; after `plan`."""
        columns = self.columns
        assert columns is not None
        delta, scale = columns.combined(adapters)
        weight = self.parameter
        write = ColumnWrite(self.oriented(weight), columns.index, columns.base, delta.detach(), scale, columns.first)
        self._planned = _Planned(weight, weight.data_ptr(), adapters, write) if len(adapters) == 1 else None
        return write

    def planned(self, adapters: Sequence[Adapter]) -> ColumnWrite | None:
        """Return the last write again if all that it was made of is as it was, so that most steps need no plan."""
        last, columns = self._planned, self.columns
        if last is None or last.adapters is not adapters or columns is None:
            return None
        weight, write, delta = self.parameter, last.write, adapters[0].delta
        lasts = (
            weight is last.weight
            and weight.data_ptr() == last.address
            and weight.dtype == write.base.dtype
            and _holders.get(last.address) is self
            and columns.base is write.base
            and columns.covers(adapters, weight)
            and delta.data_ptr() == write.delta.data_ptr()
            and delta.dtype == write.delta.dtype
        )
        return write if lasts else None

    def mark_written(self, adapters: Sequence[Adapter]) -> None:
        """Note that the weight holds these adapters."""
        self.held.key, self.suspect = self._key(adapters), None
        address = self.parameter.data_ptr()
        if _holders.get(address) is not self:
            _holders[address] = self

    def _key(self, adapters: Sequence[Adapter]) -> object:
        """Say what the weight would hold if it were written now: equal keys mean equal contents."""
        weight = self.parameter
        return self.changes, weight.data_ptr(), weight.dtype, *[adapter.key() for adapter in adapters]

    def _refuse_second_holder(self, weight: Tensor) -> None:
        """Keep two layers from writing one memory: each would take the other's columns for pretrained ones.

        Raises:
            ValueError: naming both; ties that are there when adapters are made are found then, and swap.
        """
        address = weight.data_ptr()
        other = _holders.get(address)
        if other is None or other is self or not address or self.residency == "swap":
            return
        if other.held.key is not None and other.parameter.data_ptr() == address:
            raise ValueError(
                f"{self.name} and {other.name} share the memory of one weight, which {other.name} keeps its columns in "
                "already (weights were tied after the adapter was made, or two models share them); give each its own "
                "copy, or make the adapters with residency='swap'"
            )

    def look_at_weight(self) -> Tensor:
        """Leave residency when the weight turns out to be sharded: it then holds the columns for a moment only.

        Returns the weight in its layer's own layout.
        """
        weight = self.parameter
        replaced = self._seen is not None and self._seen != id(weight)
        self._seen = id(weight)
        if self.residency == "resident" and (why := why_not_resident(weight, replaced)):
            warnings.warn(f"paca: {self.name}: {why}; its columns are swapped in around each GEMM", stacklevel=2)
            self.residency = "swap"
            self.left_behind, self.held.key = self.held.key is not None, None
        if self.left_behind:
            self._clean_shard()
        return weight

    @torch.no_grad()
    def _clean_shard(self) -> None:
        """Put the pretrained columns into a weight that was sharded while it held adapted ones.

        Only a shard can be written for good. While the weight is gathered it is looked up whether there is anything to
        do: an untrained adapter's columns are the pretrained ones.
        """
        assert self.columns is not None
        weight, base = self.parameter, self.columns.base
        if not is_sharded(weight):
            self.left_behind = not torch.equal(self.matrix.index_select(1, self.columns.index), base)
        elif hasattr(weight, "placements") and not isinstance(self.layer, Conv1D):  # rows are sharded alike in both
            from torch.distributed.tensor import distribute_tensor

            part = distribute_tensor(base, weight.device_mesh, weight.placements, src_data_rank=None)  # type: ignore[attr-defined]
            weight.to_local().index_copy_(1, self.columns.index, part.to_local())  # type: ignore[attr-defined]
            self.left_behind = False

    @torch.no_grad()
    def applied(self, x: Tensor, adapter: Adapter) -> Tensor:
        """Apply the layer with one adapter while it holds pretrained values, (…, in) to (…, out)."""
        base = self.pretrained_columns(adapter.index)
        with columns_in(self.matrix, adapter.index, base, adapter.delta, adapter.scale, self.ops) as weight:
            if torch.compiler.is_compiling():  # the columns are in a copy of the weight
                return self.ops.forward(x, self.shaped(weight), self.bias)
            y: Tensor = self.layer(x)
        return y

    # ------------------------------------------------------------------ check and undo

    def holds(self, adapters: Sequence[Adapter], rows: int | None = None, first: int = 0) -> bool:
        """Whether the weight's columns are what they should be, bit for bit; of every so manieth row if `rows`."""
        quick = rows is not None  # a look at everything trusts nothing that is remembered
        write = (self.planned(adapters) if quick else None) or self.column_write(adapters)
        weight, base, delta = write.weight, write.base, write.delta
        if rows is not None and rows < len(base):
            stride = math.ceil(len(base) / rows)
            weight, base, delta = (each[first % stride :: stride] for each in (weight, base, delta))
        found, wanted = weight.index_select(1, write.index), adapted_columns(base, delta, write.scale)
        return torch.equal(found, wanted) or torch.equal(found.nan_to_num(), wanted.nan_to_num())

    def check(self, adapters: Sequence[Adapter], rows: int | None = None, first: int = 0) -> None:
        """Compare the weight's columns with what they should be, bit for bit.

        Args:
            adapters: those that should be held.
            rows: look at this many rows only, spread over the weight; all by default.
            first: which rows those are changes with it.

        Raises:
            StaleColumnsError: if they differ although no change was seen. A change that was seen is written by the next
                forward and is no error.
        """
        if self.columns is None or not self.ready(adapters) or not self._is_written(adapters):
            return
        if not self.holds(adapters, rows, first):
            raise StaleColumnsError(
                f"{self.name}: the weight does not hold the adapter's columns. Its delta or its weight was changed in "
                "a way torch cannot see (.data, a custom kernel, an edit of a compiled model, or an optimizer that "
                "steps copies while the model runs compiled). Call paca.refresh(model) after such a change; edit base "
                "weights inside `with model.disable_adapter():`."
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Put the pretrained columns back, bit for bit.

        Raises:
            RuntimeError: if they are in a weight that cannot be written now.
        """
        if self.is_adapted:
            self.look_at_weight()
        if self.left_behind:
            raise RuntimeError(
                f"{self.name}: the weight was sharded while it held adapted columns, and cannot be restored now. "
                "Train a step or reshard the model first; or use residency='swap' for a model that will be sharded"
            )
        self.pretrained_into(self.parameter)
        self.held.key = None

    def leave(self) -> None:
        """Give the weight up as it is."""
        self.held.key = self.columns = None

    def forget(self) -> None:
        """Restore the weight, which may then be replaced, and plan anew."""
        self.restore()
        self.columns = self._seen = None

    def pretrained_into(self, weight: Tensor) -> None:
        """Write the pretrained columns to a tensor of the weight's layout."""
        if self.is_adapted and self.columns is not None:
            # The layer alone may have been cast while it was merged.
            self.oriented(weight).index_copy_(1, self.columns.index, self.columns.base.to(weight.dtype))

    def pretrained(self) -> Tensor:
        """Return the pretrained weight, (out, in); a copy if it holds adapted columns now."""
        weight = self.matrix.detach()
        if not self.is_adapted or self.columns is None:
            return weight
        return weight.index_copy(1, self.columns.index, self.columns.base.to(weight.dtype))

    def pretrained_columns(self, index: Tensor) -> Tensor:
        """Return a copy of some pretrained columns, (out, r), whatever the weight holds now."""
        columns = self.matrix.detach().index_select(1, index)
        if self.is_adapted and self.columns is not None:
            position = torch.searchsorted(self.columns.index, index).clamp(max=len(self.columns.index) - 1)
            kept = self.columns.index[position] == index
            columns = torch.where(kept, self.columns.base[:, position], columns)
        return columns

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the model."""
        self._seen = None
        if self.columns is not None:
            self.columns.apply(fn)
            self._copy_frozen()


class _Planned(NamedTuple):
    """A write, and what it was made of."""

    weight: Tensor  # in its layer's own layout
    address: int  # where its values were
    adapters: Sequence[Adapter]
    write: ColumnWrite


# Which weights hold adapted columns, by address.
_holders: WeakValueDictionary[int, AdaptedWeight] = WeakValueDictionary()


def is_sharded(weight: Tensor) -> bool:
    """Whether this is one rank's part of a weight (FSDP1, FSDP2, tensor parallel)."""
    kind = type(weight)
    if hasattr(weight, "_fsdp_flattened"):
        return True
    return kind not in (Tensor, nn.Parameter) and any(cls.__name__ == "DTensor" for cls in kind.__mro__)


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
