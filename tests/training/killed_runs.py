"""Runs recipes in children that kill themselves. Started by test_resume.py in a process of its own.

Everything is imported once and children are forked, because imports take longer than these runs. Usage:
killed_runs.py RECIPE FOLDER writes FOLDER/<name>, one output folder for each kill, and FOLDER/exits.json.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import matplotlib.figure  # noqa: F401 - so that the children need not
import torch
import transformers
from peft import peft_model

from paca import training
from paca.cli import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_die(path: Path, whole: bytes) -> None:
    with path.open("wb") as file:
        file.write(whole[: len(whole) // 2])
        file.flush()
    die()


def in_the_middle_of_a_step() -> None:
    step, calls = transformers.Trainer.training_step, []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:  # the second half of step 5
            die()
        return step(self, *args, **kwargs)

    transformers.Trainer.training_step = training_step


def before_the_first_checkpoint() -> None:
    transformers.Trainer.training_step = lambda *args, **kwargs: die()


def writing_the_optimizer() -> None:
    save = torch.save

    def half(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, file, *args, **kwargs)
        if str(file).endswith("checkpoint-8/optimizer.pt"):
            write_half_and_die(Path(file), Path(file).read_bytes())

    torch.save = half


def writing_the_adapter() -> None:
    save = peft_model.safe_save_file

    def half(tensors: Any, file: str, *args: Any, **kwargs: Any) -> None:
        save(tensors, file, *args, **kwargs)
        if "checkpoint-8" in file:
            write_half_and_die(Path(file), Path(file).read_bytes())

    peft_model.safe_save_file = half


def writing_the_state() -> None:
    save = transformers.TrainerState.save_to_json

    def half(self: Any, file: str) -> None:
        save(self, file)
        if "checkpoint-8" in file:
            write_half_and_die(Path(file), Path(file).read_bytes())

    transformers.TrainerState.save_to_json = half


def deleting_an_old_checkpoint() -> None:
    def remove(folder: str, **kwargs: Any) -> None:
        (Path(folder) / "optimizer.pt").unlink()
        die()

    shutil.rmtree = remove


def writing_the_results() -> None:
    """All steps are done and the last checkpoint is written."""
    training._save = lambda *args, **kwargs: die()


KILLS: dict[str, Callable[[], None]] = {
    "before_the_first_checkpoint": before_the_first_checkpoint,
    "in_the_middle_of_a_step": in_the_middle_of_a_step,
    "writing_the_adapter": writing_the_adapter,
    "writing_the_optimizer": writing_the_optimizer,
    "writing_the_state": writing_the_state,
    "deleting_an_old_checkpoint": deleting_an_old_checkpoint,
    "writing_the_results": writing_the_results,
}


def run(words: list[str], log: Path, arm: Callable[[], None] | None = None) -> int:
    """Run the command in a child; return its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                if arm:
                    arm()
                status = main(words)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    recipe, folder = Path(sys.argv[1]), Path(sys.argv[2])
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    torch.set_num_threads(1)
    # In this process, so that the children find every cache filled.
    assert main(["train", str(recipe), "--output_dir", str(folder / "uninterrupted")]) == 0
    gc.freeze()  # no collection in a child need look at what the parent holds
    exits = {}
    for name, arm in KILLS.items():
        out, log = folder / name, folder / f"{name}.log"
        words = ["train", str(recipe), "--output_dir", str(out)]
        killed = run(words, log, arm)
        shutil.copytree(out, folder / f"{name}-killed")
        exits[name] = [killed, run([*words, "--resume_from_checkpoint", "auto"], log)]
    (folder / "exits.json").write_text(json.dumps(exits))
