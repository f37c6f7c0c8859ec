"""Times a training step of each option of docs/family.md beside LoRA's: `python benchmarks/family.py --time`.

One process, one thread. A few options at a time, so that their models fit in memory, are put beside one LoRA; they take
one step each in turn, in a new random order each round, on the same batch. What is reported is the median over rounds
of an option's time divided by LoRA's of the same round, so that a machine that slows down slows both.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from family import OPTIONS, adapted_with_lora, recipe_of, wide_warmup

REFERENCE = "lora"
AT_ONCE = 5  # models beside LoRA's
ROWS = 3  # of a batch


def measure(names: list[str], rounds: int, scratch: Path) -> dict[str, Any]:
    """Return, for each group of options, the seconds of every step by option.

    Args:
        names: options.
        rounds: timed steps of each; one more comes first.
        scratch: a folder for a warm-up's adapter.
    """
    torch.set_num_threads(1)
    batch: dict[str, Any] = {}
    groups = []
    others = [name for name in names if name != REFERENCE]
    for first in range(0, len(others), AT_ONCE):
        steps = {}
        for name in (*others[first : first + AT_ONCE], REFERENCE):
            print(f"making {name}", flush=True)
            model, batch = _model(name, scratch)
            steps[name] = _stepper(model, batch)
        groups.append(_timed(steps, rounds))
        del steps
        gc.collect()
    return {"rounds": rounds, "tokens": batch["input_ids"].numel(), "groups": groups}


def _model(name: str, scratch: Path) -> tuple[Any, dict[str, Any]]:
    """Make an option's model as `paca train` makes it, and the batch of all."""
    from paca import training
    from paca.pretrained import load_config, load_tokenizer

    keys = dict(OPTIONS[name])
    if name == "largest_change":  # which columns these are does not matter to the time
        keys["warmup_adapter"] = wide_warmup(scratch / "warmup")
    recipe = recipe_of(name, **keys, seed=0, random_seed=0, calibration_samples=ROWS, output_dir=str(scratch / name))
    config, tokenizer = load_config(recipe.run), load_tokenizer(recipe.run)
    length = training.sequence_length(recipe, config, tokenizer)
    data = training.load_data(recipe, tokenizer, length)
    make = adapted_with_lora if name == REFERENCE else training.adapted_model
    model = make(recipe, config, data, tokenizer, length, lambda line: None)
    assert data.train is not None
    collate = training._collator(recipe.with_run(pad_to_max_length=True), tokenizer, length)
    return model.train(), collate([data.train.dataset[row] for row in range(ROWS)])


def _stepper(model: Any, batch: Mapping[str, Any]) -> Callable[[], None]:
    """Return what takes one training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, names = random.Random(0), list(steps)
    gc.disable()  # a collection would fall into somebody's time
    try:
        for number in range(-1, rounds):
            gc.collect()
            order.shuffle(names)
            for name in names:
                start = time.process_time()
                steps[name]()
                took = time.process_time() - start
                if number >= 0:
                    seconds[name].append(round(took, 4))
            print(f"round {number + 1} of {rounds}: {', '.join(names)}", flush=True)
    finally:
        gc.enable()
    return seconds
