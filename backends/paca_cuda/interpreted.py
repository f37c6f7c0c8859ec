"""The CUDA backend's Triton kernels on the CPU, run by Triton's interpreter: slow, and the same arithmetic."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from paca.backend import Capabilities, GraphMode, Memory, Ops
from paca_cuda import CUDABackend
from paca_cuda.ops import interpreted, why_no_triton
from paca_cuda.strategies import gather_triton, grad_columns_triton, switch_multi_tensor, write_multi_tensor


class InterpretedBackend(CUDABackend):
    """For comparing what the kernels compute where there is no GPU; needs TRITON_INTERPRET=1 from the start."""

    name: ClassVar[str] = "cuda-interpreted"
    priority: ClassVar[int] = -20
    default_ops: ClassVar[Ops] = Ops(
        gather=gather_triton,
        grad_columns=grad_columns_triton,
        write_columns=write_multi_tensor,
        switch_columns=switch_multi_tensor,
    )

    @classmethod
    def why_unavailable(cls) -> str | None:
        """It is there where Triton was told to interpret."""
        if not interpreted():
            return "Triton's interpreter is off; set TRITON_INTERPRET=1 before Python starts"
        return why_no_triton()

    @property
    def capabilities(self) -> Capabilities:
        """Those of the CPU, without graphs."""
        return Capabilities(
            dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
            graph_modes=(GraphMode.EAGER,),
        )

    def device(self, index: int | None = None) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def describe(self) -> str:
        """Say that this is no GPU."""
        return "CUDA's Triton kernels interpreted on the CPU; shows what is computed, never how fast"

    def memory(self) -> Memory:
        """Nothing is allocated on a device."""
        return Memory(0, 0, 0)

    def reset_peak_memory(self) -> None:
        """There is no peak."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def capture(self, module: nn.Module) -> nn.Module:
        """There are no graphs."""
        return module
