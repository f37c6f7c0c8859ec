"""Only a complete checkpoint is resumed from, and the fault of any other is named."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from paca.checkpoint import (
    CheckpointError,
    after_full_disk,
    is_disk_full,
    newest_complete,
    random_states_of_devices,
    remove_all,
    require_complete,
    set_aside,
    what_is_wrong,
)
from paca.training import say_what_stays_behind


def make(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": torch.arange(100.0)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(1000.0)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]


@pytest.mark.parametrize("devices", [set(), {"cuda"}, {"hpu", "cuda"}])
def test_the_devices_whose_random_state_was_saved_are_named(tmp_path: Path, devices: set[str]) -> None:
    path = make(tmp_path, 5)
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states | dict.fromkeys(devices, torch.get_rng_state()), path / "rng_state.pth")
    assert random_states_of_devices(path) == devices
    said: list[str] = []
    say_what_stays_behind(require_complete(path), said.append)  # on the CPU
    names = ", ".join(sorted(devices))
    wanted = f"the random state of {names} stays behind, as this run is on cpu: drop-out will differ"
    assert said == ([wanted] if devices else [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, cut, Path.touch], ids=["missing", "cut", "empty"])
def test_a_missing_cut_or_empty_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    file = make(tmp_path, 5) / name
    if damage is Path.touch:
        file.write_bytes(b"")
    else:
        if damage is cut and name == "adapter_config.json":
            file.write_text('{"r": 8}')
        damage(file)
    fault = what_is_wrong(file.parent)
    assert fault is not None
    assert fault.startswith(name)
    assert "is missing" in fault if damage is Path.unlink else "truncated or damaged" in fault


def test_a_flipped_bit_in_the_optimizer_is_found(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    assert what_is_wrong(path) is None
    flip(path / "optimizer.pt")
    assert "optimizer.pt is damaged: wrong checksum" in str(what_is_wrong(path))


def test_a_state_of_another_step_is_found(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    (path / "trainer_state.json").write_text('{"global_step": 4}')
    assert what_is_wrong(path) == "trainer_state.json is of step 4"


def test_the_newest_complete_one_is_found_and_newer_partial_ones_are_explained(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        make(tmp_path, step)
    cut(tmp_path / "checkpoint-10" / "optimizer.pt")
    found, passed_over = newest_complete(tmp_path)
    assert found is not None
    assert found.step == 9  # by number, not by name
    assert list(passed_over) == [tmp_path / "checkpoint-10"]
    assert newest_complete(tmp_path / "none") == (None, {})


def test_a_named_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    assert require_complete(path).step == 5
    cut(path / "scheduler.pt")
    with pytest.raises(
        CheckpointError, match=r"checkpoint-5 cannot be resumed from: scheduler\.pt is truncated or damaged"
    ):
        require_complete(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        require_complete(tmp_path / "checkpoint-6")


def test_what_lies_ahead_is_renamed_not_deleted(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    cut(tmp_path / "checkpoint-6" / "optimizer.pt")
    set_aside(tmp_path, after=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-2",
        "incomplete-checkpoint-6",
        "replaced-checkpoint-4",
    ]
    assert what_is_wrong(tmp_path / "replaced-checkpoint-4") is None


def test_overwriting_deletes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 2)
    make(tmp_path, 4).rename(tmp_path / "incomplete-checkpoint-4")
    (tmp_path / "my-checkpoint-notes").mkdir()
    remove_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["my-checkpoint-notes"]


def test_a_full_disk_is_recognised_through_the_libraries_errors() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    # What safetensors and torch raise on a full disk.
    assert is_disk_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    wrapped.__context__ = RuntimeError("basic_ios::clear: iostream error")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_after_a_full_disk_the_last_good_checkpoint_is_named_and_the_partial_one_gone(tmp_path: Path) -> None:
    make(tmp_path, 2)
    cut(make(tmp_path, 4) / "optimizer.pt")
    assert f"{tmp_path / 'checkpoint-2'} is complete" in after_full_disk(tmp_path)
    assert not (tmp_path / "checkpoint-4").exists()
