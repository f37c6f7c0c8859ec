"""The documents of recipes and commands tell what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from paca.cli import main
from paca.recipe import DEFAULTS, RunOptions, read_file, read_recipe

DOCS = Path(__file__).parents[2] / "docs"


def test_every_key_of_ours_is_in_the_table() -> None:
    table = [line for line in (DOCS / "training.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {item.name for item in fields(RunOptions)} <= named


def test_the_defaults_that_differ_are_told() -> None:
    text = (DOCS / "training.md").read_text()
    shown = {key: value for key, value in DEFAULTS.items() if key != "label_names"}
    assert all(f"`{key}: {yaml.safe_dump(value).splitlines()[0]}`" in text for key, value in shown.items())


def test_the_first_recipe_is_a_recipe(tmp_path: Path) -> None:
    [recipe] = re.findall(r"```yaml\n(.*?)```", (DOCS / "training.md").read_text(), re.DOTALL)
    (tmp_path / "my.yaml").write_text(recipe)
    assert read_recipe(tmp_path / "my.yaml").training["learning_rate"] == 2e-3


@pytest.mark.parametrize("recipe", sorted((DOCS.parent / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(recipe: Path) -> None:
    assert read_file(recipe)
    assert read_recipe(recipe).output_dir.parts[0] == "runs"


def test_every_command_of_the_documents_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"`?paca (\w+)[ `]", (DOCS / "cli.md").read_text()))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert named - {"COMMAND"} <= set(re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE))
    assert {"train", "evaluate", "generate", "merge", "export", "bench", "env"} <= named
