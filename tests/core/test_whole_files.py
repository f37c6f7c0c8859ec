"""A file or folder that is written is either the old one or the whole new one, whatever interrupts the writer."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from paca import whole
from paca.whole import new_folder, remove_unfinished, replacing, write_text

INTERRUPTIONS = [OSError("the disk is full"), KeyboardInterrupt()]


def write_part(file: Path, interruption: BaseException) -> None:
    file.write_text("ne")
    raise interruption


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=repr)
def test_an_interrupted_file_is_the_old_one(tmp_path: Path, interruption: BaseException) -> None:
    file = tmp_path / "result.json"
    write_text(file, "old")
    with pytest.raises(type(interruption)), replacing(file) as unfinished:
        write_part(unfinished, interruption)
    assert file.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=repr)
def test_an_interrupted_folder_does_not_appear(tmp_path: Path, interruption: BaseException) -> None:
    folder = tmp_path / "missing" / "adapter"
    with pytest.raises(type(interruption)), new_folder(folder) as unfinished:
        write_part(unfinished / "weights", interruption)
    assert list(folder.parent.iterdir()) == []


def test_nothing_is_seen_until_it_is_complete(tmp_path: Path) -> None:
    file, folder = tmp_path / "loss.png", tmp_path / "adapter"
    with replacing(file) as unfinished:
        unfinished.write_bytes(b"new")
        assert unfinished.suffix == ".png"  # matplotlib goes by it
        assert not file.exists()
    with new_folder(folder) as unfinished:
        (unfinished / "weights").touch()
        assert not folder.exists()
    assert (file.read_bytes(), [path.name for path in folder.iterdir()]) == (b"new", ["weights"])
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path) as unfinished:
        (unfinished / "weights").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    file.write_text("old")
    writer = (
        "import os, runpy, signal, sys; from pathlib import Path\n"
        "with runpy.run_path(sys.argv[1])['replacing'](Path(sys.argv[2])) as unfinished:\n"
        "    unfinished.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / ".run.unfinished").mkdir()
    killed = subprocess.run([sys.executable, "-c", writer, whole.__file__, str(file)])  # without torch, so at once
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    remove_unfinished(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
