"""Runs layers that read the same tensor together, so that their input gradients are summed inside the GEMMs.

A frozen model pays an addition of the size of X for each further layer that reads X: autograd sums the dX of q, k and
v, of gate and up. Here the first of them that is called computes for all, in one autograd node whose backward is

    dX = dY₁ W₁' + dY₂ W₂' + …     each product added by its GEMM (beta = 1)

The others find their output on X. They still run as modules, with their hooks; only the products are computed earlier.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from paca.linear import PacaLinears, Reader
from paca.select import shared_name

if TYPE_CHECKING:
    from paca.columns import Adapter
    from paca.layer import PacaLayer

logger = logging.getLogger("paca")

# So often in a row outputs may be left behind, as by a forward that runs out of memory, until layers run alone.
LEFT_BEHIND = 2
# What an activation remembers: its version and, by the layer's id, an output that is waiting to be collected.
_Waiting = tuple[object, dict[int, tuple[object, Tensor]]]


class SharedInput:
    """Layers of one module that are expected to read the same tensor.

    Args:
        layers: in any order; the first to be called computes for all.
    """

    def __init__(self, layers: Sequence[PacaLayer]) -> None:
        self.layers = tuple(layers)
        self.together = True  # until they turn out to read different tensors
        self._uncollected: set[int] = set()
        self._left_behind = 0  # how often in a row outputs were not collected
        self._cat: tuple[object, Tensor] | None = None

    def output(self, layer: PacaLayer, adapters: Sequence[Adapter], x: Tensor, cast_x: Tensor) -> Tensor | None:
        """Return a layer's output for `x`, (…, out), computing those of the others too; None if it must run alone.

        Args:
            layer: one of `layers`; its weight holds what it should.
            adapters: those that it runs with.
            x: what it was given, (…, in).
            cast_x: the same in the dtype of the GEMM.
        """
        if not self.together or type(x) is not Tensor or torch.compiler.is_compiling():
            return None
        now = x._version, x.data_ptr(), cast_x.dtype
        then, waiting = cast(_Waiting, getattr(x, "_paca_outputs", (None, {})))
        if then == now and id(layer) in waiting:
            key, y = waiting.pop(id(layer))
            self._uncollected.discard(id(layer))
            if not self._uncollected:
                self._left_behind = 0
            return y if key == layer.adapted.held.key else None
        if self._uncollected:  # of an earlier tensor: somebody read another one, or a forward ended in an error
            self._uncollected = set()
            self._left_behind += 1
            if self._left_behind >= LEFT_BEHIND:
                self.together = False
                logger.info("paca: %s does not read the same tensor as its neighbours, so each runs alone", layer.name)
                return None
        runs = {id(layer): adapters}
        for other in self.layers:
            if other is not layer:
                runs[id(other)] = other.held_adapters()
                other.sync(runs[id(other)])
            if not other.trains_resident(runs[id(other)], cast_x.device):
                return None
        outputs = self._run(cast_x, runs)
        mine = outputs.pop(id(layer))[1]
        self._uncollected = set(outputs)
        x._paca_outputs = (now, outputs)  # type: ignore[attr-defined]
        return mine

    def _run(self, x: Tensor, runs: Mapping[int, Sequence[Adapter]]) -> dict[int, tuple[object, Tensor]]:
        """Return each layer's key and output, by its id.

        Args:
            x: what they read, in the dtype of the GEMM.
            runs: the adapters of each, by its id.
        """
        readers: list[Reader] = []
        tensors: list[Tensor | None] = []
        ops = self.layers[0].adapted.ops
        index, starts = self._columns()
        xs = ops.gather(x.detach(), index)
        for layer, start in zip(self.layers, starts, strict=True):
            columns = layer.adapted.columns
            assert columns is not None
            delta, scale = columns.combined(runs[id(layer)])
            readers.append(Reader(layer.adapted.matrix, layer.adapted.held, scale, start, start + len(columns.index)))
            tensors += [layer.adapted.bias, delta]
        ys = PacaLinears.apply(x, xs, readers, ops, *tensors)  # type: ignore[no-untyped-call]
        keys = [layer.adapted.held.key for layer in self.layers]
        return {id(layer): (key, y) for layer, key, y in zip(self.layers, keys, ys, strict=True)}

    def _columns(self) -> tuple[Tensor, list[int]]:
        """Return the columns of all layers one after another, each set once, and where each layer's begin."""
        columns = [layer.adapted.columns for layer in self.layers if layer.adapted.columns is not None]
        sets = {each.key: each.index for each in columns}
        ends = accumulate(map(len, sets.values()), initial=0)
        starts = dict(zip(sets, ends, strict=False))  # the last end begins nothing
        first = next(iter(sets.values()))
        made_for = tuple(sets), first.device
        if self._cat is None or self._cat[0] != made_for:
            self._cat = made_for, first if len(sets) == 1 else torch.cat(list(sets.values()))
        return self._cat[1], [starts[each.key] for each in columns]


def share_inputs(layers: Iterable[tuple[str, PacaLayer]]) -> None:
    """Tell layers, given with their paths in the model, which others read the same input."""
    rows: dict[tuple[object, ...], list[PacaLayer]] = {}
    for name, layer in layers:
        if layer.residency != "resident":
            layer.shared_input = None
            continue
        row = shared_name(name), layer.in_features, layer.adapted.ops
        rows.setdefault(row, []).append(layer)
    for (_, _, ops), members in rows.items():
        together = len(members) > 1 and ops.grad_input_sum is not None  # type: ignore[attr-defined]
        shared = SharedInput(members) if together else None
        for layer in members:
            layer.shared_input = shared
