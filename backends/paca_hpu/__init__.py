"""The Intel Gaudi backend, and a rehearsal of it that runs on any CPU.

Importing it imports nothing of the vendor's: that happens when a device is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from paca.backend import PLAIN_TORCH, Backend, Capabilities, Choices, GraphMode, Memory, Ops
from paca.errors import BackendUnavailableError
from paca.strategies import gather_index_select, grad_columns_matmul, write_index_copy, write_index_put
from paca_hpu import bridge
from paca_hpu.gathers import gather_by_cost, gather_one_hot
from paca_hpu.writes import write_scatter, write_what_is_due

_CHOICES: Choices = MappingProxyType(
    {
        **PLAIN_TORCH,
        "gather": {
            "auto": {"gather": gather_by_cost, "runs_to_slice": 1},
            "one_hot": {"gather": gather_one_hot, "runs_to_slice": 0},
            "index_select": {"gather": gather_index_select, "runs_to_slice": 0},
            "slice": {"gather": gather_index_select, "runs_to_slice": None},
        },
        "write": {
            "index_copy": {"write_columns": write_index_copy},
            "scatter": {"write_columns": write_scatter},
            "index_put": {"write_columns": write_index_put},
        },
    }
)


class HPUBackend(Backend):
    """Intel Gaudi2 and Gaudi3 through the vendor's PyTorch bridge.

    The process is either lazy (`PT_HPU_LAZY_MODE=1`: graph modes `lazy` and `hpu_graphs`) or not (0, the vendor's
    default: `eager` and `compile`).

    Raises:
        BackendUnavailableError: for a graph mode that this process cannot have; the message says how to get it.
    """

    name: ClassVar[str] = "hpu"
    priority: ClassVar[int] = 20
    recipe_section: ClassVar[str] = "gaudi"
    choices: ClassVar[Choices] = _CHOICES
    default_ops: ClassVar[Ops] = replace(
        Ops(),
        gather=gather_by_cost,
        runs_to_slice=1,
        grad_columns=grad_columns_matmul,  # one product; a loop over blocks of tokens would be many graph nodes
        end_graph=bridge.end_graph,
    )
    compiler: ClassVar[str] = "hpu_backend"

    def __init__(self, **strategies: str) -> None:
        modes = {mode.value for mode in self.capabilities.graph_modes}
        wanted = strategies.get("graph")
        if wanted in _PROCESS_MODE and wanted not in modes:
            raise BackendUnavailableError(
                f"graph={wanted!r} needs {bridge.MODE}={_PROCESS_MODE[wanted]}, and this process runs with "
                f"{bridge.MODE}={int(bridge.is_lazy())}: set it in the environment before Python starts"
            )
        super().__init__(**strategies)

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Look for the vendor's bridge, its mode, and a device."""
        return bridge.why_missing()

    @property
    def capabilities(self) -> Capabilities:
        """What a Gaudi computes: no float64, which its bridge turns into float32 without a word."""
        return Capabilities(
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            graph_modes=_LAZY_MODES if bridge.is_lazy() else _EAGER_MODES,
            quantised=frozenset({"nf4"}),  # bitsandbytes has no other kernels there
            steps_per_check=0,  # each check would stop the queue and cut the graph
        )

    def device(self, index: int | None = None) -> torch.device:
        """`hpu`, or `hpu:index`."""
        bridge.hpu()
        return torch.device("hpu") if index is None else torch.device("hpu", index)

    def describe(self) -> str:
        """The device's name, how many there are, the bridge and its mode."""
        hpu = bridge.hpu()
        mode = "lazy" if bridge.is_lazy() else "eager and compile"
        return f"{hpu.get_device_name()} x {hpu.device_count()}, habana-torch-plugin {bridge.version()}, {mode} mode"

    def memory(self) -> Memory:
        """Bytes in use on the current device; the limit is what the bridge took at its start, nearly all there is."""
        stats = bridge.hpu().memory_stats()
        return Memory(stats["InUse"], stats["MaxInUse"], stats["Limit"])

    def reset_peak_memory(self) -> None:
        """Let `MaxInUse` start again."""
        bridge.hpu().reset_peak_memory_stats()

    def synchronize(self) -> None:
        """Send what was collected, and wait for it."""
        bridge.end_graph()
        bridge.hpu().synchronize()

    def capture(self, module: nn.Module) -> nn.Module:
        """Return the module compiled by the vendor's compiler, or replayed from an HPU graph for each input shape."""
        if self.graph_mode is GraphMode.COMPILE:
            return torch.compile(module, backend=self.compiler)  # type: ignore[return-value]
        if self.graph_mode is GraphMode.HPU_GRAPHS:
            write_what_is_due(module)
            cached: nn.Module = bridge.hpu().ModuleCacher(max_graphs=10)(model=module, inplace=True)
            return cached
        return module

    @contextmanager
    def compilations(self) -> Iterator[Callable[[], int] | None]:
        """Count with the vendor's metric `graph_compilation`."""
        from habana_frameworks.torch.hpu.metrics import metric_localcontext  # type: ignore[import-not-found]

        with metric_localcontext("graph_compilation") as metric:
            yield lambda: int(dict(metric.stats())["TotalNumber"])

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The vendor's FusedAdamW: one kernel, and a step size that is a tensor, so that no step compiles anew."""
        from habana_frameworks.torch.hpex.optimizers import FusedAdamW  # type: ignore[import-not-found]

        fused: type[torch.optim.Optimizer] = FusedAdamW
        return fused

    def training_arguments(self) -> dict[str, Any]:
        """What a training run on this device should be told."""
        from paca_hpu.trainers import defaults

        return defaults(self.graph_mode, self.compiler)

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """GaudiTrainer of optimum-habana where it is installed, transformers' own Trainer otherwise."""
        from paca_hpu.trainers import classes

        return classes(self.graph_mode)


class RehearsalBackend(HPUBackend):
    """Gaudi's operations on the CPU: what `paca doctor --graphs` and tests run where there is no Gaudi."""

    name: ClassVar[str] = "hpu-rehearsal"
    priority: ClassVar[int] = -20
    default_ops: ClassVar[Ops] = replace(HPUBackend.default_ops, end_graph=Ops().end_graph)
    compiler: ClassVar[str] = "aot_eager"

    def __init__(self, **strategies: str) -> None:
        if strategies.get("graph") == GraphMode.HPU_GRAPHS.value:
            raise BackendUnavailableError(
                "only a Gaudi records HPU graphs; on this machine graph='lazy' runs the operations that they would hold"
            )
        super().__init__(**strategies)

    @classmethod
    def why_unavailable(cls) -> str | None:
        """There always is a CPU."""
        return None

    @property
    def capabilities(self) -> Capabilities:
        """Those of the CPU in the modes that it can play."""
        return Capabilities(
            dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
            graph_modes=(GraphMode.EAGER, GraphMode.COMPILE, GraphMode.LAZY),
            steps_per_check=0,
            quantised=frozenset({"nf4"}),  # a Gaudi's
        )

    def device(self, index: int | None = None) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def describe(self) -> str:
        """Say that this is no Gaudi."""
        return "Gaudi's operations on the CPU; shows what is computed, never how fast"

    def memory(self) -> Memory:
        """Nothing is allocated on a device."""
        return Memory(0, 0, 0)

    def reset_peak_memory(self) -> None:
        """There is no peak."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    @contextmanager
    def compilations(self) -> Iterator[Callable[[], int] | None]:
        """A CPU compiles nothing."""
        yield None

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """Torch's own AdamW."""
        return torch.optim.AdamW

    def training_arguments(self) -> dict[str, Any]:
        """Stay on the CPU."""
        return {"use_cpu": True, "dataloader_pin_memory": False, **super().training_arguments()}

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """Transformers' own."""
        return Backend.trainer(self)


_EAGER_MODES = (GraphMode.EAGER, GraphMode.COMPILE)
_LAZY_MODES = (GraphMode.LAZY, GraphMode.HPU_GRAPHS)
_PROCESS_MODE = {mode.value: 0 for mode in _EAGER_MODES} | {mode.value: 1 for mode in _LAZY_MODES}
