"""A whole transformer block whose training is exact: attention, MLP, several optimizer steps, not one rounding.

What passes from one linear layer to the next is *ternary*, -1, 0 or 1, forward and backward, as in networks with
ternary activations and straight-through gradients. So sums stay small, and every number of the run, in every dtype, is
a small multiple of a power of two. `paca.parity.certificate` proves it for the very run that is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd import Function

from paca import freshness
from paca.backend import Backend, GraphMode
from paca.config import PacaConfig
from paca.layer import PacaLayer
from paca.registry import use_backend

BATCH, TOKENS, WIDTH, HIDDEN, HEADS = 2, 16, 32, 64, 2
RANK, ALPHA = 4, 8
STEPS = 5
LEARNING_RATE = 2.0**-5
# One element of a base weight in this many is not zero.
ONE_IN = 8
LINEARS = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH, WIDTH),
    "v_proj": (WIDTH, WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "up_proj": (HIDDEN, WIDTH),
    "down_proj": (WIDTH, HIDDEN),
}


class Ternary(Function):
    """Round to -1, 0 or 1; the gradient goes straight through and is rounded likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Round the values."""
        return x.round().clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        """Round the gradient."""
        return gy.round().clamp(-1, 1)


def ternary(x: Tensor) -> Tensor:
    """Apply `Ternary`."""
    result: Tensor = Ternary.apply(x)  # type: ignore[no-untyped-call]
    return result


class ExactBlock(nn.Module):
    """Causal attention without softmax, then an MLP, each with a residual connection."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, (n_out, n_in) in LINEARS.items():
            self.add_module(name, nn.Linear(n_in, n_out, bias=False))
        self.register_buffer("causal", torch.ones(TOKENS, TOKENS).tril())

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        linear: Callable[[str, Tensor], Tensor] = lambda name, value: ternary(getattr(self, name)(value))  # noqa: E731
        heads: Callable[[Tensor], Tensor] = lambda value: value.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
        inner = ternary(x)  # one tensor for all three, so that a backend may sum their gradients
        q, k, v = (heads(linear(name, inner)) for name in ("q_proj", "k_proj", "v_proj"))
        attention = ternary(q @ k.transpose(-1, -2)) * self.causal
        mixed = ternary(attention @ v).transpose(1, 2).flatten(2)
        x = x + linear("o_proj", ternary(mixed))
        return x + linear("down_proj", torch.relu(linear("up_proj", ternary(x))))


def draw_block(seed: int = 0) -> dict[str, Tensor]:
    """Draw weights, inputs and upstream gradients, all ternary, int8: one set for every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def sparse(*size: int) -> Tensor:
        signs = torch.randint(0, 2, size, generator=generator) * 2 - 1
        return (signs * (torch.randint(0, ONE_IN, size, generator=generator) == 0)).to(torch.int8)

    numbers = {name: sparse(*size) for name, size in LINEARS.items()}
    size = (STEPS, BATCH, TOKENS, WIDTH)
    return numbers | {"x": torch.randint(-1, 2, size, generator=generator, dtype=torch.int8), "gy": sparse(*size)}


def train_block(
    numbers: Mapping[str, Tensor],
    dtype: torch.dtype,
    backend: Backend,
    residency: str = "auto",
    observe: Callable[[int, nn.Module], None] | None = None,
) -> dict[str, Tensor]:
    """Train the block on a backend with plain SGD.

    Args:
        numbers: from `draw_block`, or recorded.
        dtype: that the block computes in.
        backend: its device, operations and graph mode are used.
        residency: of the trained columns; see `PacaConfig`.
        observe: called after each optimizer step with its number and the adapted block.

    Returns:
        "y" (steps, batch, tokens, width), and for each linear its delta (out, r), and its weight (out, in) as written
        after the last step; float32, on the CPU.
    """
    block = block_model(numbers, dtype, backend, residency)
    layers = [module for module in block.modules() if isinstance(module, PacaLayer)]
    try:
        run = captured(block, backend)
        optimizer = torch.optim.SGD([layer.paca_delta["default"] for layer in layers], lr=LEARNING_RATE)
        outputs = []
        for step in range(STEPS):
            outputs.append(block_step(run, numbers, step, dtype, backend).detach().cpu())
            optimizer.step()
            optimizer.zero_grad()
            if observe is not None:
                observe(step, block)
        backend.synchronize()
        return {"y": torch.stack(outputs).float()} | block_state(layers)
    finally:
        for layer in layers:
            freshness.forget(layer)


def block_model(numbers: Mapping[str, Tensor], dtype: torch.dtype, backend: Backend, residency: str = "auto") -> Any:
    """Make the block with a fresh adapter on every linear, on the backend's device."""
    block = ExactBlock()
    with torch.no_grad():
        for name in LINEARS:
            getattr(block, name).weight.copy_(numbers[name])
    block = block.to(dtype).to(backend.device())
    config = PacaConfig(r=RANK, paca_alpha=ALPHA, target_modules=list(LINEARS), residency=residency)
    with use_backend(backend.name, **backend.strategies):
        return get_peft_model(block, config)


def captured(block: nn.Module, backend: Backend) -> nn.Module:
    """Return the block in the backend's graph mode."""
    if backend.graph_mode is not GraphMode.EAGER:
        torch.compiler.reset()  # or after some models torch.compile gives up and runs eagerly
    return backend.capture(block)


def block_step(
    run: nn.Module, numbers: Mapping[str, Tensor], step: int, dtype: torch.dtype, backend: Backend
) -> Tensor:
    """Run forward and backward of one step; returns y."""
    x, gy = (numbers[name][step].to(dtype).to(backend.device()) for name in ("x", "gy"))
    y: Tensor = run(x)
    y.backward(gy)
    return y


def block_state(layers: list[PacaLayer]) -> dict[str, Tensor]:
    """Return each layer's delta and the weight it computes with, float32, on the CPU."""
    state = {}
    for layer in layers:
        name = layer.name.rpartition(".")[2]
        state[f"{name}.delta"] = layer.paca_delta["default"].detach().float().cpu()
        state[f"{name}.weight"] = computed_weight(layer).float().cpu()
    return state


def computed_weight(layer: PacaLayer) -> Tensor:
    """Return the weight (out, in) that the layer computes with, whether it holds its columns or swaps them in."""
    if layer.residency == "resident":
        return layer.adapted.matrix.detach()
    weight = layer.pretrained_weight().clone()
    adapters = layer.held_adapters()
    write = layer.adapted.column_write(adapters)
    return weight.index_copy(1, write.index, write.values())
