"""Sizes of well-known models, so that their memory can be told without a hub. They are published facts, no files."""

from __future__ import annotations

from typing import Any

# layers, hidden, ffn, heads, key and value heads, vocabulary, positions
# Llama 2: arXiv 2307.09288 and its model cards; Llama 3 and 3.1: arXiv 2407.21783, table 3.
_LLAMA = {
    "llama-2-7b": (32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": (40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256, 8192),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, 131072),
    "llama-3.1-70b": (80, 8192, 28672, 64, 8, 128256, 131072),
}
NAMES = tuple(_LLAMA)


def config_of(name: str) -> Any:
    """The transformers configuration of a model by its name, in bfloat16.

    Raises:
        KeyError: if its sizes are not known here.
    """
    from transformers import LlamaConfig

    layers, hidden, ffn, heads, kv_heads, vocabulary, positions = _LLAMA[name]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    config.dtype = "bfloat16"
    return config
