"""Keeps resident columns in step with their deltas: written once after each optimizer step, checked before the next.

No single signal tells that a tensor changed. Fused and 8-bit optimizers do not raise its version count; DeepSpeed steps
flat copies and writes the model's tensors later; `.data` edits leave no trace. So three are used together: torch's
global optimizer hook writes the layers whose deltas the optimizer owns, and where it owns none it *suspects* the layers
that wait for a step; each forward compares a key made of versions and addresses, of a suspected layer the values, and
writes if they differ (`PacaLayer.sync`); and a spot check before each step compares the weight itself with what it
should hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from paca.backend import Ops
from paca.strategies import ColumnWrite

if TYPE_CHECKING:
    from paca.columns import AdaptedWeight, Adapter
    from paca.layer import PacaLayer
    from paca.schedule import Schedule

ROWS_PER_CHECK = 8


class _Other(NamedTuple):
    """An optimizer that owns no delta."""

    number: int
    own_steps: int  # how often optimizers of deltas had stepped when it stepped last


_layers: WeakSet[PacaLayer] = WeakSet()
_steps = count()
_own_steps = 0  # of optimizers that own deltas
_others: WeakKeyDictionary[Optimizer, _Other] = WeakKeyDictionary()  # those that stepped and own none
_numbers = count()
_waiting: list[PacaLayer] | None = None  # layers to be written together, inside `one_write`
_hooked = False


def watch(layer: PacaLayer) -> None:
    """Keep a layer's columns fresh from now on; deep copies and unpickled layers call it too."""
    global _hooked
    if not _hooked:  # not at import: a process that never adapts a model pays nothing
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True
    _layers.add(layer)


def forget(layer: PacaLayer) -> None:
    """Leave a layer's weight alone from now on."""
    _layers.discard(layer)


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Write every adapted column again from its delta.

    Needed only where values were changed behind torch's back: `.data` edits, custom kernels, or edits of a model that
    runs compiled.
    """
    write_changed(_paca_layers(model))


@torch.no_grad()
def verify(model: nn.Module) -> None:
    """Check that every resident weight holds exactly the columns that its deltas ask for.

    Raises:
        StaleColumnsError: if one does not; the message names the layer.
    """
    for layer in _paca_layers(model):
        layer.check_columns()


def write_changed(layers: Iterable[PacaLayer]) -> None:
    """Write columns whose deltas may have changed without a trace; a backward of an earlier forward is refused then."""
    layers = list(layers)
    for layer in layers:
        layer.adapted.changes += 1
    write(layers)


@contextmanager
def one_write() -> Iterator[None]:
    """Collect the writes of a block and do them at its end, those of one backend in one call."""
    global _waiting
    if _waiting is not None:
        yield
        return
    _waiting = []
    try:
        yield
    finally:
        layers, _waiting = _waiting, None
        write(layers)


def write(layers: Iterable[PacaLayer]) -> None:
    """Write the columns of many layers, those of one backend in one call."""
    if _waiting is not None:
        _waiting.extend(layers)
        return
    by_ops: dict[Ops, list[tuple[AdaptedWeight, Sequence[Adapter], ColumnWrite]]] = {}
    for layer in layers:
        adapters = layer.held_adapters()
        planned = layer.planned_write(adapters)
        if planned is not None:
            by_ops.setdefault(layer.adapted.ops, []).append((layer.adapted, adapters, planned))
    for ops, group in by_ops.items():
        ops.end_graph()
        ops.write_columns([planned for _, _, planned in group])
        ops.end_graph()
        for adapted, adapters, _ in group:
            adapted.mark_written(adapters)


def _paca_layers(model: nn.Module) -> list[PacaLayer]:
    from paca.layer import PacaLayer

    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _owned(optimizer: Optimizer) -> list[PacaLayer]:
    parameters = _parameters(optimizer)
    return [layer for layer in list(_layers) if not parameters.isdisjoint(map(id, _deltas(layer)))]


def _deltas(layer: PacaLayer) -> Iterable[Tensor]:
    """Give the deltas as they are stored; the dictionary's own `values` looks each of them up by its name."""
    return layer.paca_delta._parameters.values()  # type: ignore[return-value]


def _scheduled(optimizer: Optimizer, layers: Iterable[PacaLayer]) -> list[tuple[Schedule, list[PacaLayer]]]:
    """List the schedules of the deltas that an optimizer trains, each with its layers, in the order of their names."""
    found: dict[int, tuple[Schedule, list[PacaLayer]]] = {}
    layers = sorted((layer for layer in layers if layer.schedules), key=lambda layer: layer.name)
    parameters = _parameters(optimizer) if layers else set()
    for layer in layers:
        for schedule in layer.schedules:
            name = schedule.adapter
            if name in layer.active_adapters and name in layer.paca_delta and id(layer.paca_delta[name]) in parameters:
                found.setdefault(id(schedule), (schedule, []))[1].append(layer)
    return list(found.values())


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _layers:
        return
    step = next(_steps)
    owned = _owned(optimizer)
    # An optimizer that owns no delta may step copies of them: what was trained since its last step is looked at.
    layers = owned or [layer for layer in _layers if any(d.grad is not None for d in _deltas(layer))]
    mine = _others[optimizer].number if optimizer in _others else None
    for layer in layers:
        # What another optimizer may have changed is looked at by the next forward.
        due = layer.steps_per_check and step % layer.steps_per_check == 0
        if due and layer.adapted.suspect in (None, mine):
            layer.check_columns(rows=ROWS_PER_CHECK, first=step)
    for schedule, trained in _scheduled(optimizer, owned):
        schedule.before_step(optimizer, trained)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _own_steps
    if not _layers:
        return
    layers = _owned(optimizer)
    for schedule, trained in _scheduled(optimizer, layers):
        schedule.after_step(optimizer, trained)
    if layers:
        _own_steps += 1
        write_changed(layers)
        for layer in layers:
            layer.adapted.held.settled = True
    else:
        _suspect(optimizer)


def _suspect(optimizer: Optimizer) -> None:
    """Let layers look at values that an optimizer may have changed by way of copies.

    One that trains something else beside an optimizer of the deltas, such as another model's, costs nothing: a layer
    that had its step and no gradient since is left alone. Gradients of compiled code and replayed graphs go unseen, so
    it is looked at, too, where the same optimizer steps again and none of the deltas' own did.
    """
    other = _others.get(optimizer)
    again = other is not None and other.own_steps == _own_steps
    other = _others[optimizer] = _Other(other.number if other else next(_numbers), _own_steps)
    for layer in list(_layers):
        waits = again or not layer.adapted.held.settled
        if waits and layer.adapted.suspect is None and any(d.requires_grad for d in _deltas(layer)):
            layer.adapted.suspect = other.number
