"""A Llama converted from GGUF computes what the format means: llama.cpp's order of rows, untied from any one file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paca.quickstart.gguf import ENCODINGS, GGUF, GGUFError, Tensor
from paca.quickstart.smollm2 import convert

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123", "ab", "cd", "abcd", "12"]
OURS_TO_THEIRS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def to_llama_cpp(weight, heads):
    """Pairs of rows that are half a head apart, side by side, as llama.cpp's own converter puts them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def as_gguf(model, **changes):
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = to_llama_cpp(weight, 3 if "q_proj" in name else 1)
        parts = name.removesuffix(".weight").split(".", 3)
        theirs = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(".".join(parts)) or (
            f"blk.{parts[2]}.{OURS_TO_THEIRS[parts[3]]}"
        )
        data = np.frombuffer(np.ascontiguousarray(weight, dtype="<f4").tobytes(), np.uint8)
        tensors[f"{theirs}.weight"] = Tensor(weight.shape, ENCODINGS[0], data)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 24,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 3,
        "llama.attention.head_count_kv": 1,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["a b", "c d", "ab cd", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    return GGUF(metadata | changes, tensors)


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert(as_gguf(llama), folder)
    return folder


def test_the_converted_model_gives_the_same_logits_bit_for_bit(llama, folder):
    ids = torch.arange(12).reshape(2, 6)
    converted = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert converted.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, llama(ids).logits)


def test_rotation_and_epsilon_survive_the_way_through_the_file(folder):
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"]) == (10000.0, 1e-5)


def test_the_tokenizer_merges_splits_digits_and_keeps_control_tokens_whole(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>abcde12<|im_end|>")["input_ids"]) == [
        "<|im_start|>", "abcd", "e", "1", "2", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("abcde12")["input_ids"]) == "abcde12"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abcd"}], tokenize=False) == "abcd"
    assert "token_type_ids" not in tokenizer("ab")


@pytest.mark.parametrize("key", ["general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"])
def test_another_kind_of_model_is_refused_by_name(llama, tmp_path, key):
    with pytest.raises(GGUFError, match=rf"{key} is 'other'"):
        convert(as_gguf(llama, **{key: "other"}), tmp_path)
    assert list(tmp_path.iterdir()) == []
