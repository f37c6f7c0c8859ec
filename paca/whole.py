"""Writes files and folders whole: under a temporary name beside their own, moved there when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, with its suffix; the file written there takes its place.

    After an error nothing is left of it, and `path` is as it was.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file; its last line gets an end if it has none."""
    with replacing(path) as unfinished:
        unfinished.write_text(text + ("" if text.endswith("\n") else "\n"), encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which may exist if it is empty; it takes its place with what is in it.

    Missing parents are made. After an error nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's folders are their owner's alone
        os.replace(unfinished, path)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, SafetensorError):  # which a full disk is to safetensors
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove files of `replacing` whose process was killed."""
    for path in folder.glob(".*.unfinished*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
