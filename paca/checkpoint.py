"""Tells complete checkpoints from partial ones, so that a killed run resumes from the last good state and no other.

The Trainer writes a checkpoint file by file into its final folder: adapter, optimizer, scheduler, random state, and
`trainer_state.json` last; only then does it delete older ones. A run that is killed meanwhile leaves a partial folder
behind the last complete one. A folder is written once: before a run starts, whatever lies ahead of its starting point
is renamed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STATE = "trainer_state.json"
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "iostream error", "PytorchStreamWriter failed writing")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from, or could not be written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and the number of optimizer steps behind it."""

    path: Path
    step: int


def newest_complete(output_dir: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Find the newest complete checkpoint of a run.

    Returns:
        The checkpoint, or None, and what is wrong with each newer one.
    """
    passed_over: dict[Path, str] = {}
    for path, step in sorted(_folders(output_dir), key=lambda found: found[1], reverse=True):
        fault = what_is_wrong(path)
        if fault is None:
            return Checkpoint(path, step), passed_over
        passed_over[path] = fault
    return None, passed_over


def require_complete(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder that the user named.

    Raises:
        CheckpointError: if it is missing, incomplete or damaged; the message says which file and how.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist; resume_from_checkpoint: auto finds the newest")
    fault = what_is_wrong(path)
    if fault is not None:
        raise CheckpointError(
            f"checkpoint {path} cannot be resumed from: {fault}; resume_from_checkpoint: auto finds a complete one"
        )
    return Checkpoint(path, int(json.loads((path / _STATE).read_text())["global_step"]))


def what_is_wrong(path: Path) -> str | None:
    """Name the first missing or damaged file of a checkpoint folder; None if the Trainer can resume from it."""
    adapter = next((path / name for name in _ADAPTER if (path / name).exists()), None)
    adapters = [adapter] if adapter else [path / found for found in path.glob("*/adapter_model.safetensors")]
    if not adapters:
        return f"{_ADAPTER[0]} is missing"
    for file in adapters:
        fault = _bad_safetensors(file) if file.suffix == ".safetensors" else _bad_archive(file)
        fault = fault or _bad_json(file.with_name("adapter_config.json"))
        if fault:
            return f"{file.parent.relative_to(path) / fault}" if file.parent != path else fault
    # DeepSpeed and FSDP keep the optimizer in folders of their own; what is in them is checked when they load it.
    sharded = any(path.glob("global_step*")) or any(path.glob("optimizer_*"))
    for name in ("scheduler.pt",) if sharded else ("optimizer.pt", "scheduler.pt"):
        if fault := _bad_archive(path / name):
            return fault
    random_states = sorted(path.glob("rng_state*.pth"))
    for file in [*random_states, *path.glob("scaler.pt")]:
        if fault := _bad_archive(file):
            return fault
    if not random_states:
        return "rng_state.pth is missing"
    if fault := _bad_json(path / _STATE):
        return fault
    step, named = json.loads((path / _STATE).read_text()).get("global_step"), _FOLDER.match(path.name)
    if not isinstance(step, int) or (named and int(named[1]) != step):
        return f"{_STATE} is of step {step}"
    return None


def random_states_of_devices(path: Path) -> set[str]:
    """Name the devices, other than the host, whose random state a complete checkpoint holds: of use on them only."""
    import torch

    # What the Trainer itself reads the file with; transformers 4.55 defines it here, 5 elsewhere.
    from transformers.trainer import safe_globals  # type: ignore[attr-defined]

    with safe_globals():
        states = torch.load(min(path.glob("rng_state*.pth")), weights_only=True)
    return set(states) - {"python", "numpy", "cpu"}


def set_aside(output_dir: Path, after: int) -> list[Path]:
    """Rename the checkpoints beyond a step, which a run that starts there will write again.

    Nothing is deleted but what an earlier call set aside under the same name.

    Returns:
        The new names.
    """
    renamed = []
    for path, step in _folders(output_dir):
        if step <= after:
            continue
        kind = "incomplete" if what_is_wrong(path) else "replaced"
        target = path.with_name(f"{kind}-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        renamed.append(target)
    return renamed


def remove_all(output_dir: Path) -> None:
    """Delete every checkpoint of an earlier run in this folder."""
    for path in output_dir.glob("*checkpoint-*"):
        if path.is_dir() and re.match(r"^(incomplete-|replaced-)?checkpoint-\d+$", path.name):
            shutil.rmtree(path)


def after_full_disk(output_dir: Path) -> str:
    """Delete the checkpoint that no longer fitted and say what is left, as the remedy in an error."""
    good, partial = newest_complete(output_dir)
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    if good is None:
        return "there is no complete checkpoint yet. Free some space and start again"
    return f"{good.path} is complete. Free some space and go on with --resume_from_checkpoint auto"


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, means that the disk or the quota is full.

    torch and safetensors raise errors of their own types, so their texts count as well; torch's does not say "full".
    """
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(text in str(cause) for text in _FULL)
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _folders(output_dir: Path) -> list[tuple[Path, int]]:
    if not output_dir.is_dir():
        return []
    found = [(path, _FOLDER.match(path.name)) for path in output_dir.iterdir() if path.is_dir()]
    return [(path, int(match[1])) for path, match in found if match]


def _bad_safetensors(file: Path) -> str | None:
    """The header must parse and the file must be as long as it says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            if not tensors.keys():
                return f"{file.name} holds no tensors"
    except (SafetensorError, OSError) as error:
        return f"{file.name} is truncated or damaged: {error}"
    return None


def _bad_archive(file: Path) -> str | None:
    """What `torch.save` writes is a zip archive with a checksum for each member, and its directory comes last."""
    if not file.exists():
        return f"{file.name} is missing"
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"{file.name} is truncated or damaged: {error}"
    return f"{file.name} is damaged: wrong checksum of {damaged}" if damaged else None


def _bad_json(file: Path) -> str | None:
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{file.name} is missing"
    except (OSError, ValueError) as error:
        return f"{file.name} is truncated or damaged: {error}"
    return None if isinstance(value, dict) else f"{file.name} is damaged: not an object"
