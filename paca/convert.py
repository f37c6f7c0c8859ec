"""Turns a PaCA adapter into a LoRA adapter without loss, and back: A holds the one-hot rows of the trained columns.

W0 + s·B·A = W0 + s·Δ·Sᵀ with A = Sᵀ and B = Δ, so that merged weights have the same bits and every LoRA server can
serve the adapter.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from paca.config import PEFT_TYPE, PacaConfig, settings
from paca.errors import AdapterError
from paca.fingerprint import size_only
from paca.layer import PacaLayer
from paca.saved import (
    PREFIX,
    SavedAdapter,
    SavedLayer,
    from_tensors,
    read_adapter,
    read_config,
    refuse_full,
    to_tensors,
    write_adapter,
)

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def convert_to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return a `LoraConfig` and its tensors, as PEFT saves them, that do what a PaCA adapter of `model` does.

    Args:
        model: a PEFT model with a PaCA adapter.
        adapter_name: which adapter.

    Raises:
        ValueError: if there is no such PaCA adapter.
    """
    saved = adapter_of(model, adapter_name)
    saved.refuse_mask("a LoRA form")
    return _lora_config(saved), _lora_tensors(saved)


def adapter_of(model: nn.Module, adapter_name: str = "default") -> SavedAdapter:
    """Return an adapter of a PEFT model as if it had been saved and read again.

    Raises:
        ValueError: if there is no such PaCA adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter_name not in configs or configs[adapter_name].peft_type != PEFT_TYPE:
        found = ", ".join(f"{name} ({config.peft_type})" for name, config in configs.items()) or "none"
        raise ValueError(f"the model has no PaCA adapter {adapter_name!r}; it has: {found}")
    config = configs[adapter_name]
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    ours = copy.deepcopy(settings(config))
    if isinstance(config, PacaConfig):
        config.base_fingerprint = None  # of these tensors only
    widths = {m.name: size_only(m.grid[1]) for m in model.modules() if isinstance(m, PacaLayer)}
    ours.base_fingerprint = widths | (ours.base_fingerprint or {})
    return from_tensors(ours, tensors)


def export_lora(
    adapter_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, for_server: bool = False
) -> Path:
    """Write the LoRA form of a saved PaCA adapter to a new folder; stock PEFT loads it without paca.

    Args:
        adapter_dir: a folder written by `save_pretrained`.
        out_dir: must not exist, or be empty.
        for_server: use only what all LoRA servers read: one rank and one scale for all modules, no other tensors.
            Narrower modules are padded with zeros, and scales go into B, with the rounding that the adapted model has;
            merged weights keep their bits.

    Returns:
        `out_dir`.

    Raises:
        FileNotFoundError, FileExistsError, AdapterError: if either folder is not as said, the adapter is broken, or it
            trains what a server would not load.
    """
    refuse_full(Path(out_dir))
    saved = read_adapter(adapter_dir)
    saved.refuse_mask("a LoRA form")
    if for_server:
        saved.refuse_others("a LoRA server")
        return write_adapter(_server_config(saved), _server_tensors(saved), out_dir)
    return write_adapter(_lora_config(saved), _lora_tensors(saved), out_dir)


def export_prefix(adapter_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], r: int) -> Path:
    """Write the first `r` columns of every layer of an adapter, which was trained by prefixes, as an adapter.

    Strengths stay as they are; a run's recipe and tokenizer come with it. Which base it belongs to is checked by sizes
    only from then on.

    Args:
        adapter_dir: a saved PaCA adapter.
        out_dir: must not exist, or be empty.
        r: how many columns.

    Raises:
        FileNotFoundError, FileExistsError, AdapterError: if either folder is not as said, or a layer has fewer columns.
    """
    refuse_full(Path(out_dir))
    saved = read_adapter(adapter_dir)
    saved.refuse_mask("export by prefix")
    narrow = min(saved.layers, key=lambda name: len(saved.layers[name].index))
    if not 1 <= r <= len(saved.layers[narrow].index):
        raise AdapterError(
            f"--r must be from 1 to {len(saved.layers[narrow].index)}, the columns of {narrow}; found {r}"
        )
    layers = {
        name: SavedLayer(layer.index[:r].clone(), layer.delta[:, :r].contiguous(), layer.scale)
        for name, layer in saved.layers.items()
    }
    config = copy.deepcopy(saved.config)
    config.prefix_training = config.groups = None  # how it was trained, and not with so few columns
    config.rank_pattern = {}
    rank, alpha = _usual(layers)
    config.r, config.paca_alpha = rank, alpha  # type: ignore[assignment]
    config.alpha_pattern = {_only(n): _alpha(layer) for n, layer in layers.items() if _alpha(layer) != alpha}
    widths = {name: saved.width(name) for name in layers}
    config.base_fingerprint = {name: size_only(width) for name, width in widths.items() if width is not None} or None
    config.columns = {}
    return write_adapter(
        config, to_tensors(SavedAdapter(config, layers, saved.others)), out_dir, copied_from=adapter_dir
    )


def import_lora(lora_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Write a LoRA adapter each of whose A rows picks one column as a PaCA adapter, without loss.

    Such adapters are what `export_lora` writes, and what LoRA-FA (arXiv 2308.03303: A is frozen) gives when A was
    started one-hot. A row may scale its column; rows of zeros are dropped, rows of one column are added.

    Args:
        lora_dir: a folder that PEFT saved.
        out_dir: must not exist, or be empty.

    Returns:
        `out_dir`.

    Raises:
        FileNotFoundError, FileExistsError, AdapterError: if either folder is not as said, a row of A mixes columns, or
            the adapter has what PaCA has not (DoRA, embeddings).
    """
    source = Path(lora_dir)
    weights = source / SAFETENSORS_WEIGHTS_NAME
    refuse_full(Path(out_dir))
    if not weights.is_file():
        raise FileNotFoundError(f"{source} is not a saved adapter: there is no {SAFETENSORS_WEIGHTS_NAME} in it")
    config: Any = read_config(source)
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{source} holds a {getattr(config.peft_type, 'value', config.peft_type)} adapter, not LoRA")
    if config.use_dora:
        raise AdapterError(f"{source} uses DoRA, which scales whole rows of the weight; PaCA has no such part")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise AdapterError(f"{weights} is truncated or damaged: {error}") from error
    saved = _from_lora(config, tensors)
    return write_adapter(saved.config, to_tensors(saved), out_dir)


def _lora_config(saved: SavedAdapter) -> LoraConfig:
    ours = saved.config
    return LoraConfig(
        **_shared(ours),
        r=ours.r,
        lora_alpha=ours.paca_alpha,
        target_modules=ours.target_modules,
        exclude_modules=ours.exclude_modules,
        layers_to_transform=ours.layers_to_transform,
        layers_pattern=ours.layers_pattern,
        rank_pattern=dict(ours.rank_pattern),
        alpha_pattern=dict(ours.alpha_pattern),
        bias="lora_only" if ours.bias == "paca_only" else ours.bias,
        modules_to_save=ours.modules_to_save,
    )


def _server_config(saved: SavedAdapter) -> LoraConfig:
    rank = max(len(layer.index) for layer in saved.layers.values())
    return LoraConfig(**_shared(saved.config), r=rank, lora_alpha=rank, target_modules=sorted(saved.layers))


def _shared(ours: PacaConfig) -> dict[str, Any]:
    return {
        "task_type": ours.task_type,
        "base_model_name_or_path": ours.base_model_name_or_path,
        "revision": ours.revision,
        "inference_mode": ours.inference_mode,
        "lora_dropout": 0.0,
        "fan_in_fan_out": ours.fan_in_fan_out,
    }


def _lora_tensors(saved: SavedAdapter) -> dict[str, Tensor]:
    """Name and expand columns and deltas to LoRA's two matrices; other tensors pass."""
    lora = {key: tensor.contiguous() for key, tensor in saved.others.items()}
    for name, layer in saved.layers.items():
        lora[f"{PREFIX}{name}{LORA_A}"] = _one_hot(saved, name, layer)
        lora[f"{PREFIX}{name}{LORA_B}"] = layer.delta.contiguous()
    return lora


def _server_tensors(saved: SavedAdapter) -> dict[str, Tensor]:
    """The same with one rank, that of the widest module, and a scale of 1."""
    rank = max(len(layer.index) for layer in saved.layers.values())
    lora: dict[str, Tensor] = {}
    for name, layer in saved.layers.items():
        missing = rank - len(layer.index)
        lora[f"{PREFIX}{name}{LORA_A}"] = F.pad(_one_hot(saved, name, layer), (0, 0, 0, missing)).contiguous()
        lora[f"{PREFIX}{name}{LORA_B}"] = F.pad(layer.update(), (0, missing)).contiguous()
    return lora


def _one_hot(saved: SavedAdapter, name: str, layer: SavedLayer) -> Tensor:
    """LoRA's A, (r, in)."""
    width = saved.width(name)
    if width is None:
        raise AdapterError(
            f"the adapter does not record the width of {name} (it was saved by another library); load it on its base "
            "model and call paca.convert_to_lora(model), or save it again from there"
        )
    return F.one_hot(layer.index, width).to(layer.delta.dtype).contiguous()


def _from_lora(config: LoraConfig, tensors: dict[str, Tensor]) -> SavedAdapter:
    layers: dict[str, SavedLayer] = {}
    widths: dict[str, int] = {}
    others: dict[str, Tensor] = {}
    for key, a in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(LORA_A)
        if key.endswith(LORA_A):
            b = tensors.get(f"{PREFIX}{name}{LORA_B}")
            if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                found = "none" if b is None else str(tuple(b.shape))
                raise AdapterError(f"{name}: A is {tuple(a.shape)}, and B must be (out, {a.shape[0]}); found {found}")
            widths[name] = a.shape[1]
            layers[name] = _columns_of(name, a, b, _lora_scale(config, name, a.shape[0]))
        elif ".lora_" in key and not key.endswith(LORA_B):
            raise AdapterError(f"{key} has no counterpart in PaCA, which trains columns of linear layers only")
        elif not key.endswith(LORA_B):
            others[key] = a
    if not layers:
        raise AdapterError("the adapter has no LoRA matrices of linear layers")
    return SavedAdapter(_paca_config(config, layers, widths), layers, others)


def _lora_scale(config: LoraConfig, name: str, rank: int) -> float:
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _columns_of(name: str, a: Tensor, b: Tensor, scale: float) -> SavedLayer:
    """Read columns off LoRA's matrices: row k of A is c·eⱼ, so that column j of the weight gets c·b[:, k]."""
    picks = a != 0  # (r, in)
    if (mixed := (picks.sum(1) > 1).nonzero().flatten()).numel():
        row = int(mixed[0])
        raise AdapterError(
            f"{name}: row {row} of A mixes {int(picks[row].sum())} columns, so this LoRA is no PaCA adapter. Only "
            "one-hot rows convert without loss; merge the adapter into the model instead"
        )
    rows = picks.any(1).nonzero().flatten()
    if not len(rows):
        raise AdapterError(f"{name}: A is zero, so the adapter changes nothing there; leave the module out")
    columns = picks[rows].int().argmax(1)
    factors = a[rows, columns]
    index, position = columns.unique(return_inverse=True)
    values = b[:, rows] if bool((factors == 1).all()) else b[:, rows] * factors
    if len(index) == len(rows):
        return SavedLayer(index, values[:, position.argsort()].contiguous(), scale)
    added = values.new_zeros(len(b), len(index)).index_add_(1, position, values)
    return SavedLayer(index, added, scale)


def _paca_config(config: LoraConfig, layers: dict[str, SavedLayer], widths: dict[str, int]) -> PacaConfig:
    """Give every layer the rank and the scale it has; those of most layers are the config's own."""
    rank, alpha = _usual(layers)
    return PacaConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
        r=rank,
        paca_alpha=alpha,  # type: ignore[arg-type]  # a whole number where it is one
        rank_pattern={_only(n): len(layer.index) for n, layer in layers.items() if len(layer.index) != rank},
        alpha_pattern={_only(n): _alpha(layer) for n, layer in layers.items() if _alpha(layer) != alpha},
        target_modules=sorted(layers),
        fan_in_fan_out=config.fan_in_fan_out,
        bias="paca_only" if config.bias == "lora_only" else config.bias,
        modules_to_save=config.modules_to_save,
        columns={},  # they are in the file
        base_fingerprint={name: size_only(width) for name, width in widths.items()},
    )


def _usual(layers: dict[str, SavedLayer]) -> tuple[int, float]:
    """Rank and alpha of most layers."""
    return Counter((len(layer.index), _alpha(layer)) for layer in layers.values()).most_common(1)[0][0]


def _alpha(layer: SavedLayer) -> float:
    """The alpha whose quotient by the rank is the layer's scale, to the bit."""
    guess = layer.scale * len(layer.index)
    for alpha in (round(guess), guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0.0)):
        if alpha / len(layer.index) == layer.scale:
            return alpha
    raise AdapterError(f"no alpha gives a scale of {layer.scale} at rank {len(layer.index)}")


def _only(name: str) -> str:
    """A pattern that means this module and no other that ends alike."""
    return f"^{re.escape(name)}"
