"""The trajectory tier: a tiny Llama is trained on two machines; their runs may drift apart as far as rounding explains.

How far that is, is measured: on the reference machine the same run is repeated from weights that are one unit in the
last place (ulp) off, each in a random direction. Rounding differently in every operation does about as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from paca import freshness
from paca.backend import Backend
from paca.config import PacaConfig
from paca.layer import PacaLayer
from paca.parity.block import captured
from paca.registry import use_backend

DTYPES = (torch.float32, torch.bfloat16)  # float16 would need loss scaling
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 64, 32, 48, 2, 2
RANK, ALPHA = 8, 16  # a scale that shows when it is forgotten, or applied twice
STEPS, LEARNING_RATE = 8, 0.05
PERTURBED_RUNS = 6
# A run may be this many times as far from the reference as the farthest perturbed one.
ALLOWANCE = 2


@dataclass(frozen=True)
class Trajectory:
    """What a run left behind."""

    losses: tuple[float, ...]  # of each step
    deltas: Mapping[str, Tensor]  # by module name, (out, r) float32, on the CPU


@dataclass(frozen=True)
class Tolerance:
    """How far from the reference a run may be."""

    losses: tuple[float, ...]  # absolute, of each step
    deltas: float  # ‖Δ - Δ_reference‖ / ‖Δ_reference‖ over all layers


def draw_model(seed: int = 0) -> dict[str, Tensor]:
    """Draw the weights of the model, float32, and the batch it trains on, "input_ids" (rows, tokens) int32."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in sorted((name, weight.shape) for name, weight in _empty_model().state_dict().items())
    }
    ids = torch.randint(VOCABULARY, (4, 16), generator=generator, dtype=torch.int32)
    return drawn | {"input_ids": ids}


def train_model(numbers: Mapping[str, Tensor], dtype: torch.dtype, backend: Backend) -> Trajectory:
    """Train the model a few steps on the backend's device, in its graph mode.

    With plain SGD: Adam divides by the gradient's size, which hides a wrong scale and magnifies rounding.
    """
    base = _empty_model()
    base.load_state_dict({name: value for name, value in numbers.items() if name != "input_ids"}, assign=True)
    base.tie_weights()
    device = backend.device()
    # `assign` keeps the recorded tensors themselves: training must not write to those.
    for parameter in base.parameters():
        parameter.data = parameter.detach().clone()
    config = PacaConfig(r=RANK, paca_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with use_backend(backend.name, **backend.strategies):
        model = get_peft_model(base.to(dtype).to(device), config)
    layers = [module for module in model.modules() if isinstance(module, PacaLayer)]
    try:
        run = captured(model, backend)
        ids = numbers["input_ids"].long().to(device)
        optimizer = torch.optim.SGD([layer.paca_delta["default"] for layer in layers], lr=LEARNING_RATE)
        losses = []
        for _ in range(STEPS):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach().cpu()))
        deltas = {layer.name: layer.paca_delta["default"].detach().float().cpu() for layer in layers}
        return Trajectory(tuple(losses), deltas)
    finally:
        for layer in layers:
            freshness.forget(layer)


def calibrated(numbers: Mapping[str, Tensor], dtype: torch.dtype, backend: Backend) -> tuple[Trajectory, Tolerance]:
    """Train the reference and measure what a change of one ulp in every weight does to it."""
    reference = train_model(numbers, dtype, backend)
    drifts = []
    for seed in range(PERTURBED_RUNS):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            name: one_ulp_off(value.to(dtype), generator) if value.is_floating_point() else value
            for name, value in numbers.items()
        }
        drifts.append(drift(train_model(moved, dtype, backend), reference))
    losses, allowed = [], 0.0
    for step, loss in enumerate(reference.losses):
        # What a step may drift, all later ones may. No run is held to less than the rounding of the loss itself.
        rounding = abs(loss) * torch.finfo(torch.float32).eps
        allowed = max(allowed, rounding, *(at[step] for at, _ in drifts))
        losses.append(ALLOWANCE * allowed)
    return reference, Tolerance(tuple(losses), ALLOWANCE * max(of_deltas for _, of_deltas in drifts))


def drift(run: Trajectory, reference: Trajectory) -> tuple[list[float], float]:
    """Measure how far a run is from the reference: each loss absolutely, all deltas relatively.

    Raises:
        ValueError: if they did not train the same layers.
    """
    if run.deltas.keys() != reference.deltas.keys():
        raise ValueError(f"trained {', '.join(run.deltas)}, the reference {', '.join(reference.deltas)}")
    losses = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
    apart = sum(float((run.deltas[name].double() - d.double()).square().sum()) for name, d in reference.deltas.items())
    size = sum(float(d.double().square().sum()) for d in reference.deltas.values())
    return losses, (apart / size) ** 0.5


def one_ulp_off(values: Tensor, generator: torch.Generator) -> Tensor:
    """Move every number to one of its two neighbours, at random."""
    up = torch.randint(0, 2, values.shape, generator=generator).bool()
    towards = torch.where(up, torch.inf, -torch.inf).to(values.dtype)
    return torch.nextafter(values, towards)


def _empty_model() -> Any:
    """Make the model without values for its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        attn_implementation="eager",
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    state = torch.random.get_rng_state()
    model = LlamaForCausalLM(config)
    torch.random.set_rng_state(state)
    return model
