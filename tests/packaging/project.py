"""What the packaging tests read: the project's own files."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BACKENDS = sorted(folder.name for folder in (ROOT / "backends").glob("paca_*"))
TOOL_FOLDERS = {".git", ".venv", "dist", "build", "runs", "__pycache__"}


@cache
def files() -> tuple[Path, ...]:
    """The project's files: those git has or would add; where there is no git, all but what tools leave behind."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        found = [
            file
            for file in ROOT.rglob("*")
            if not any(part in TOOL_FOLDERS or part.endswith("_cache") for part in file.relative_to(ROOT).parts)
        ]
    return tuple(file for file in found if file.is_file() or file.is_symlink())


def run_python(program: str) -> str:
    """Run a program in a fresh interpreter that has the same import path, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
