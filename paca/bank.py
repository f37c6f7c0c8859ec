"""A bank of adapters for one model: kept in host memory, swapped into its weights in place, undone bit for bit."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca.columns import why_not_resident
from paca.errors import BaseMismatchError
from paca.fingerprint import fingerprint, mismatch
from paca.layer import in_out_features
from paca.quantised import library_of
from paca.registry import get_backend
from paca.saved import SavedAdapter, SavedLayer, read_adapter
from paca.select import checked_columns
from paca.strategies import ColumnSwitch, ColumnWrite, switch_scatter


@dataclass(frozen=True)
class _Ready:
    """One layer's columns beside its weight, ready to be written."""

    write: ColumnWrite
    key: bytes  # equal for equal column numbers
    columns: frozenset[int] | None  # None for a mask, whose entries are too many to look through
    address: int  # of the weight's memory when this was made


def _switch(old: _Ready | None, new: _Ready | None) -> ColumnSwitch:
    """Say what a change of adapters does to one weight: what the new one overwrites anyway is not restored."""
    if old is None or new is None:
        return ColumnSwitch(old.write if old else None, new.write if new else None, apart=True)
    if old.key == new.key:
        return ColumnSwitch(None, new.write, apart=True)
    apart = old.columns is not None and new.columns is not None and old.columns.isdisjoint(new.columns)
    return ColumnSwitch(old.write, new.write, apart)


class AdapterBank:
    """Serves many adapters from one copy of a base model, one at a time.

    The model stays what it is: its own layers, its own forward, graphs captured or compiled from it. A swap writes the
    columns of the new adapter, and puts pretrained values into those of the old one that the new one does not train.
    Adapters of one seed train the same columns, and nothing is restored between them. For inference only: to train, or
    to mix adapters in a batch, use PEFT.

        bank = paca.AdapterBank(model, on_device=8)
        bank.load("law", "adapters/law")       # into host memory, checked against this model
        bank.prefetch("law")                   # to the model's device, before it is needed
        bank.swap("law")                       # the model is the adapted one now
        with bank.using("poems"):              # and back
            ...
        bank.swap(None)                        # the pretrained bits

    Args:
        model: a base model without PEFT layers.
        on_device: how many adapters may wait beside the weights; the least recently used leaves. None: no limit.
        pin_memory: keep host copies in page-locked memory, so that an accelerator fetches them without waiting.

    Raises:
        ValueError: if the model has adapters already, the limit is below 1, or memory is to be pinned for a CPU.
    """

    def __init__(self, model: nn.Module, on_device: int | None = None, pin_memory: bool = False) -> None:
        if taken := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
            raise ValueError(f"a bank works on the base model, and {taken[0]} has an adapter; unload() it first")
        if pin_memory and all(parameter.device.type == "cpu" for parameter in model.parameters()):
            raise ValueError(
                "pin_memory is for models on an accelerator; this one is on the CPU, where nothing is fetched"
            )
        if on_device is not None and on_device < 1:
            raise ValueError(f"on_device must be at least 1, found {on_device}")
        self.model = model
        self.on_device = on_device
        self.pin_memory = pin_memory
        self._ops = get_backend().ops
        self._modules = dict(model.named_modules())
        self._host: dict[str, SavedAdapter] = {}
        self._ready: OrderedDict[str, dict[str, _Ready]] = OrderedDict()  # the least recently used first
        self._active: str | None = None

    @property
    def active(self) -> str | None:
        """The adapter that the model holds, None for the base model."""
        return self._active

    @property
    def names(self) -> list[str]:
        """All loaded adapters."""
        return list(self._host)

    @property
    def prefetched(self) -> list[str]:
        """Those that wait beside the weights, the least recently used first."""
        return list(self._ready)

    def load(self, name: str, adapter: str | os.PathLike[str] | SavedAdapter) -> None:
        """Read an adapter into host memory and check it against the model; nothing of the model changes.

        Args:
            name: what to call it.
            adapter: a folder written by `save_pretrained`, or what `paca.saved.read_adapter` gave.

        Raises:
            ValueError: if the name is taken, or the adapter does not fit: another layer or shape, a tied weight, or
                tensors that are no columns (`modules_to_save`, biases).
            BaseMismatchError: if it was made for another base model.
        """
        refuse_held(self.model, besides=self)
        if name in self._host:
            raise ValueError(f"the bank has an adapter {name!r} already; remove() it first or choose another name")
        saved = adapter if isinstance(adapter, SavedAdapter) else read_adapter(adapter)
        saved.refuse_others("a bank")
        if self._host and saved.config.masked != self._masked:
            held, found = ("masks", "columns") if self._masked else ("columns", "a mask")
            raise ValueError(f"the bank holds adapters of {held}, and {name!r} is of {found}; use another bank")
        memory = Counter(p.data_ptr() for _, p in self.model.named_parameters(remove_duplicate=False))
        for layer_name, layer in saved.layers.items():
            self._check(layer_name, layer, saved, memory)
        self._host[name] = _pinned(saved) if self.pin_memory else saved

    def prefetch(self, name: str) -> None:
        """Bring an adapter to the model's device and look up the pretrained columns it will replace.

        Raises:
            KeyError: if it is not loaded.
        """
        if name in self._ready:
            self._ready.move_to_end(name)
            return
        self._refuse_unknown(name)
        refuse_held(self.model, besides=self)
        with torch.no_grad():
            self._ready[name] = {
                layer_name: self._make_ready(layer_name, layer) for layer_name, layer in self._host[name].layers.items()
            }
        while self.on_device is not None and len(self._ready) > self.on_device:
            oldest = next((other for other in self._ready if other not in (name, self._active)), None)
            if oldest is None:
                break  # the one in use and the next one are both needed for the swap
            self.evict(oldest)

    @torch.no_grad()
    def swap(self, name: str | None) -> None:
        """Make the model hold this adapter, or None: the pretrained weights.

        Raises:
            KeyError: if it is not loaded.
            RuntimeError: if the model's weights were moved or replaced since the adapters were prefetched, or another
                bank of the model has an adapter in them.
        """
        if name == self._active:
            return
        refuse_held(self.model, besides=self)
        if name is not None:
            self.prefetch(name)
        old = self._ready[self._active] if self._active is not None else {}
        new = self._ready[name] if name is not None else {}
        self._refuse_moved(old)
        self._refuse_moved(new)
        # Kernels that write columns are made for few of them, and many rows; a mask has many in one.
        switch = switch_scatter if self._masked else self._ops.switch_columns
        changes = [_switch(old.get(layer), new.get(layer)) for layer in dict.fromkeys([*old, *new])]
        self._ops.end_graph()  # else the writes would be part of the graph of what runs before or after them
        switch(changes)
        self._ops.end_graph()
        before, self._active = self._active, name
        if name is None:
            _holding.pop(id(self.model), None)
        else:
            _holding[id(self.model)] = self
        if before is not None and self.on_device is not None and len(self._ready) > self.on_device:
            self.evict(before)

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Swap an adapter in for a block, and the one before back after it; gives the model."""
        before = self._active
        self.swap(name)
        try:
            yield self.model
        finally:
            self.swap(before)

    def evict(self, name: str) -> None:
        """Free an adapter's memory on the device; its host copy stays.

        Raises:
            ValueError: if the model holds it now.
        """
        self._refuse_active(name)
        self._ready.pop(name, None)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            KeyError, ValueError: if it is not loaded, or the model holds it now.
        """
        self._refuse_unknown(name)
        self.evict(name)
        del self._host[name]

    def device_bytes(self) -> int:
        """Count what prefetched adapters take beside the weights, shared tensors once."""
        tensors = {
            t.data_ptr(): t.numel() * t.element_size()
            for layers in self._ready.values()
            for ready in layers.values()
            for t in (ready.write.index, ready.write.base, ready.write.delta)
        }
        return sum(tensors.values())

    # ------------------------------------------------------------------ checks and preparation

    def _check(self, name: str, layer: SavedLayer, saved: SavedAdapter, memory: Counter[int]) -> None:
        module = self._modules.get(name)
        if module is None:
            raise ValueError(f"the adapter trains {name}, and the model has no such module: it is for another model")
        try:
            width, rows = in_out_features(module)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from None
        if saved.config.masked:
            width, rows = width * rows, 1
        checked_columns(layer.index, width, name)
        if len(layer.delta) != rows:
            raise ValueError(f"{name} has {rows} outputs, the adapter's deltas have {len(layer.delta)}")
        weight = _parameter(module)
        why = "it is tied to another module's" if memory[weight.data_ptr()] > 1 else why_not_resident(weight)
        if library_of(module) is not None:
            why = "it is quantised"
        if saved.config.masked and not weight.is_contiguous():
            why = "it is not contiguous in memory"
        if why:
            raise ValueError(f"the weight of {name} cannot hold columns: {why}; load the adapter with PEFT instead")
        expected = (saved.config.base_fingerprint or {}).get(name) if saved.config.check_base else None
        matrix = _matrix(module, saved.config.masked)
        found = fingerprint(self._pretrained_columns(name, matrix, layer.index.to(weight.device)), width)
        if expected and (difference := mismatch(expected, found)):
            raise BaseMismatchError(f"{name}: the adapter was made for another base model: {difference}")

    def _make_ready(self, name: str, layer: SavedLayer) -> _Ready:
        if self.model.get_submodule(name) is not self._modules[name]:
            raise RuntimeError(f"{name} was replaced since the bank was made, or has an adapter; make another bank")
        weight = _parameter(self._modules[name])
        key = layer.index.numpy().tobytes()
        columns = None if self._masked else frozenset(layer.index.tolist())
        others = [layers[name] for layers in self._ready.values() if name in layers]
        twin = next((o.write for o in others if (o.key, o.address) == (key, weight.data_ptr())), None)
        index = twin.index if twin else layer.index.to(weight.device, non_blocking=True)
        matrix = _matrix(self._modules[name], self._masked)
        base = twin.base if twin else self._pretrained_columns(name, matrix, index)
        delta = layer.delta.to(weight.device, non_blocking=True)
        return _Ready(ColumnWrite(matrix, index, base, delta, layer.scale), key, columns, weight.data_ptr())

    def _pretrained_columns(self, name: str, matrix: Tensor, index: Tensor) -> Tensor:
        """Return a copy of pretrained columns, (out, r), whatever the model holds now."""
        columns = matrix.index_select(1, index)
        held = self._ready[self._active].get(name) if self._active is not None else None
        if held is not None:
            position = torch.searchsorted(held.write.index, index).clamp(max=len(held.write.index) - 1)
            kept = held.write.index[position] == index
            columns = torch.where(kept, held.write.base[:, position], columns)
        return columns

    @property
    def _masked(self) -> bool:
        """Whether its adapters train single entries."""
        return any(saved.config.masked for saved in self._host.values())

    def _refuse_moved(self, layers: dict[str, _Ready]) -> None:
        for name, ready in layers.items():
            if _parameter(self._modules[name]).data_ptr() != ready.address:
                raise RuntimeError(
                    f"the weight of {name} was moved or replaced while adapters were prefetched; swap(None) before "
                    "moving the model, and evict() them"
                )

    def _refuse_unknown(self, name: str) -> None:
        if name not in self._host:
            raise KeyError(f"the bank has no adapter {name!r}; it has: {', '.join(self._host) or 'none'}")

    def _refuse_active(self, name: str) -> None:
        if name == self._active:
            raise ValueError(f"the model holds {name!r} now; swap(None) or another adapter in first")


# Which bank has an adapter in the weights of a model, by the model's id.
_holding: WeakValueDictionary[int, AdapterBank] = WeakValueDictionary()


def refuse_held(model: nn.Module, besides: AdapterBank | None = None) -> None:
    """Keep others off weights that hold a bank's adapter: they would take its columns for pretrained ones.

    Args:
        model: the base model.
        besides: the bank that asks, if one does.

    Raises:
        RuntimeError: naming the adapter.
    """
    bank = _holding.get(id(model))
    if bank is not None and bank is not besides and bank.model is model:
        raise RuntimeError(
            f"a bank has its adapter {bank.active!r} in this model's weights; call swap(None) on it first"
        )


def _parameter(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _matrix(module: nn.Module, masked: bool) -> Tensor:
    """The weight as (out, in), a transposed view for Conv1D; for masks as one row."""
    weight = _parameter(module).detach()
    if masked:
        return weight.view(1, -1)
    return weight.t() if isinstance(module, Conv1D) else weight


def _pinned(saved: SavedAdapter) -> SavedAdapter:
    layers = {
        name: SavedLayer(layer.index.pin_memory(), layer.delta.pin_memory(), layer.scale)
        for name, layer in saved.layers.items()
    }
    return SavedAdapter(saved.config, layers)
