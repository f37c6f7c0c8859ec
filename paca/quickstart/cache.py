"""The folder where quickstart files are kept between runs, and how a file or folder gets there whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from paca.quickstart.package import QuickstartError
from paca.whole import replacing


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/paca`, or `~/.cache/paca`. Relative values are to be ignored, says the XDG specification."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "paca"


def require_space(size: int) -> None:
    """Check that the cache has room.

    Args:
        size: bytes about to be written.

    Raises:
        QuickstartError: if it has not.
    """
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise QuickstartError(
            f"{folder} needs {size / 1e6:,.0f} MB and has {free / 1e6:,.0f} MB free: make room, or set XDG_CACHE_HOME "
            "to a folder on another disk"
        )


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that appears only when it is complete, however many processes try at once.

    Args:
        folder: where it shall be.
        fill: writes its files into the empty folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unfinished = Path(scratch, folder.name)
        unfinished.mkdir()
        fill(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and made the same
                raise


def write_file(file: Path, text: str) -> None:
    """Write a file whole. One that holds the same is left alone: its time tells whether prepared data is fresh."""
    content = text.encode()
    if file.is_file() and file.read_bytes() == content:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished:
        unfinished.write_bytes(content)
