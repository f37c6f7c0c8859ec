"""A PaCA adapter as it lies in a folder: its settings, and for each layer the columns, their deltas and the scale."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paca.compress import expanded
from paca.config import PEFT_TYPE, PacaConfig, settings
from paca.entries import from_file, holds_masks, to_file
from paca.errors import AdapterError
from paca.fingerprint import in_features_of
from paca.whole import new_folder

PREFIX = "base_model.model."
DELTA, INDICES = ".paca_delta", ".paca_indices"


# What else of a run's folder makes `paca evaluate` and `paca generate` work on a copy.
_COMPANIONS = ("recipe.yaml", "tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class SavedLayer:
    """One layer's part of an adapter: the weight becomes `W0[:, index] + scale·delta` there."""

    index: Tensor  # (r,) int64, sorted
    delta: Tensor  # (out, r)
    scale: float

    def update(self) -> Tensor:
        """Return `scale·delta`, (out, r), with the rounding that the adapted model has."""
        return self.delta if self.scale == 1.0 else self.delta * self.scale


@dataclass(frozen=True)
class SavedAdapter:
    """A whole adapter on the CPU.

    Attributes:
        config: its settings.
        layers: by module name in the base model.
        others: tensors that are no columns (`modules_to_save`, biases), by their key in the file.
    """

    config: PacaConfig
    layers: Mapping[str, SavedLayer]
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def width(self, name: str) -> int | None:
        """Return the number of inputs of a layer; None if the file does not say."""
        recorded = (self.config.base_fingerprint or {}).get(name)
        return None if recorded is None else in_features_of(recorded)

    def refuse_mask(self, what: str) -> None:
        """Refuse an adapter that trains single entries.

        Raises:
            AdapterError: saying what is only for columns.
        """
        if self.config.masked:
            raise AdapterError(
                f"{what} is for adapters of columns, and this one trains single entries ({self.config.selection}); "
                "paca merge writes its model as an ordinary checkpoint"
            )

    def refuse_others(self, who: str) -> None:
        """Refuse an adapter that trains more than columns.

        Raises:
            AdapterError: naming what else it trains.
        """
        if self.others:
            modules = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in self.others})
            raise AdapterError(
                f"{who} takes trained columns only, and this adapter also trains {', '.join(modules)} "
                "(modules_to_save or bias); merge it into the model instead (paca merge)"
            )


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read a folder written by `save_pretrained`, of paca or of PEFT's own PaCA, compressed or not.

    Raises:
        FileNotFoundError: if it is not a saved adapter.
        AdapterError: if it holds another kind of adapter, or is damaged; the message names the layer.
    """
    source = Path(folder)
    weights = source / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{source} is not a saved adapter: there is no {SAFETENSORS_WEIGHTS_NAME} in it")
    config: Any = read_config(source)
    if config.peft_type != PEFT_TYPE:
        raise AdapterError(f"{source} holds a {getattr(config.peft_type, 'value', config.peft_type)} adapter, not PaCA")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise AdapterError(f"{weights} is truncated or damaged: {error}") from error
    return from_tensors(config, tensors)


def read_config(folder: Path) -> PeftConfig:
    """Read the settings of a saved adapter of any kind.

    Raises:
        FileNotFoundError: if there are none.
        AdapterError: if they are damaged, or refused by the kind of adapter that they name.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a saved adapter: there is no {CONFIG_NAME} in it")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{file} is damaged, or not an adapter's: {error}") from error
    return config


def from_tensors(config: Any, tensors: Mapping[str, Tensor]) -> SavedAdapter:
    """Sort the tensors of an adapter, named as PEFT saves them, by layer.

    Raises:
        AdapterError: if they do not belong together; the message names the layer.
    """
    ours = settings(config)
    if ours.masked != holds_masks(tensors):
        held, said = ("masks", "columns") if holds_masks(tensors) else ("columns", "a mask")
        raise AdapterError(f"the adapter's tensors are {held}, and its config says {said}: {ours.selection}")
    tensors = from_file(expanded(tensors))
    layers: dict[str, SavedLayer] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module = key.removesuffix(DELTA)
        if key.endswith(INDICES):
            continue
        if module == key:
            others[key] = tensor
            continue
        name = module.removeprefix(PREFIX)
        if f"{module}{INDICES}" not in tensors:
            raise AdapterError(f"the adapter has no column numbers for {name}: {module}{INDICES} is missing")
        index = tensors[f"{module}{INDICES}"].detach().cpu().long()
        delta = tensor.detach().cpu()
        if delta.dim() != 2 or index.shape != delta.shape[1:]:
            raise AdapterError(f"{name}: {tuple(index.shape)} column numbers do not fit deltas of {tuple(delta.shape)}")
        if len(index.unique()) != len(index) or (index < 0).any():
            raise AdapterError(f"{name}: column numbers must differ and not be negative, found {index[:99].tolist()}")
        order = index.argsort()
        if not torch.equal(order, torch.arange(len(order))):
            index, delta = index[order], delta[:, order].contiguous()
        alpha = ours.alpha_pattern.get(get_pattern_key(list(ours.alpha_pattern), name), ours.paca_alpha)
        rank = ours.rank_pattern.get(get_pattern_key(list(ours.rank_pattern), name), ours.r)
        layers[name] = SavedLayer(index, delta, alpha / (rank if ours.masked else len(index)))
    if not layers:
        raise AdapterError("the adapter has no PaCA columns")
    return SavedAdapter(ours, layers, others)


def to_tensors(adapter: SavedAdapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter, named as PEFT saves them."""
    tensors = dict(adapter.others)
    for name, layer in adapter.layers.items():
        tensors[f"{PREFIX}{name}{DELTA}"] = layer.delta.contiguous()
        tensors[f"{PREFIX}{name}{INDICES}"] = layer.index.contiguous()
    return to_file(tensors) if adapter.config.masked else tensors


def write_adapter(
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    copied_from: str | os.PathLike[str] | None = None,
) -> Path:
    """Write an adapter to a new folder, which appears when it is whole.

    Args:
        config: its settings.
        tensors: named as PEFT saves them.
        folder: must not exist, or be empty.
        copied_from: another adapter's folder, whose recipe and tokenizer serve this one too.

    Raises:
        FileExistsError: if the folder holds something.
    """
    target = Path(folder)
    refuse_full(target)
    with new_folder(target) as unfinished:
        save_file(dict(tensors), unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        copy.deepcopy(config).save_pretrained(str(unfinished))  # saving clears what belongs to these tensors only
        if copied_from is not None:
            for file in (file for pattern in _COMPANIONS for file in Path(copied_from).glob(pattern)):
                shutil.copyfile(file, unfinished / file.name)
    return target


def refuse_full(target: Path) -> None:
    """Refuse to write where something is.

    Raises:
        FileExistsError: naming the folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty; choose a new folder")
