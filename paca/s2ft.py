"""Structured selection: whole heads and whole channels, chosen over all layers at once (S²FT, arXiv 2412.06289).

The input columns of an output projection belong to attention heads, those of a down projection to channels of the MLP.
Both are hidden units that one linear map makes and another reads, so that all columns of a unit can be put side by side
without changing what the model computes (`paca.permutation`). Units are drawn from all layers together: some layers
train many, some none.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from paca.config import PacaConfig
from paca.select import generator_for

# Who makes and who reads a hidden dimension of a block: (makers, reader).
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("w1", "w3"), "w2"),
)
ATTENTIONS = ((("q_proj", "k_proj", "v_proj"), "o_proj"), (("q_proj", "k_proj", "v_proj"), "out_proj"))
READERS = frozenset(reader for _, reader in (*MLPS, *ATTENTIONS))


@dataclass(frozen=True)
class Block:
    """A hidden dimension of the model: makers write it, the reader's input columns read it.

    Attributes:
        path: of the module that holds them.
        makers: names of the linears whose rows are its units; of an attention queries, keys and values.
        reader: name of the linear whose columns are its units.
        heads: query heads of an attention, 0 for an MLP.
        key_heads: key and value heads; each serves `heads / key_heads` query heads.
        width: columns of the reader.
    """

    path: str
    makers: tuple[str, ...]
    reader: str
    heads: int
    key_heads: int
    width: int

    @property
    def reader_path(self) -> str:
        """The reader's name in the model."""
        return f"{self.path}.{self.reader}".lstrip(".")

    @property
    def maker_paths(self) -> list[str]:
        """The makers' names in the model."""
        return [f"{self.path}.{maker}".lstrip(".") for maker in self.makers]

    def unit(self, whole_groups: bool) -> int:
        """Columns that are chosen together: a channel, a head, or all query heads of one key head."""
        if not self.heads:
            return 1
        return self.width // (self.key_heads if whole_groups else self.heads)


def blocks(model: nn.Module) -> dict[str, Block]:
    """Find the attentions and MLPs whose parts are plain linears, by the name of the reader."""
    found = {}
    for path, module in model.named_modules():
        for forms, attention in ((MLPS, False), (ATTENTIONS, True)):
            for makers, reader in forms:
                parts = [
                    part for n in (*makers, reader) if _is_linear(part := _below_adapters(getattr(module, n, None)))
                ]
                if len(parts) <= len(makers):
                    continue
                *making, reading = parts
                heads = key_heads = 0
                if attention:
                    size = _head_size(module, model)
                    heads, key_heads = reading.in_features // size, making[1].out_features // size
                    if making[0].out_features != reading.in_features or heads % key_heads:
                        continue
                elif any(part.out_features != reading.in_features for part in making):
                    continue
                block = Block(path, makers, reader, heads, key_heads, reading.in_features)
                found[block.reader_path] = block
    return found


def chosen(model: nn.Module, config: PacaConfig, targets: Mapping[str, nn.Module]) -> PacaConfig:
    """Return a copy of the config with columns drawn over all layers; `r` is their mean number a layer.

    All columns keep the strength `paca_alpha / r`, however many a layer has.

    Args:
        model: the base model.
        config: its `selection` is "s2ft".
        targets: what it targets; of these the output and down projections train, the others stay frozen.

    Raises:
        ValueError: if none of them reads heads or channels, or patterns would contradict the draw.
    """
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            "selection='s2ft' spreads columns over the layers itself; leave rank_pattern and alpha_pattern out"
        )
    known = {name: block for name, block in blocks(model).items() if name in targets}
    if not known:
        raise ValueError(
            f"selection='s2ft' trains {', '.join(sorted(READERS))} beside the linears that make their input, and "
            f"target_modules={config.target_modules!r} has none of them in this model"
        )
    made = copy.deepcopy(config)
    made.columns = {}
    for reader in sorted({block.reader for block in known.values()}):
        alike = {name: block for name, block in known.items() if block.reader == reader}
        for name, columns in _draw(alike, config, reader).items():
            made.columns[_only(name)] = columns
    made.target_modules = "|".join(key.removeprefix("^") for key in made.columns)
    made.exclude_modules = made.layers_to_transform = made.layers_pattern = None
    strength = config.paca_alpha / config.r
    made.alpha_pattern = {key: strength * len(columns) for key, columns in made.columns.items()}
    return made


def _draw(alike: Mapping[str, Block], config: PacaConfig, reader: str) -> dict[str, list[int]]:
    """Draw units from all blocks of one kind; returns the columns of each layer that got any."""
    sizes = {name: block.unit(config.copermute) for name, block in alike.items()}
    units = [(name, unit) for name, block in alike.items() for unit in range(block.width // sizes[name])]
    wanted = max(1, round(config.r * len(alike) / max(sizes.values())))
    if wanted > len(units):
        raise ValueError(
            f"r = {config.r} is more than the {next(iter(alike.values())).width} input columns of {reader}"
        )
    order = torch.randperm(len(units), generator=generator_for(config.random_seed or 0, f"s2ft:{reader}"), device="cpu")
    columns: dict[str, list[int]] = {}
    for number in sorted(order[:wanted].tolist()):
        name, unit = units[number]
        columns.setdefault(name, []).extend(range(unit * sizes[name], (unit + 1) * sizes[name]))
    return columns


def _below_adapters(part: object) -> object:
    return part.get_base_layer() if isinstance(part, BaseTunerLayer) else part


def _is_linear(part: object) -> TypeGuard[nn.Linear]:
    return isinstance(part, nn.Linear)


def _head_size(attention: nn.Module, model: nn.Module) -> int:
    size = getattr(attention, "head_dim", None)
    if isinstance(size, int):
        return size
    config = getattr(attention, "config", None) or getattr(model, "config", None)
    heads = int(getattr(attention, "num_heads", 0) or getattr(config, "num_attention_heads", 1))
    return int(attention.get_submodule("q_proj").out_features) // heads  # type: ignore[arg-type]


def _only(name: str) -> str:
    """A key that means this module and no other that ends alike."""
    return f"^{re.escape(name)}"
