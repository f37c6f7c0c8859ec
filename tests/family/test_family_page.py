"""The table of docs/family.md is that of the committed raw result, and every option has its recipe."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models as tiny
from peft import get_peft_model

TOP = Path(__file__).parents[2]


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(TOP)
    monkeypatch.syspath_prepend(TOP / "benchmarks")
    return importlib.import_module("family")


@pytest.fixture
def compression(family: ModuleType) -> ModuleType:
    return importlib.import_module("compression")


def test_the_page_shows_the_committed_result(family: ModuleType) -> None:
    page = family.PAGE.read_text(encoding="utf-8")
    assert family.filled(page, json.loads(family.RESULT.read_text()), family.read_steps()) == page


def test_the_page_of_compression_shows_the_committed_result(compression: ModuleType) -> None:
    page = compression.PAGE.read_text(encoding="utf-8")
    assert compression.filled(page, json.loads(compression.RESULT.read_text())) == page


def test_a_page_without_the_block_is_an_error(family: ModuleType) -> None:
    with pytest.raises(ValueError, match="no block <!-- family -->"):
        family.with_block("<!-- other --> <!-- end -->", "family", "")


def test_the_table_says_what_the_runs_say(family: ModuleType) -> None:
    def run(loss: float) -> dict[str, Any]:
        return {"eval_loss": loss, "trained": 1000, "file_bytes": 2_500_000, "revision": "abc"}

    result = {
        "steps": 40,
        "recipe": "r.yaml",
        "machine": {"processor": "P", "revision": "abc", "date": "today"},
        "runs": {"groups": {"0": run(3.0), "1": run(4.0)}, "lora": {"0": run(3.5), "1": run(3.5)}},
    }
    steps = {
        "rounds": 3,
        "tokens": 512,
        "machine": result["machine"],
        "groups": [{"groups": [1.0, 1.2, 3.0], "lora": [2.0, 2.0, 4.0]}],
    }
    rows = [line for line in family.table(result, steps).splitlines() if line.startswith("| groups")]
    assert rows == ["| groups | 3.5000 (3.0000 to 4.0000) | 2 | 1,000 | 2.50 | 0.60 |"]
    rows = [line for line in family.table(result, {}).splitlines() if line.startswith("| groups")]
    assert rows == ["| groups | 3.5000 (3.0000 to 4.0000) | 2 | 1,000 | 2.50 | not measured |"]


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("mask", ["--quantization", "nf4"], "quantization: nf4 quantises it"),
        ("groups", ["--quantization", "int8"], "groups needs weights that can be written, and quantization: int8"),
        ("s2ft", ["--quantization", "nf4"], "copermute needs weights that can be written, and quantization: nf4"),
        ("reselect", ["--optim", "paged_adamw_8bit"], "reselect holds or clears .* which optim: paged_adamw_8bit"),
        ("prefix", ["--optim", "adafactor"], "prefix_training holds or clears .* which optim: adafactor"),
    ],
    ids=str,
)
def test_what_cannot_go_together_is_refused_before_anything_is_read(name: str, words: list[str], says: str) -> None:
    from paca.recipe import RecipeError, read_recipe
    from paca.training import adapter_config

    recipe = read_recipe(TOP / "recipes" / "family" / f"{name}.yaml", words)
    with pytest.raises(RecipeError, match=says):
        adapter_config(recipe)


def test_every_recipe_of_the_family_is_on_the_page() -> None:
    page = (TOP / "docs" / "family.md").read_text(encoding="utf-8")
    recipes = {path.name for path in (TOP / "recipes" / "family").glob("*.yaml")}
    assert recipes
    assert all(f"(../recipes/family/{name})" in page for name in recipes)


@pytest.mark.parametrize("recipe", sorted((TOP / "recipes" / "family").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_parameters_are_counted_before_it_runs(recipe: Path) -> None:
    from paca.estimate.prediction import estimate
    from paca.recipe import read_recipe
    from paca.training import adapter_config

    read = read_recipe(recipe, ["--r", "16", "--paca_alpha", "16"])
    predicted = estimate(read, tiny.llama(hidden_size=64).config, 16).trainable
    config = adapter_config(read)
    config.selection = "random" if config.selection == "largest_change" else config.selection
    config.warmup_adapter = None
    model = get_peft_model(tiny.llama(hidden_size=64), config)
    assert predicted == model.get_nb_trainable_parameters()[0] > 0
