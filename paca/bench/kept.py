"""Counts the bytes that a forward keeps for its backward: exact, and the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paca.bench.result import Kept
from paca.layer import PacaLayer


def count_kept(forward: Callable[[], Tensor], model: nn.Module, layer: nn.Module) -> Kept:
    """Run a forward and count what stays alive for its backward.

    Every tensor that autograd saves counts with its whole storage, since a saved view keeps all of it; a storage counts
    once however often it is saved. Tensors that an autograd function holds on its context without telling autograd
    count too. The model's own parameters and buffers do not, nor a backend's copies of weights: they live anyway.

    Args:
        forward: returns a tensor with a graph.
        model: whose own tensors are left out.
        layer: one of its layers; what it saves first is counted apart.
    """
    living = [*model.parameters(), *model.buffers(), *_copies_of_weights(model)]
    own = {_address(part) for tensor in living for part in _dense_parts(tensor)}
    # Bytes by address: the graph holds this function, so a tensor held here that knows its graph would never be freed,
    # since Python does not see such cycles. For the same reason the graph is given tensors that do not know it.
    saved: dict[int, int] = {}
    saved_by_layer: dict[int, int] = {}
    inside = False

    def note(tensor: Tensor) -> Tensor:
        for part in _dense_parts(tensor):
            address = _address(part)
            if address not in own and address not in saved:
                saved[address] = part.untyped_storage().nbytes()
                if inside:
                    saved_by_layer[address] = saved[address]
        return tensor.detach()

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    hooks = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward()
    finally:
        for hook in hooks:
            hook.remove()
    for tensor in _held_on_contexts(output):
        note(tensor)
    return Kept(total=sum(saved.values()), layer=sum(saved_by_layer.values()))


def _copies_of_weights(model: nn.Module) -> Iterator[Tensor]:
    for layer in model.modules():
        columns = layer.adapted.columns if isinstance(layer, PacaLayer) else None
        if columns is not None and columns.products is not None:
            yield from columns.products.tensors


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what a tensor's values lie in; a sparse one (SHiRA's) has no storage of its own."""
    return (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else (tensor,)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _held_on_contexts(output: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that autograd functions written in Python hold as attributes of their context."""
    queue: list[Any] = [output.grad_fn]
    seen = set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        queue.extend(following for following, _ in node.next_functions)
        yield from _tensors(list(getattr(node, "__dict__", {}).values()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
