"""The interface: what the algorithm asks of a device.

A backend answers it; nothing else in paca knows which device there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from paca import strategies
from paca.strategies import ColumnSwitch, ColumnWrite, Form


class GraphMode(str, Enum):
    """How a step's operations reach the device."""

    EAGER = "eager"
    COMPILE = "compile"
    CUDA_GRAPH = "cuda_graph"  # forward and backward recorded once for each input shape and replayed
    LAZY = "lazy"  # collected into graphs that are run at marks
    HPU_GRAPHS = "hpu_graphs"  # recorded once for each input shape and replayed; Gaudi's, in lazy mode


class FrozenProducts(Protocol):
    """A layer's two products while some columns of its weight train, made with a copy of all the others.

    `weight` is the layer's own, (out, in), and holds the trained columns.
    """

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Return all that is kept for the copy, beside the weight itself."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return Y, (…, out)."""

    def grad_input(self, gy: Tensor, weight: Tensor) -> Tensor:
        """Return dX, (…, in)."""


@dataclass(frozen=True)
class Ops:
    """A backend's chosen way for each tensor step.

    Functions are module-level ones, so that the choice can be pickled, compared and compiled.
    """

    gather: Callable[[Tensor, Tensor], Tensor] = strategies.gather_index_select  # x, index -> x[..., index]
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor] = strategies.forward_linear  # x, weight, bias -> y
    grad_input: Callable[[Tensor, Tensor], Tensor] = strategies.grad_input_matmul  # gy, weight -> gx
    # gy, xs, scale -> scale·gyᵀxs, (out, r), float32
    grad_columns: Callable[[Tensor, Tensor, float], Tensor] = strategies.grad_columns_thin_first
    write_columns: Callable[[Sequence[ColumnWrite]], None] = strategies.write_index_copy  # all layers of a step at once
    switch_columns: Callable[[Sequence[ColumnSwitch]], None] = strategies.switch_scatter  # of a whole model
    # Columns that form at most so many runs of neighbours are gathered by slices instead; None: however many they are.
    runs_to_slice: int | None = 1
    # gys, weights -> Σ gy·weight for layers that read the same input, which then run together; None: each runs alone.
    grad_input_sum: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] | None = None
    # Called before and after the columns of a step are written, so that they are a graph of their own.
    end_graph: Callable[[], None] = strategies.run_at_once
    # library dequantises, trains, tokens -> form
    quantised_form: Callable[[bool, bool, int], Form] = strategies.form_exact
    # weight, index -> what makes the products of a training step instead of `forward` and `grad_input`, from a copy of
    # the columns that do not train; its answer for a weight may be None, and then, as without it, those two do.
    copy_frozen: Callable[[Tensor, Tensor], FrozenProducts | None] | None = None


# What a user may name for each kind, and the fields of `Ops` that it sets.
Choices = Mapping[str, Mapping[str, Mapping[str, Any]]]

PLAIN_TORCH: Choices = MappingProxyType(
    {
        "gather": {
            "index_select": {"gather": strategies.gather_index_select},
            "one_hot": {"gather": strategies.gather_one_hot},
        },
        "gemm": {
            "torch": {
                "forward": strategies.forward_linear,
                "grad_input": strategies.grad_input_matmul,
                "copy_frozen": None,
            }
        },
        "grad_columns": {
            "thin_first": {"grad_columns": strategies.grad_columns_thin_first},
            "matmul": {"grad_columns": strategies.grad_columns_matmul},
        },
        "write": {
            "index_copy": {"write_columns": strategies.write_index_copy, "switch_columns": strategies.switch_scatter},
            "index_put": {"write_columns": strategies.write_index_put, "switch_columns": strategies.switch_scatter},
        },
        "quantised": {
            "exact": {"quantised_form": strategies.form_exact},
            "overlay": {"quantised_form": strategies.form_overlay},
            "split": {"quantised_form": strategies.form_split},
            "fastest": {"quantised_form": strategies.form_fastest},
        },
    }
)

# For devices where an addition of the size of an activation costs more than a GEMM that adds to its output.
SHARED_INPUT: Choices = MappingProxyType(
    {
        "shared_input": {
            "together": {"grad_input_sum": strategies.grad_input_addmm},
            "alone": {"grad_input_sum": None},
        }
    }
)


@dataclass(frozen=True)
class Capabilities:
    """Facts about a device that code and tests branch on, instead of on its name."""

    dtypes: frozenset[torch.dtype]  # dtypes its GEMMs really compute in
    graph_modes: tuple[GraphMode, ...]  # the default first
    quantised: frozenset[str] = frozenset()  # formats of a frozen weight, e.g. "nf4"
    # Optimizer steps from one staleness spot check to the next; each reads a value back to the host. 0: never.
    steps_per_check: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on the device."""

    allocated: int
    peak: int
    limit: int


class Backend(ABC):
    """One kind of device: its strategies, its memory, and what a trainer needs to know of it.

    Args:
        strategies: kind → name for each strategy that is not the backend's default, `graph` among them.

    Raises:
        ValueError: for a kind or name that the backend does not have.
    """

    name: ClassVar[str]  # what `set_backend` takes
    priority: ClassVar[int] = 0  # among usable backends the highest is the default
    choices: ClassVar[Choices] = PLAIN_TORCH
    recipe_section: ClassVar[str] = ""  # the mapping in a recipe whose keys hold on this device only
    default_ops: ClassVar[Ops] = Ops()

    def __init__(self, **strategies: str) -> None:
        modes = {mode.value: mode for mode in self.capabilities.graph_modes}
        self.graph_mode = modes[_choose("graph", strategies.pop("graph", next(iter(modes))), modes)]
        self.ops = self.default_ops
        for kind, choice in strategies.items():
            known = self.choices[_choose("strategy", kind, [*self.choices, "graph"])]
            self.ops = replace(self.ops, **known[_choose(kind, choice, known)])

    @classmethod
    @abstractmethod
    def why_unavailable(cls) -> str | None:
        """Say why this machine cannot use the backend, or None if it can. Must not start the device."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the device can do."""

    @abstractmethod
    def device(self, index: int | None = None) -> torch.device:
        """The torch device, the current one unless `index` is given."""

    @abstractmethod
    def describe(self) -> str:
        """The device's name, for people."""

    @abstractmethod
    def memory(self) -> Memory:
        """Bytes in use, highest since the last reset, and in all."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Let the peak start again from what is in use."""

    def synchronize(self) -> None:  # noqa: B027 - a device without a queue has nothing to wait for
        """Wait until the device has done all it was given."""

    def event(self) -> torch.Event | None:
        """A new event that notes when the device's queue reaches it; None on a device whose work is done on return."""
        return None

    def limit_memory(self, limit: int) -> bool:
        """Make allocations beyond so many bytes fail in this process; False if the device cannot."""
        return False

    def release_memory(self) -> None:  # noqa: B027 - a device whose allocator keeps nothing has nothing to give
        """Give memory that is held for later use back to the device, so that other processes can have it."""

    def capture(self, module: nn.Module) -> nn.Module:
        """Return the module in the chosen graph mode."""
        return torch.compile(module) if self.graph_mode is GraphMode.COMPILE else module  # type: ignore[return-value]

    def autocast_dtype(self) -> torch.dtype:
        """The low-precision dtype for mixed-precision training."""
        return torch.bfloat16

    @contextmanager
    def compilations(self) -> Iterator[Callable[[], int] | None]:
        """Count what the device compiles in the block, if it tells: yields a function that returns the count so far."""
        yield None

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The optimizer that suits the device, for loops written by hand; takes the arguments of AdamW."""
        return torch.optim.AdamW

    def training_arguments(self) -> dict[str, Any]:
        """TrainingArguments that the device wants unless a recipe says otherwise."""
        return {}

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """The Trainer and TrainingArguments classes of this device."""
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments

    @property
    def strategies(self) -> dict[str, str]:
        """The strategy in use of each kind, by name."""
        in_use = {
            kind: next(
                name for name, fields in known.items() if all(getattr(self.ops, f) is v for f, v in fields.items())
            )
            for kind, known in self.choices.items()
        }
        return in_use | {"graph": self.graph_mode.value}


def _choose(kind: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the name if it is known; otherwise say which are, the nearest first."""
    if name in known:
        return name
    near = get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"no {kind} named {name!r}{hint} Known: {', '.join(known)}.")
