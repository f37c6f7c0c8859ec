"""The numbers in docs/benchmarks.md are those of the committed raw results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOP = Path(__file__).parents[2]


@pytest.fixture
def update_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_docs", TOP / "benchmarks" / "update_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_page_is_what_its_command_prints(
    update_docs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TOP)
    page = update_docs.PAGE.read_text(encoding="utf-8")
    ran = []

    def without_drawing(arguments: list[str]) -> str:
        ran.append(arguments)
        drawing = arguments.index("--plot") if "--plot" in arguments else None
        return str(update_docs.output_of(arguments[:drawing]))

    assert update_docs.filled(page, without_drawing) == page, "run: python benchmarks/update_docs.py"
    assert {arguments[1] for arguments in ran} == {str(path) for path in Path("benchmarks/results").glob("*.json")}


def test_every_picture_of_the_page_exists() -> None:
    page = (TOP / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    pictures = [line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(pictures) == page.count("--plot docs/images/")
    for picture in pictures:
        assert (TOP / "docs" / picture).is_file()
