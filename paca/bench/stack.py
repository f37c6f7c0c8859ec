"""The measured model: Llama decoder layers from transformers with random weights, and a batch for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from paca.bench.base import quantise
from paca.bench.shapes import Shape

_ATTENTION = "paca_bench_causal"


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, base: str = "none") -> nn.Module:
    """Return a `LlamaModel` in training mode; the same weights for the same seed on the same device.

    The vocabulary is a stub: the stack is fed embeddings, and no loss is taken, since both cost every method alike.

    Args:
        shape: its sizes.
        dtype: of weights and activations.
        device: where it is made. Layers are made and quantised one by one, so that a model fits that is too large in
            `dtype`.
        seed: of the weights.
        base: format of the frozen linear weights, see `paca.bench.base`.
    """
    from transformers import LlamaConfig, LlamaModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    settings: dict[str, Any] = {"attn_implementation": _attention()}  # not in the signature
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=0,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(shape.tokens, 2048),
        vocab_size=8,
        attention_dropout=0.0,
        **settings,
    )
    with (
        torch.random.fork_rng(devices=[]),
        _default_dtype(dtype),
        device,
    ):  # drawn there: 8 B weights take long on a CPU
        torch.manual_seed(seed)
        model: Any = LlamaModel(config)
        for number in range(shape.layers):
            layer = LlamaDecoderLayer(config, number).apply(model._init_weights)
            model.layers.append(quantise(layer, base, dtype))
        config.num_hidden_layers = shape.layers
    made: nn.Module = model.to(device).train()
    return made


def _attention() -> str:
    """Return the name of torch's attention without the masks that transformers makes for it; the batch is not padded.

    transformers reads a value back from the device in every forward, to find that it needs no mask, and where it cannot
    read, while a CUDA graph is captured or all layers are compiled, it makes one, with which the fastest kernels cannot
    be used.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    return _ATTENTION


def batch(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Return the embeddings, which require a gradient, and the output's gradient; both (batch, tokens, hidden).

    Drawn on the device: a CPU draws a hundred million numbers a second, and the search for what fits asks for billions.
    """
    size = (shape.batch, shape.tokens, shape.hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, gy = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    return x.requires_grad_(), gy


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Return the last hidden state, (batch, tokens, hidden)."""
    return cast(Tensor, model(inputs_embeds=x, use_cache=False).last_hidden_state)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in `dtype`; a later cast would round the rotary frequencies too, which stay in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
