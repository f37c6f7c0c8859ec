"""`paca estimate`: the memory of training a model by several methods, and what fits on which device."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from paca.estimate.architectures import NAMES, config_of
from paca.estimate.fit import (
    ALLOCATOR_SHARE,
    CONTEXT_BYTES,
    Device,
    devices,
    largest_batch,
    longest_sequence,
    needed,
)
from paca.estimate.methods import METHODS, Method, with_gemm_of
from paca.estimate.prediction import adapted_model
from paca.estimate.step import CannotRun, Footprint, Model, Work, footprint
from paca.estimate.table import table
from paca.recipe import Given, Recipe, RecipeError, read_file, read_words, resolve
from paca.versions import versions

_NEEDLESS = {"output_dir": "runs/estimate"}  # keys that a recipe must have and a prediction does not use
_ALWAYS = 4096  # tokens up to which a longest sequence is sought for a model that states no limit


@dataclass(frozen=True)
class Prediction:
    """One method's memory at the recipe's batch, and what fits on each device."""

    label: str
    trained: int
    memory: Footprint
    fits: Mapping[str, Mapping[str, Any]]

    def raw(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "label": self.label,
            "trained": self.trained,
            "peak_bytes": self.memory.peak,
            "needed_bytes": needed(self.memory.peak),
            "kept_for_backward_bytes": self.memory.kept,
            "gradient_bytes": max(use.get("gradients", 0) for use in self.memory.stages.values()),
            "bytes_at_peak": dict(self.memory.at_peak),
            "fits": self.fits,
        }


def run(options: argparse.Namespace, words: list[str]) -> None:
    """Predict and print.

    Raises:
        RecipeError: for a model that is not found, a key that is none, an adapter that does not fit the model.
    """
    from paca.pretrained import in_short
    from paca.whole import write_text

    given = list(words)
    if not words or words[0].startswith("--"):
        raise RecipeError("say which model: a folder, a config.json, a name on the hub or of a known size, or a recipe")
    try:
        cards = devices(options.gpu) if options.gpu else []
        chosen = _methods(options.methods)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    recipe, config = _recipe_and_config(words[0], read_words(words[1:]))
    try:
        result = predict(recipe, config, cards, chosen)
    except (ValueError, TypeError) as error:
        raise RecipeError(in_short(error)) from error
    except CannotRun as error:
        raise RecipeError(f"this model cannot be run on shapes alone: {error}") from error
    print("\n".join(table(result)))
    if options.json:
        write_text(options.json, json.dumps({"command": _command(options, given)} | result, indent=1))
        print(f"\nwritten to {options.json}")


def predict(recipe: Recipe, config: Any, cards: Sequence[Device], names: Sequence[str]) -> dict[str, Any]:
    """Predict each method's memory; returns what `--json` writes.

    Raises:
        CannotRun: if the model looks at values.
        ValueError, TypeError: if the adapter does not fit it.
    """
    import torch
    from tqdm import tqdm

    from paca.training import DEFAULT_LENGTH

    model = adapted_model(recipe, config)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = recipe.run.max_length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit and length > limit:
        raise ValueError(f"max_length {length} is more than the {limit} tokens this model was made for")
    sequences = int(recipe.training.get("per_device_train_batch_size", 8))
    work = Work.of(recipe, sequences, length)
    found = {}
    # In float32 the adapters have one dtype anyway.
    chosen = [name for name in names if not (METHODS[name].low and model.dtype == torch.float32)]
    for name in tqdm(chosen, unit="method", leave=False, disable=not (cards and sys.stderr.isatty())):
        method = METHODS[name]
        if method.weight_format != "none" and recipe.run.quantization != "none":
            method = replace(method, weight_format=recipe.run.quantization)
        method = with_gemm_of(recipe, method)
        fits = {
            card.name: _fits(model, method, recipe, card, sequences, length, limit or max(_ALWAYS, length))
            for card in cards
        }
        label, memory = method.label(model.dtype), footprint(model, method, work)
        found[name] = Prediction(label, _trained(model, method), memory, fits).raw()
    parameters, linears, _, _ = model.sizes()
    return {
        "what": "predicted from shapes, not measured",
        "model": recipe.run.model_name_or_path,
        "parameters": parameters,
        "parameters_in_linears": linears,
        "dtype": str(model.dtype).removeprefix("torch."),
        "r": model.settings.r,
        "work": asdict(work),
        "assumed": {"allocator_share": ALLOCATOR_SHARE, "context_bytes": CONTEXT_BYTES},
        "packages": versions("transformers", "peft"),
        "methods": found,
    }


def _fits(
    model: Model, method: Method, recipe: Recipe, card: Device, sequences: int, length: int, limit: int
) -> dict[str, Any]:
    """What a device has room for, with gradient checkpointing and without."""
    told: dict[str, Any] = {"bytes": card.bytes}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):

        def work_of(sequences: int, length: int, checkpointing: bool = checkpointing) -> Work:
            return replace(Work.of(recipe, sequences, length), checkpointing=checkpointing)

        told[name] = {
            "fits": card.holds(footprint(model, method, work_of(sequences, length)).peak),
            "longest_sequence": longest_sequence(model, method, work_of, sequences, card, limit),
            "largest_batch": largest_batch(model, method, work_of, length, card),
        }
    return told


def _trained(model: Model, method: Method) -> int:
    """How many values the adapters have."""
    _, _, inputs, outputs = model.sizes()
    return outputs + (inputs if method.family == "lora" else 0)


def _methods(text: str | None) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--methods: {unknown[0]!r} is no method; there are {', '.join(METHODS)}")
    return names


def _recipe_and_config(target: str, given: dict[str, Given]) -> tuple[Recipe, Any]:
    """The recipe to predict for, and the model's configuration."""
    from paca.pretrained import load_config

    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml"):
        recipe = resolve(read_file(path) | given)
        return recipe, load_config(recipe.run)
    least = {"model_name_or_path": target, "per_device_train_batch_size": 1, **_NEEDLESS}
    recipe = resolve({key: Given(value, "paca estimate") for key, value in least.items()} | given)
    if target in NAMES and not path.exists():
        return recipe, config_of(target)
    if path.is_file():
        return recipe, _config_in(path)
    try:
        return recipe, load_config(recipe.run)
    except RecipeError as error:
        if path.exists():
            raise
        raise RecipeError(f"{error}\nSizes that need no file are known of {', '.join(NAMES)}") from error


def _config_in(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file))
    except Exception as error:  # of many types, for settings that contradict themselves
        raise RecipeError(f"{file} is no model's configuration: {error}") from error


def _command(options: argparse.Namespace, words: Sequence[str]) -> str:
    """What to type to get the result again."""
    more = [word for key in ("methods", "gpu") if (said := getattr(options, key)) for word in (f"--{key}", said)]
    return shlex.join(["paca", "estimate", *words, *more])
