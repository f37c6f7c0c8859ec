"""Columns that moved most in a warm-up: the mask of sparse fine-tuning (arXiv 2204.02292), by columns.

A wide adapter trains for a short while; the columns whose update is largest then train from the pretrained values, and
nothing else does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from paca.config import PacaConfig
from paca.errors import BaseMismatchError
from paca.layer import in_out_features
from paca.saved import SavedAdapter, read_adapter
from paca.select import best_columns, shared_name


def largest_changes(config: PacaConfig, targets: Mapping[str, nn.Module]) -> PacaConfig:
    """Return a copy of the config with the columns that changed most in its `warmup_adapter`.

    Layers that read the same input are ranked together, if `share_columns`.

    Raises:
        FileNotFoundError, AdapterError: if the warm-up is no saved adapter, or trains single entries.
        BaseMismatchError: if a layer of it has another shape.
        ValueError: if it did not train a targeted layer, or trained fewer columns there than are wanted.
    """
    warmup = read_adapter(str(config.warmup_adapter))
    warmup.refuse_mask("selection='largest_change'")
    made = copy.deepcopy(config)
    made.columns = {}
    for name, module in targets.items():
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        if name not in warmup.layers or len(warmup.layers[name].index) < rank:
            found = len(warmup.layers[name].index) if name in warmup.layers else 0
            raise ValueError(
                f"warmup_adapter {config.warmup_adapter} trained {found} columns of {name}, and {rank} are to be "
                "chosen of them; warm up with a larger r and the same target_modules"
            )
        _refuse_other_shape(name, module, warmup, str(config.warmup_adapter))
        row = [n for n in targets if n == name or (config.share_columns and shared_name(n) == shared_name(name))]
        numbers = torch.cat([warmup.layers[n].index for n in row if n in warmup.layers])
        moved = torch.cat([warmup.layers[n].update().double().square().sum(0) for n in row if n in warmup.layers])
        scores = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64).index_add_(0, numbers, moved)
        made.columns[name] = best_columns(scores, rank).tolist()
    return made


def _refuse_other_shape(name: str, module: nn.Module, warmup: SavedAdapter, folder: str) -> None:
    width, height = in_out_features(module)
    rows, recorded = len(warmup.layers[name].delta), warmup.width(name) or width
    if (width, height) != (recorded, rows) or int(warmup.layers[name].index[-1]) >= width:
        raise BaseMismatchError(
            f"warmup_adapter {folder} was trained on another base model: {name} maps {width} to {height} here, and "
            f"{recorded} to {rows} there"
        )
