"""The CUDA backend: cuBLAS for the frozen products, Triton for what PaCA adds to them."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from packaging.version import Version
from torch import nn

from paca.backend import PLAIN_TORCH, SHARED_INPUT, Backend, Capabilities, Choices, GraphMode, Memory, Ops
from paca.errors import BackendUnavailableError
from paca.strategies import grad_input_addmm
from paca_cuda.float8 import float8_products, why_no_float8
from paca_cuda.graphs import GraphedModel
from paca_cuda.ops import why_no_triton
from paca_cuda.strategies import (
    gather_triton,
    grad_columns_cublas,
    grad_columns_triton,
    grad_columns_tuned,
    switch_multi_tensor,
    write_multi_tensor,
)

OLDEST_TORCH = "2.10"

# Optimizer steps between two spot checks of the columns: one check waits for the device once a layer.
STEPS_PER_CHECK = 64

# Products of bfloat16 need compute capability 8.0 (Ampere).
_LOW_PRECISION: Mapping[int, frozenset[torch.dtype]] = {
    0: frozenset({torch.float16}),
    8: frozenset({torch.float16, torch.bfloat16}),
}


# Strategies that cannot do without Triton.
_NEED_TRITON = {("gather", "triton"), ("grad_columns", "triton"), ("write", "multi_tensor")}


class CUDABackend(Backend):
    """NVIDIA GPUs; layers keep the strategies, tensors say which device they are on.

    Raises:
        BackendUnavailableError: if a strategy is asked for that needs Triton, and there is none, or a device that
            multiplies float8.
        ValueError: if strategies are asked for that exclude each other, or that there are not.
    """

    name: ClassVar[str] = "cuda"
    priority: ClassVar[int] = 10
    choices: ClassVar[Choices] = MappingProxyType(
        {
            **PLAIN_TORCH,
            **SHARED_INPUT,
            "gather": {**PLAIN_TORCH["gather"], "triton": {"gather": gather_triton}},
            "gemm": {**PLAIN_TORCH["gemm"], "fp8": {"copy_frozen": float8_products, "grad_input_sum": None}},
            "grad_columns": {
                "tuned": {"grad_columns": grad_columns_tuned},
                "triton": {"grad_columns": grad_columns_triton},
                "cublas": {"grad_columns": grad_columns_cublas},
                **PLAIN_TORCH["grad_columns"],
            },
            "write": {
                "multi_tensor": {"write_columns": write_multi_tensor, "switch_columns": switch_multi_tensor},
                **PLAIN_TORCH["write"],
            },
        }
    )
    default_ops: ClassVar[Ops] = Ops(
        grad_columns=grad_columns_tuned,
        write_columns=write_multi_tensor,
        switch_columns=switch_multi_tensor,
        grad_input_sum=grad_input_addmm,
    )

    def __init__(self, **strategies: str) -> None:
        super().__init__(**strategies)
        if strategies.get("gemm") == "fp8":
            if strategies.get("shared_input") == "together":
                raise ValueError(
                    "gemm='fp8' makes the products of each layer alone, so it cannot go with shared_input='together'; "
                    "leave one of them out"
                )
            if (why := why_no_float8()) is not None:
                raise BackendUnavailableError(f"gemm='fp8' cannot be used: {why}; leave it out")
        if (why := why_no_triton()) is None:
            return
        if wanted := [f"{kind}={name!r}" for kind, name in strategies.items() if (kind, name) in _NEED_TRITON]:
            raise BackendUnavailableError(f"{wanted[0]} cannot be used: {why}")
        if "write" not in strategies:
            self.ops = replace(self.ops, **self.choices["write"]["index_copy"])

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Ask torch and the driver; no context is made."""
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
        if Version(torch.__version__).release < Version(OLDEST_TORCH).release:
            return f"it needs torch {OLDEST_TORCH} or newer, found {torch.__version__}"
        if not torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            hint = f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
            return f"torch {torch.__version__} sees no CUDA device{hint}; is the driver installed (nvidia-smi)?"
        return None

    @property
    def capabilities(self) -> Capabilities:
        """What the current device computes; without a device what every supported one does."""
        major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 8
        low = max(since for since in _LOW_PRECISION if since <= major)
        return Capabilities(
            dtypes=frozenset({torch.float64, torch.float32}) | _LOW_PRECISION[low],
            graph_modes=(GraphMode.EAGER, GraphMode.COMPILE, GraphMode.CUDA_GRAPH),
            quantised=frozenset({"nf4", "fp4", "int8", "fp8"}),
            steps_per_check=STEPS_PER_CHECK,
        )

    def device(self, index: int | None = None) -> torch.device:
        """The current CUDA device, or one by its number."""
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def describe(self) -> str:
        """Name, memory and compute capability of the device, and the CUDA that torch was built for."""
        found = torch.cuda.get_device_properties(self.device())
        memory = found.total_memory / 2**30
        return f"{found.name}, {memory:.1f} GiB, sm_{found.major}{found.minor}, CUDA {torch.version.cuda}"

    def memory(self) -> Memory:
        """What torch's allocator holds in tensors, its highest, and the device's memory."""
        return Memory(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1])

    def reset_peak_memory(self) -> None:
        """Let the allocator's peak start again."""
        torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        """Wait for all streams of the current device."""
        torch.cuda.synchronize()

    def event(self) -> torch.Event:
        """An event of the current stream that notes its time."""
        return torch.Event("cuda", enable_timing=True)

    def limit_memory(self, limit: int) -> bool:
        """Let torch's allocator have no more than a fraction of the device's memory."""
        total = torch.cuda.get_device_properties(self.device()).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        return True

    def release_memory(self) -> None:
        """Empty the cache of torch's allocator, after what Python has not collected yet."""
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, module: nn.Module) -> nn.Module:
        """Return the module compiled, or replayed from CUDA graphs, or as it is."""
        return GraphedModel(module) if self.graph_mode is GraphMode.CUDA_GRAPH else super().capture(module)

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """Transformers' own Trainer, its steps replayed from graphs in that mode."""
        if self.graph_mode is not GraphMode.CUDA_GRAPH:
            return super().trainer()
        from paca_cuda.trainer import graph_trainer

        return graph_trainer()

    def autocast_dtype(self) -> torch.dtype:
        """Give bfloat16, or float16 where the device has no fast bfloat16."""
        return torch.bfloat16 if torch.bfloat16 in self.capabilities.dtypes else torch.float16
