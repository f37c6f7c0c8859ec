"""Follows the memory of a computation on shapes alone: every tensor's storage, from its making to its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Storage:
    """One block of memory; moments are counted in operations, `died` is None while it lives."""

    bytes: int
    kind: str
    born: int
    died: int | None = None

    def lives(self, moment: int) -> bool:
        """Whether it takes memory at a moment."""
        return self.born <= moment and (self.died is None or moment < self.died)


class Meter(TorchDispatchMode):
    """Records the storages that operations make while it is entered; to be entered inside a `FakeTensorMode`.

    Lifetimes are those of the real computation: autograd and Python hold fake tensors as they hold real ones.

    Args:
        kind_of: names the kind of a tensor that an operation has made.
    """

    def __init__(self, kind_of: Callable[[Tensor], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind_of = kind_of
        self.storages: list[Storage] = []
        self.moment = 0
        self._known: dict[int, tuple[weakref.ref[Any], Storage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and record what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.record(leaf)
        self.moment += 1
        return result

    def record(self, tensor: Tensor, kind: str | None = None) -> None:
        """Record a tensor's storage if it is new; a `kind` that is given wins over what was said before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            if kind is not None:
                self._known[address][1].kind = kind
            return
        entry = Storage(storage.nbytes(), kind or self.kind_of(tensor), self.moment)

        def end(_: Any) -> None:
            entry.died = self.moment
            del self._known[address]

        self._known[address] = weakref.ref(storage, end), entry
        self.storages.append(entry)

    def living(self) -> Iterator[Storage]:
        """All storages that live now."""
        return (entry for _, entry in list(self._known.values()))

    def peak(self, first: int, last: int) -> int:
        """The moment from `first` to `last` at which most memory is in use."""
        changes: dict[int, int] = {}
        for entry in self.storages:
            if entry.died is not None and entry.died <= first:
                continue
            start = max(entry.born, first)
            changes[start] = changes.get(start, 0) + entry.bytes
            if entry.died is not None:
                changes[entry.died] = changes.get(entry.died, 0) - entry.bytes
        best, highest, total = first, -1, 0
        for moment in sorted(moment for moment in changes if moment <= last):
            total += changes[moment]
            if total > highest:
                best, highest = moment, total
        return best

    def use_at(self, moment: int) -> dict[str, int]:
        """Bytes of each kind at a moment."""
        use: dict[str, int] = {}
        for entry in self.storages:
            if entry.lives(moment):
                use[entry.kind] = use.get(entry.kind, 0) + entry.bytes
        return use
