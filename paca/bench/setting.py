"""How a measured model runs, whatever trains in it: fused kernels, recomputation, graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from paca.bench import base

# What transformers calls gradient checkpointing; it was renamed in version 5.
_CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
GRAPHS = ("eager", "compile", "whole")


@dataclass(frozen=True)
class Setting:
    """Options that all methods of a run share.

    Attributes:
        checkpointing: recompute each decoder layer in backward.
        liger: use Liger's kernels for norms, rotary embeddings and SwiGLU.
        graph: "eager"; "compile", each decoder layer by torch.compile; or "whole", the model in the backend's mode.
        strategies: of the backend that are not its defaults.
        base: format of the frozen linear weights, see `paca.bench.base`.
    """

    checkpointing: bool = False
    liger: bool = False
    graph: str = "eager"
    strategies: Mapping[str, str] = field(default_factory=dict)
    base: str = "none"

    def check(self) -> None:
        """Refuse what this installation cannot do.

        Raises:
            ValueError: naming the option.
        """
        if self.liger and find_spec("liger_kernel") is None:
            raise ValueError("--liger needs the package liger-kernel: pip install liger-kernel")
        base.check(self.base)

    def fuse(self, model: nn.Module) -> nn.Module:
        """Put fused kernels into a new stack and return it."""
        if self.liger:
            import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(
                rope=True,
                rms_norm=True,
                swiglu=True,
                cross_entropy=False,
                fused_linear_cross_entropy=False,
                model=model,
            )
        return model

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Set recomputation and compilation of a prepared model and return it."""
        if self.checkpointing:
            stack: Any = next(module for module in model.modules() if type(module).__name__ == "LlamaModel")
            enable = next(getattr(stack, name) for name in _CHECKPOINTING if hasattr(stack, name))
            enable({"use_reentrant": False})
        if self.graph == "compile":
            # Methods share the code of a layer, and with it the number of graphs that Dynamo makes before it gives up
            # and runs eagerly, which would then be measured as compiled.
            dynamo = import_module("torch._dynamo")
            dynamo.config.recompile_limit = 64
            dynamo.config.fail_on_recompile_limit_hit = True
            for module in model.modules():
                if type(module).__name__ == "LlamaDecoderLayer":
                    module.compile()
        return model


PLAIN = Setting()
