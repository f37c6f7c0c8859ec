"""Watches a training run on any machine for what a device that compiles graphs pays for.

Gaudi's lazy mode collects operations and compiles them when it meets a mark; a sequence that it has met before, with
the same shapes and data flow, is taken from a cache. `GraphRecorder` cuts the stream of torch operations at the same
marks and gives each piece a key, so that a piece with a new key is a compilation. It is a model of the vendor's bridge,
not the bridge: what is fused, and what the bridge caches beyond that, is not in it.

Numbers that are no sizes (a learning rate, a bias correction) are left out of the key, because the bridge passes most
of them as tensors.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from paca.layer import PacaLayer

READS_BACK = frozenset({"_local_scalar_dense", "item", "equal", "is_nonzero", "allclose"})
SIZED_BY_DATA = frozenset(
    {"nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
)
_INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
_WRITES = frozenset({"index_copy_", "scatter_", "index_put_", "_index_put_impl_", "copy_"})
# On the CPU no operation runs for these; a device stops and copies. Printing is hidden from the recorder on any device.
_PRINTS = Tensor.__repr__
_TO_HOST = frozenset({Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__, _PRINTS})
# Nothing runs for these.
_NAMES_ONLY = frozenset(
    {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}
)
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Operation:
    """One operation of a graph: its name, what it works on, and the line that asked for it."""

    name: str
    arguments: tuple[object, ...]
    where: str


@dataclass(frozen=True)
class Offence:
    """Something that stops the device or makes it compile again."""

    kind: str
    operation: str
    where: str


@dataclass
class Step:
    """One optimizer step: its graphs, how many of them were new, and which weights were written when."""

    graphs: list[list[Operation]] = field(default_factory=list)
    new: int = 0
    written: Counter[str] = field(default_factory=Counter)
    written_elsewhere: set[str] = field(default_factory=set)


class GraphRecorder(TorchDispatchMode):
    """Records the graphs of a training run, and what must not be in them.

    Use it around the training, call `cut` where the device would be told to run what it has, and `end_step` after each
    optimizer step.

    Args:
        model: the model that is trained; tensors that it holds and is given are on the device.
        warm_up: steps that may compile: 2 where the optimizer makes its state on the device in the first.

    Attributes:
        steps: what each finished step did.
        offences: what stopped the device or depended on data, in the order it was met.
    """

    def __init__(self, model: nn.Module, warm_up: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.offences: list[Offence] = []
        self.warm_up = warm_up
        self._model = model
        self._paused = False
        self._in_optimizer = False
        self._keys: set[int] = set()
        self._step = Step()
        self._graph: list[Operation] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[StorageWeakRef] = []
        self._on_device: dict[int, StorageWeakRef] = {}
        self._weights: dict[int, str] = {}

    # ------------------------------------------------------------------ the run

    @contextmanager
    def watching(self) -> Iterator[GraphRecorder]:
        """Record while the block runs; `end_graph` of the model's layers cuts, too."""
        layers = [module for module in self._model.modules() if isinstance(module, PacaLayer)]
        kept = [layer.adapted.ops for layer in layers]
        # Layers of one backend keep sharing their operations, so that they are still written in one call.
        cutting = {ops: replace(ops, end_graph=self._cut_as_well(ops.end_graph)) for ops in kept}
        for layer in layers:
            layer.adapted.ops = cutting[layer.adapted.ops]
        handles: list[Any] = [
            self._model.register_forward_pre_hook(self._note_inputs, with_kwargs=True),
            register_optimizer_step_pre_hook(lambda *_: self._enter_optimizer(True)),
            register_optimizer_step_post_hook(lambda *_: self._enter_optimizer(False)),
        ]
        self._look_at_model()
        try:
            with _HostReads(self._note_host_read), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            for layer, ops in zip(layers, kept, strict=True):
                layer.adapted.ops = ops

    def cut(self) -> None:
        """End the current graph."""
        if self._graph and not self._paused:
            key = hash(tuple((operation.name, operation.arguments) for operation in self._graph))
            self._step.new += key not in self._keys
            self._keys.add(key)
            self._step.graphs.append(self._graph)
        self._graph, self._numbers, self._alive = [], {}, []

    def end_step(self) -> None:
        """End the current graph and the current optimizer step."""
        self.cut()
        if not self._paused:
            self.steps.append(self._step)
        self._step = Step()
        self._on_device = {key: ref for key, ref in self._on_device.items() if not ref.expired()}

    def pause(self) -> None:
        """Record nothing from now on."""
        self._paused = True

    # ------------------------------------------------------------------ what was found

    @property
    def compilations(self) -> list[int]:
        """New graphs of each step."""
        return [step.new for step in self.steps]

    @property
    def recompilations(self) -> int:
        """New graphs after the warm-up."""
        return sum(self.compilations[self.warm_up :])

    def report(self) -> list[str]:
        """Lines for people: counts, then each thing to put right with its file and line."""
        steps = len(self.steps)
        graphs = sorted({len(step.graphs) for step in self.steps})
        syncs = sum(offence.kind in _STOPS for offence in self.offences)
        lines = [
            f"optimizer steps          {steps}",
            f"graphs a step            {' or '.join(map(str, graphs))}",
            f"compiled to warm up      {sum(self.compilations[: self.warm_up])}",
            f"compiled after that      {self.recompilations}",
            f"host syncs               {syncs}",
            f"data-dependent shapes    {len(self.offences) - syncs}",
            f"column writes            {self._say_writes()}",
        ]
        for offence, count in Counter(self.offences).items():
            lines.append(f"{offence.where}: {offence.kind} ({offence.operation}), {count} times")
        for number, step in enumerate(self.steps, 1):
            if step.new and number > self.warm_up:
                lines.append(f"step {number}: {step.new} new graphs; {self._first_difference(number)}")
        return lines

    @property
    def is_clean(self) -> bool:
        """Whether nothing was compiled after the warm-up, nothing stopped, and each weight was written once a step."""
        return not self.offences and not self.recompilations and not self._bad_writes()

    def _bad_writes(self) -> list[int]:
        """Give the steps in which a weight was not written exactly once, or not in the optimizer's step."""
        every = set(self._weights.values())
        return [
            number
            for number, step in enumerate(self.steps, 1)
            if step.written_elsewhere or step.written != Counter(dict.fromkeys(every, 1))
        ]

    def _say_writes(self) -> str:
        bad = self._bad_writes()
        weights = len(set(self._weights.values()))
        if not bad:
            return f"each of {weights} weights once a step, right after the optimizer"
        return f"not once a step, right after the optimizer, in steps {', '.join(map(str, bad[:5]))}"

    def _first_difference(self, number: int) -> str:
        before, now = self.steps[number - 2].graphs, self.steps[number - 1].graphs
        for old, new in zip(before, now, strict=False):
            for one, other in zip(old, new, strict=False):
                if (one.name, one.arguments) != (other.name, other.arguments):
                    return f"first at {other.where}: {_show(other)}, in the step before {_show(one)}"
            if len(old) != len(new):
                return f"a graph of {len(new)} operations, in the step before of {len(old)}"
        return f"{len(now)} graphs, in the step before {len(before)}"

    # ------------------------------------------------------------------ the stream of operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operation and run it."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_iter((args, kwargs))]
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        on_device = any(map(self._is_on_device, tensors))
        if on_device:
            self._judge(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        if on_device:
            made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
            for tensor in made:
                self._tag(tensor)
            if func not in _NAMES_ONLY:
                self._graph.append(Operation(str(func), (*map(self._sign, inputs),), _where()))
                for tensor in made:
                    self._sign(tensor)
        return out

    def _judge(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        kind = None
        if name in READS_BACK:
            kind = "host sync"
        elif name in SIZED_BY_DATA or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            kind = "shape that depends on data"
        elif name in _INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            kind = "boolean mask as an index"
        elif _copies_to_host(name, tensors, kwargs):
            kind = "copy to the host"
        if kind is not None:
            self.offences.append(Offence(kind, str(func), _where()))
            self.cut()  # the device runs what it has first
        if name in _WRITES and (weight := self._weights.get(_memory(tensors[0]))) is not None:
            self._step.written[weight] += 1
            if not self._in_optimizer:
                self._step.written_elsewhere.add(weight)

    def _note_host_read(self, func: Any, tensor: Tensor) -> None:
        # Where there is a device, the copy is an operation like any other.
        seen = tensor.device.type != "cpu" and func is not _PRINTS
        if not self._paused and not seen and self._is_on_device(tensor):
            self.offences.append(Offence("copy to the host", f"Tensor.{func.__name__}", _where()))
            self.cut()

    def _sign(self, value: object) -> object:
        """Say what a graph's key holds of an argument: which tensor of the graph, and its layout; or its value."""
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            number = self._numbers.get(storage._cdata)
            if number is None:
                number = self._numbers[storage._cdata] = len(self._numbers)
                self._alive.append(StorageWeakRef(storage))  # the address is not used again while the graph lasts
            return number, tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
        if isinstance(value, (float, complex)):
            return "number"
        return value if isinstance(value, (int, str, type(None))) else str(value)

    # ------------------------------------------------------------------ what is on the device

    def _is_on_device(self, tensor: Tensor) -> bool:
        if tensor.device.type not in ("cpu", "meta"):
            return True
        return tensor.untyped_storage()._cdata in self._on_device

    def _tag(self, tensor: Tensor) -> None:
        """Note that a tensor of the CPU stands for one of the device."""
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            self._on_device[storage._cdata] = StorageWeakRef(storage)

    def _look_at_model(self) -> None:
        """Note what the model holds. Columns are kept outside its parameters and buffers."""
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._tag(tensor)
        for layer in self._model.modules():
            if isinstance(layer, PacaLayer):
                for tensor in (
                    (layer.adapted.columns.index, layer.adapted.columns.base) if layer.adapted.columns else ()
                ):
                    self._tag(tensor)
                if layer.residency == "resident":
                    self._weights[_memory(layer.get_base_layer().weight)] = layer.name

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._weights or not self.steps:
            self._look_at_model()  # the Trainer may have moved it since
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._tag(tensor)

    def _enter_optimizer(self, entered: bool) -> None:
        self._in_optimizer = entered

    def _cut_as_well(self, end_graph: Callable[[], None]) -> Callable[[], None]:
        def end_and_cut() -> None:
            end_graph()
            self.cut()

        return end_and_cut


class _HostReads(TorchFunctionMode):
    """Tells of values that become the host's without an operation."""

    def __init__(self, tell: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Tell of the call if it is one, and make it."""
        # By name only: `x.to(y.device)` stays on the device, which the CPU stands for.
        if func in _TO_HOST or (func is Tensor.to and "cpu" in (*args[1:2], (kwargs or {}).get("device"))):
            self._tell(func, args[0])
        return func(*args, **(kwargs or {}))


_STOPS = frozenset({"host sync", "copy to the host"})


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _copies_to_host(name: str, tensors: list[Tensor], kwargs: Any) -> bool:
    if name == "_to_copy":
        target = kwargs.get("device")
        return target is not None and torch.device(target).type == "cpu" != tensors[0].device.type
    return name == "copy_" and len(tensors) > 1 and tensors[0].device.type == "cpu" != tensors[1].device.type


def _where() -> str:
    """File and line of the innermost caller outside torch and this module."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    file = frame.f_code.co_filename
    short = file.partition(f"site-packages{os.sep}")[2] or os.path.relpath(file)
    return f"{short if not short.startswith('..') else file}:{frame.f_lineno}"


def _show(operation: Operation) -> str:
    shapes = [str(list(part[1])) for part in operation.arguments if isinstance(part, tuple) and len(part) == 5]
    more = ", …" if len(shapes) > 4 else ""
    return f"{operation.name}({', '.join(shapes[:4])}{more})"
