"""A run that is killed at any moment and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_llama, write_jsonl
from filelock import FileLock

from paca.checkpoint import newest_complete

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KILLS = {
    # where the run dies -> the newest complete checkpoint then
    "before_the_first_checkpoint": None,
    "in_the_middle_of_a_step": 4,
    "writing_the_adapter": 4,
    "writing_the_optimizer": 4,
    "writing_the_state": 4,
    "deleting_an_old_checkpoint": 8,
    "writing_the_results": 11,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folders of an uninterrupted run and of one killed and resumed run for each kill."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make_runs(tmp_path_factory.mktemp("runs"))
    shared = tmp_path_factory.getbasetemp().parent / "killed_runs"  # by all workers; the first makes them
    with FileLock(f"{shared}.lock"):
        return shared if (shared / "exits.json").exists() else make_runs(shared)


def make_runs(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    # Dropout draws from the random state at every step, so that a wrong one would show.
    make_llama(folder / "llama", attention_dropout=0.2)
    rows = [{"prompt": f"{n} then ", "completion": " ".join([str(n)] * (1 + n % 4))} for n in range(30)]
    write_jsonl(folder / "train.jsonl", rows[:24])
    write_jsonl(folder / "eval.jsonl", rows[24:])
    recipe = folder / "recipe.yaml"
    # Columns that change from step to step must go on where they were.
    # 6 batches an epoch, 2 of them a step: 3 steps an epoch. Checkpoints and the end lie in the middle of epochs.
    recipe.write_text(
        f"""
model_name_or_path: {folder}/llama
train_file: {folder}/train.jsonl
eval_file: {folder}/eval.jsonl
r: 4
prefix_training: {{min: 1, max: 4}}
reselect: 3
learning_rate: 1e-2
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_steps: 11
logging_steps: 1
eval_strategy: steps
eval_steps: 5
save_steps: 4
save_total_limit: 1
disable_tqdm: true
prompts: ["3 then "]
max_new_tokens: 2
"""
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_runs.py"), str(recipe), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def losses(run: Path) -> list[tuple[int, str, float]]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [
        (entry["step"], key, entry[key])
        for entry in history
        for key in ("loss", "grad_norm", "eval_loss")
        if key in entry
    ]


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_and_resumed_run_ends_bit_identical(runs: Path, kill: str) -> None:
    exits = json.loads((runs / "exits.json").read_text())[kill]
    assert exits == [-signal.SIGKILL, 0], (runs / f"{kill}.log").read_text()
    whole, resumed = runs / "uninterrupted", runs / kill
    assert (resumed / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert losses(resumed) == losses(whole)
    assert [step for step, key, _ in losses(resumed) if key == "loss"] == list(range(1, 12))


@pytest.mark.parametrize(("kill", "newest"), KILLS.items())
def test_the_last_complete_checkpoint_survives_the_kill(runs: Path, kill: str, newest: int | None) -> None:
    found, passed_over = newest_complete(runs / f"{kill}-killed")
    assert (found.step if found else None) == newest
    log = (runs / f"{kill}.log").read_text()
    if kill.startswith("writing_the") and kill != "writing_the_results":
        assert len(passed_over) == 1
        assert f"passed over {runs / kill / 'checkpoint-8'}: " in log  # and why
    if newest is None:
        assert "starting from the pretrained model" in log
    else:
        assert f"resuming from {runs / kill / f'checkpoint-{newest}'}" in log


def test_a_partial_checkpoint_is_renamed_and_written_again(runs: Path) -> None:
    run = runs / "writing_the_state"
    assert (run / "incomplete-checkpoint-8").is_dir()
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-11"}
