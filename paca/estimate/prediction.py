"""What a recipe trains, and the memory of one of its steps: the part of `--dry-run` that is about the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from paca.estimate.methods import method_of
from paca.estimate.step import KINDS, CannotRun, Footprint, Model, Work, footprint
from paca.quantising import compute_dtype
from paca.recipe import Recipe
from paca.s2ft import READERS


@dataclass(frozen=True)
class Estimate:
    """Counts of a recipe's parameters and the memory of a step; no `memory` where shapes are not enough: see `remark`.

    Attributes:
        trainable, total: parameters.
        layers: how many are adapted.
        memory: bytes by kind.
        work: the batch.
        remark: what the prediction leaves out.
    """

    trainable: int
    total: int
    layers: int
    memory: Footprint | None
    work: Work
    remark: str = ""

    def lines(self) -> list[str]:
        """What `--dry-run` prints."""
        share = 100 * self.trainable / self.total
        batch = f"{self.work.sequences} x {self.work.length} tokens"  # dynamic padding may make them shorter
        remark = f" ({self.remark})" if self.remark else ""
        lines = [f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"]
        if self.memory is None:
            return [*lines, f"memory of one training step at {batch}: not estimated{remark}"]
        use = self.memory.at_peak
        return [
            *lines,
            f"memory of one training step of {batch} when most is in use, {self.layers} layers adapted{remark}:",
            *(f"  {label:<21} {size(use[kind])}" for kind, label in KINDS.items() if use.get(kind)),
            f"  {'total':<21} {size(self.memory.peak)}",
            *([] if use.get("gradients") else ["Gradients, as large as what trains, are made after that."]),
            "Found by a run on shapes alone. What the allocator loses and the framework itself come on top.",
        ]


def estimate(recipe: Recipe, config: Any, length: int, classes: int = 0) -> Estimate:
    """Count parameters and bytes for one training step.

    Args:
        recipe: a checked recipe.
        config: the model's transformers configuration.
        length: tokens of one sequence.
        classes: how many classes a classification has.

    Raises:
        ValueError, TypeError: if the adapter does not fit the model.
    """
    import torch
    from peft import get_peft_model

    from paca.layer import PacaLayer

    if classes:
        config.num_labels = classes
    model = adapted_model(recipe, config)
    with torch.device("meta"):
        network = get_peft_model(model.empty(), model.settings, low_cpu_mem_usage=True)
    trainable, total = network.get_nb_trainable_parameters()
    layers = sum(isinstance(module, PacaLayer) for module in network.modules())
    work = Work.of(recipe, int(recipe.training.get("per_device_train_batch_size", 8)), length)
    try:
        memory = footprint(model, method_of(recipe), work)
    except CannotRun as error:
        return Estimate(trainable, total, layers, None, work, str(error))
    return Estimate(trainable, total, layers, memory, work, memory.remark)


def adapted_model(recipe: Recipe, config: Any) -> Model:
    """What a recipe trains of the model with this configuration."""
    from paca.training import adapter_config

    # How columns are chosen changes neither counts nor bytes, and the other ways need values or another adapter.
    settings = adapter_config(recipe)
    targets = settings.target_modules
    if settings.selection == "s2ft":  # of the targets it trains these, `r` columns of each in the mean
        named = READERS if targets is None or isinstance(targets, str) else set(targets) & READERS
        targets = targets if isinstance(targets, str) and targets != "all-linear" else sorted(named)
    alike = "mask_random" if settings.masked else "random"
    settings = replace(settings, selection=alike, copermute=False, warmup_adapter=None, target_modules=targets)
    return Model(config, recipe.run.task, compute_dtype(recipe.run, config), settings, recipe.run.trust_remote_code)


def size(number: int) -> str:
    """A number of bytes for people, in a column."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale / 10:
            return f"{number / scale:8.2f} {unit}"
    return f"{number / 2**10:8.2f} KiB"
