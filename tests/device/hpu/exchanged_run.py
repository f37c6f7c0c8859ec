"""One small training by the Trainer of whatever environment runs it, saved half-way.

    python exchanged_run.py FOLDER CHECKPOINT

trains twice on the CPU, from the start and from a checkpoint of the other Trainer, and writes what was held at the
moments that matter to FOLDER/held.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import adapted, layers_of, llama
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

import paca

STEPS, HALF = 8, 4


class SameRows(Dataset):
    """Rows that are all the same, because the two Trainers shuffle in different orders."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        numbers = 3 + torch.arange(10) % 6
        labels = numbers.clone()
        labels[0] = -100  # transformers 4.55 counts it among the targets that it divides by, 5 does not
        return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers), "labels": labels}


def held(trainer: Any) -> dict[str, Any]:
    """All that goes on from step to step, in a form that both kinds of Trainer have."""
    model, optimizer = trainer.model, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    deltas = [delta for layer in layers_of(model) for delta in layer.paca_delta.values()]
    steps = {
        int(group.get("step", optimizer.state[parameter].get("step", 0)))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    }
    return {
        "deltas": [delta.detach().cpu().clone() for delta in deltas],
        "columns": [layer.get_base_layer().weight.detach().cpu().clone() for layer in layers_of(model)],
        "means": [optimizer.state[delta]["exp_avg"].cpu().clone() for delta in deltas if delta in optimizer.state],
        "squares": [optimizer.state[delta]["exp_avg_sq"].cpu().clone() for delta in deltas if delta in optimizer.state],
        "steps": steps,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "weight_decay": optimizer.param_groups[0]["weight_decay"],
        "scheduler": (trainer.lr_scheduler.last_epoch, trainer.lr_scheduler.get_last_lr()[0]),
        "global_step": trainer.state.global_step,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "random": torch.random.get_rng_state(),
    }


class Look(TrainerCallback):
    """Notes what the Trainer holds when it begins or resumes, before each step, when it saves and at its end."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.found: dict[str, dict[str, Any]] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.found["begun"] = held(self.trainer)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.found.setdefault("first step", held(self.trainer))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == HALF:
            self.found["saved"] = held(self.trainer)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.found["ended"] = held(self.trainer)


def run(folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train, and return what was held when."""
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-2,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_steps": HALF,
        "report_to": [],
        "disable_tqdm": True,
    }
    args = paca.training_arguments_class()(**{**given, **paca.get_backend().training_arguments()})
    set_seed(5)
    model = adapted(llama(attn_implementation="eager", use_cache=False))
    look = Look()
    look.trainer = paca.trainer_class()(model=model, args=args, train_dataset=SameRows(), callbacks=[look])
    look.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    paca.verify(model)
    return look.found


if __name__ == "__main__":
    import transformers

    paca.set_backend("cpu")
    place, checkpoint = map(Path, sys.argv[1:])
    runs = {"whole": run(place / "whole"), "resumed": run(place / "resumed", checkpoint)}
    torch.save({"transformers": transformers.__version__, **runs}, place / "held.pt")
