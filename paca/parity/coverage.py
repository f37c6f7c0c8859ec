"""What there is to compare on this machine: backends, their strategies, graph modes and dtypes, from their own data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paca import registry
from paca.backend import Backend
from paca.parity.operations import OPERATIONS

# The dtypes that are compared where a backend's capabilities name them.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The fields of `Ops` that a layer with a dense weight uses; the rest is for quantised ones, and no case has such.
OF_DENSE_LAYERS = frozenset({*OPERATIONS, "runs_to_slice", "end_graph"})
WRITES = frozenset({"write_columns", "switch_columns"})


@dataclass(frozen=True)
class Configuration:
    """One way to run one backend."""

    backend: str
    strategies: tuple[tuple[str, str], ...]  # kind, name; of every kind but graph
    graph: str
    changed: str  # the kind that is not the default, "" for none
    default_graph: bool

    def make(self) -> Backend:
        """Return the backend set up this way; the one in use is left alone."""
        with registry.use_backend(self.backend, **dict(self.strategies), graph=self.graph) as backend:
            return backend

    @property
    def strategy(self) -> str:
        """Name what differs from the defaults."""
        return f"{self.changed}={dict(self.strategies)[self.changed]}" if self.changed else "defaults"


@dataclass(frozen=True)
class OperationChoice:
    """One strategy for one tensor operation of a backend."""

    backend: str
    field: str  # of Ops
    kind: str
    name: str


def chosen_backends(names: Sequence[str]) -> dict[str, str | None]:
    """Return backends with the reason why this machine cannot use them, or None.

    Args:
        names: those wanted; all that are known if empty.

    Raises:
        ValueError: if one is not known.
        BackendUnavailableError: if one that was named cannot be used: nothing that was asked for is skipped.
    """
    if not names:
        return registry.available_backends()
    for name in names:
        with registry.use_backend(name):
            pass
    return dict.fromkeys(names)


def configurations(name: str) -> Iterator[Configuration]:
    """List the ways to run a backend: its defaults, then each other strategy in turn, in every graph mode.

    Strategies that only write columns come once: no graph holds a write. Left out are those that choose nothing that a
    layer with a dense weight does (the forms of quantised bases), because nothing here is quantised, and those that
    multiply a rounded copy of the weight (`Ops.copy_frozen`), because their numbers are others on purpose.
    """
    with registry.use_backend(name) as backend:
        defaults = {kind: choice for kind, choice in backend.strategies.items() if kind != "graph"}
        modes = [mode.value for mode in backend.capabilities.graph_modes]
        choices = backend.choices
    alternatives = [("", defaults)] + [
        (kind, defaults | {kind: other})
        for kind, known in choices.items()
        for other, sets in known.items()
        if other != defaults[kind] and not _rounds_weights(sets)
    ]
    for mode, (kind, strategies) in itertools.product(modes, alternatives):
        fields = {field for how in choices[kind].values() for field in how} if kind else set(OF_DENSE_LAYERS)
        if not fields.isdisjoint(OF_DENSE_LAYERS) and (fields - WRITES or mode == modes[0]):
            yield Configuration(name, tuple(strategies.items()), mode, kind, mode == modes[0])


def operation_choices(name: str) -> Iterator[OperationChoice]:
    """List every strategy that a backend has for each tensor operation."""
    with registry.use_backend(name) as backend:
        for kind, known in backend.choices.items():
            for choice, sets in known.items():
                for field in filter(OPERATIONS.__contains__, sets):
                    if sets[field] is not None and not _rounds_weights(sets):
                        yield OperationChoice(name, field, kind, choice)
        named = {field for known in backend.choices.values() for how in known.values() for field in how}
        for field in OPERATIONS:
            if field not in named and getattr(backend.ops, field) is not None:
                yield OperationChoice(name, field, "", "the only one")


def _rounds_weights(sets: Mapping[str, Any]) -> bool:
    """Whether a strategy, given by the fields that it sets, multiplies a rounded copy of the weight."""
    return sets.get("copy_frozen") is not None


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """List the dtypes that are compared and that a backend says it computes in."""
    with registry.use_backend(name) as backend:
        return tuple(dtype for dtype in DTYPES if dtype in backend.capabilities.dtypes)
