"""Replays a training step from CUDA graphs, so that a small batch does not wait for Python to launch its kernels.

The first calls of a model with some shapes run as usual; then forward and backward are captured, each as one graph, and
from there on replayed. Columns are written into the weights in place, so a replay reads what the last optimizer step
wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils import _pytree as pytree

from paca_cuda.ops import counting_with, graph_counters

logger = logging.getLogger("paca")

WARM_UP = 3  # calls before a capture: allocators, autotuners and lazy initialisations settle
MOST_GRAPHS = 4  # of different shapes; each keeps the activations of a step

_Tensors = list[Tensor | None]
# Runs a function once while recording it; returns what it returned, and what runs it again and returns that anew.
Record = Callable[[Callable[[], _Tensors]], tuple[_Tensors, Callable[[], _Tensors]]]


def record_cuda_graph(function: Callable[[], _Tensors]) -> tuple[_Tensors, Callable[[], _Tensors]]:
    """Capture a function as a CUDA graph, which writes to the same tensors each time; all share one pool of memory."""
    graph = torch.cuda.CUDAGraph()
    pool, counters = _pool(), graph_counters()
    try:
        with torch.cuda.graph(graph, pool=pool), counting_with(counters):
            outputs = function()
    except Exception:
        _abandon(pool)
        raise

    def replay() -> _Tensors:
        graph.replay()
        return outputs

    replay.counters = counters  # type: ignore[attr-defined]  # which the graph writes to, and does not keep alive
    return outputs, replay


def _pool() -> Any:
    if not _pools:
        _pools.append(torch.cuda.graph_pool_handle())
    return _pools[0]


def _abandon(pool: Any) -> None:
    """Let the next capture have another pool.

    After a capture that CUDA refused, torch's allocator still takes it to be going on: it would refuse another one into
    the same pool, and hold back memory that other streams have used (torch 2.12: `capture_end` raises too early).
    """
    _pools.clear()
    with suppress(AttributeError, RuntimeError):  # of a capture that ended as it should, nothing is going on
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


_pools: list[Any] = []


@dataclass
class _Recording:
    """A captured step for inputs of one shape."""

    inputs: list[Tensor]  # copied into before a replay
    differentiable: list[bool]  # of each output
    spec: pytree.TreeSpec
    forward: Callable[[], _Tensors]
    grad_outputs: list[Tensor | None]  # one for each output; None of those that took no gradient in the warm-up
    wanted: list[bool]  # of inputs, then of parameters: whether they get a gradient
    backward: Callable[[], _Tensors]


class _Replay(Function):
    """`apply(recording, *inputs, *parameters)` returns the outputs."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.set_materialize_grads(False)  # zeros of the size of the logits take a millisecond
        for static, given in zip(recording.inputs, tensors, strict=False):
            static.copy_(given)
        outputs = tuple(output.detach().clone() for output in recording.forward() if output is not None)
        ctx.mark_non_differentiable(
            *(output for output, differs in zip(outputs, recording.differentiable, strict=True) if not differs)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        for number, (static, gy) in enumerate(zip(recording.grad_outputs, gys, strict=True)):
            if static is not None:
                static.zero_() if gy is None else static.copy_(gy)
            elif gy is not None:
                raise RuntimeError(
                    f"output {number} of a model that is replayed from CUDA graphs got a gradient, which it did not in "
                    "the steps before the capture; let the loss depend on the same outputs in each step, or use "
                    "graph='eager'"
                )
        found = recording.backward()
        # The graph's own tensors are overwritten by the next replay. Copies are made here in a few launches, which
        # autograd takes as they are; of the graph's own it would make a copy each.
        each = iter(_copies(found))
        return None, *(next(each) if wanted else None for wanted in recording.wanted)


def _copies(tensors: _Tensors) -> _Tensors:
    """Copy tensors in a launch or two for each dtype; lists of several are copied one by one."""
    made: _Tensors = [None] * len(tensors)
    by_dtype: dict[torch.dtype, dict[int, Tensor]] = {}
    for number, tensor in enumerate(tensors):
        if tensor is not None:
            by_dtype.setdefault(tensor.dtype, {})[number] = tensor
    for some in by_dtype.values():
        for number, copied in zip(some, torch._foreach_mul(list(some.values()), 1.0), strict=True):
            made[number] = copied
    return made


class GraphedModel(nn.Module):
    """A model whose training steps are replayed from graphs; everything else runs as usual.

    Inputs must be tensors and constants, outputs tensors in any nesting that torch's pytree knows. Each backward must
    follow its forward before the next forward. Where shapes keep changing, or something cannot be captured, one warning
    says so and the model runs as usual.

    Args:
        module: the model.
        record: captures a function; a CUDA graph by default.

    Attributes:
        why_eager: why nothing is captured any more; None while that is not so.
    """

    def __init__(self, module: nn.Module, record: Record = record_cuda_graph) -> None:
        super().__init__()
        self.module = module
        self._record = record
        self._seen: dict[object, int] = {}
        self._used: dict[object, set[int]] = {}  # the outputs that took a gradient
        self._reached: set[int] = set()  # ids of the parameters that got one
        self._noting: list[Any] = []  # hooks that note them
        self._recordings: dict[object, _Recording] = {}
        self.why_eager: str | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs read and write the memory of one process's tensors: a copy captures its own."""
        return {**self.__dict__, "_seen": {}, "_used": {}, "_reached": set(), "_noting": [], "_recordings": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, from a graph where there is one for these shapes."""
        if not (self.training and torch.is_grad_enabled()) or self.why_eager:
            return self.module(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        key = spec, torch.is_autocast_enabled(), tuple(map(_signature, leaves)), tuple(map(id, trained))
        if key not in self._recordings:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM_UP:
                self._note_gradients(trained)
                return _noting(self.module(*args, **kwargs), self._used.setdefault(key, set()))
            self._note_gradients([])
            if not self._may_record():
                return self.module(*args, **kwargs)
            try:
                self._recordings[key] = self._capture(leaves, spec, trained, self._used.pop(key))
            except Exception as error:  # whatever it is, the model can still run
                self._give_up(f"the step cannot be captured ({type(error).__name__}: {error})")
                torch.cuda.synchronize() if torch.cuda.is_available() else None
                return self.module(*args, **kwargs)
        recording = self._recordings[key]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        outputs = _Replay.apply(recording, *tensors, *trained)  # type: ignore[no-untyped-call]
        return pytree.tree_unflatten(outputs, recording.spec)

    def _note_gradients(self, trained: Sequence[nn.Parameter]) -> None:
        """Note in the next backward which of these get a gradient."""
        for handle in self._noting:
            handle.remove()
        reached = self._reached
        self._noting = [
            parameter.register_post_accumulate_grad_hook(lambda done: reached.add(id(done))) for parameter in trained
        ]

    def _may_record(self) -> bool:
        if len(self._recordings) < MOST_GRAPHS:
            return True
        self._give_up(
            f"inputs came in more than {MOST_GRAPHS} shapes; pad or pack them to one length (group_by_length does not "
            "suffice), or use graph='compile'"
        )
        return False

    def _give_up(self, why: str) -> None:
        self.why_eager = why
        self._recordings.clear()
        logger.warning("paca: graph='cuda_graph' is off for this model: %s. It runs eagerly from here on.", why)

    def _capture(
        self, leaves: list[Any], spec: pytree.TreeSpec, trained: list[nn.Parameter], used: set[int]
    ) -> _Recording:
        """Record forward and backward for inputs like these, from the outputs `used` or, if that is empty, from all."""
        static = [
            leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        inputs = [leaf for leaf in static if isinstance(leaf, Tensor)]
        args, kwargs = pytree.tree_unflatten(static, spec)
        # Gradients are taken of stand-ins in the parameters' memory. A loss of an earlier step that is still alive has
        # the parameters' own accumulators, and autograd would make their stream, mostly the default one, wait for the
        # captured one, which CUDA refuses.
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        stand_ins = {names[id(parameter)]: parameter.detach().requires_grad_() for parameter in trained}
        sources = [*inputs, *stand_ins.values()]
        wanted = [source for source in sources if source.requires_grad]
        live: list[Tensor] = []
        found_spec: list[pytree.TreeSpec] = []

        def forward() -> _Tensors:
            made, found_spec[:] = _flat(functional_call(self.module, stand_ins, args, kwargs))
            live[:] = [made[number] for number in starts(made)]
            return [*made]

        def starts(outputs: Sequence[Tensor | None]) -> list[int]:
            differs = [number for number, output in enumerate(outputs) if output is not None and output.requires_grad]
            return [number for number in differs if number in used] or differs

        outputs, replay_forward = self._record(forward)
        begin = {number: torch.empty_like(output) for number, output in zip(starts(outputs), live, strict=True)}

        def backward() -> _Tensors:
            return list(torch.autograd.grad(live, wanted, list(begin.values()), allow_unused=True))

        gradients, replay_backward = self._record(backward)
        of_trained = zip(stand_ins, trained, gradients[len(gradients) - len(trained) :], strict=True)
        if lost := [name for name, source, grad in of_trained if grad is None and id(source) in self._reached]:
            raise RuntimeError(
                f"{lost[0]} and {len(lost) - 1} others would get no gradient; recompute with use_reentrant=False, if "
                "activations are recomputed"
            )
        return _Recording(
            inputs=inputs,
            differentiable=[output is not None and output.requires_grad for output in outputs],
            spec=found_spec[0],
            forward=replay_forward,
            grad_outputs=[begin.get(number) for number in range(len(outputs))],
            wanted=[source.requires_grad for source in sources],
            backward=replay_backward,
        )


def _noting(output: Any, used: set[int]) -> Any:
    """Return a module's output, and note which of its tensors take a gradient from outside the module.

    Most models return more than their loss, and a backward from all of it would carry zeros of the size of the logits.
    """
    leaves, spec = pytree.tree_flatten(output)
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[number] = leaf.view_as(leaf)  # the leaf itself may lie on the way from the loss to the parameters
            leaves[number].register_hook(lambda _, number=number: used.add(number))
    return pytree.tree_unflatten(leaves, spec)


def _flat(output: Any) -> tuple[list[Tensor], list[pytree.TreeSpec]]:
    """Return the tensors of an output and how they are nested.

    Raises:
        TypeError: if there is something else in it.
    """
    made, spec = pytree.tree_flatten(output)
    for leaf in made:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"an output is no tensor but {type(leaf).__name__}")
    return made, [spec]


def _signature(leaf: Any) -> object:
    """What must be equal for a graph to serve again: everything of a constant, all but the values of a tensor."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return leaf
