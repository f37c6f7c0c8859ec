"""A recipe says what is meant or is refused, with the place of the fault and the remedy."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from paca import PacaConfig
from paca.recipe import Recipe, RecipeError, RunOptions, known_keys, read_file, read_recipe
from paca.registry import get_backend
from paca.trainer import training_arguments_class

LEAST = "model_name_or_path: some/model\noutput_dir: out\ntrain_file: a.jsonl\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(LEAST + text)
    return path


def refused(tmp_path: Path, text: str, *words: str) -> str:
    with pytest.raises(RecipeError) as error:
        read_recipe(write(tmp_path, text), words)
    return str(error.value)


def test_each_key_goes_to_its_owner(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, "learning_rate: 1e-3\nr: 4\npacking: true\nrank_pattern: {q_proj: 2}\n"))
    assert recipe.training["learning_rate"] == 1e-3
    assert recipe.adapter["r"] == 4
    assert recipe.adapter["rank_pattern"] == {"q_proj": 2}
    assert recipe.run.packing is True
    assert recipe.adapter["target_modules"] == "all-linear"


def test_every_setting_of_the_adapter_is_a_key() -> None:
    internal = {"peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "base_model_name_or_path"}
    settable = {f.name for f in fields(PacaConfig) if f.init} - internal - {"base_fingerprint"}
    assert (
        {"r", "paca_alpha", "selection", "residency", "share_columns"}
        <= settable
        <= known_keys(training_arguments_class()).keys()
    )


def test_no_key_of_ours_hides_one_of_the_trainers() -> None:
    ours, theirs = {f.name for f in fields(RunOptions)}, {f.name for f in fields(training_arguments_class())}
    assert ours & theirs <= {"resume_from_checkpoint", "overwrite_output_dir"}
    assert not {f.name for f in fields(PacaConfig)} & theirs


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    words = [
        "--learning_rate",
        "5e-4",
        "--r=16",
        "--bf16",
        "--target-modules",
        "q_proj",
        "v_proj",
        "--run_name",
        "2024",
    ]
    recipe = read_recipe(write(tmp_path, "learning_rate: 1e-3\nr: 4\n"), words)
    assert recipe.training["learning_rate"] == 5e-4
    assert recipe.adapter["r"] == 16
    assert recipe.training["bf16"] is True
    assert recipe.adapter["target_modules"] == ["q_proj", "v_proj"]
    assert recipe.training["run_name"] == "2024"


def test_text_on_the_command_line_is_taken_to_the_letter() -> None:
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--prompts", "a: ", "# b", "--run_name", " x "]
    recipe = read_recipe(None, words)
    assert recipe.run.prompts == ["a: ", "# b"]
    assert recipe.training["run_name"] == " x "


def test_a_recipe_needs_no_file() -> None:
    recipe = read_recipe(None, ["--model_name_or_path", "m", "--output_dir", "o", "--max_steps", "-1"])
    assert recipe.run.model_name_or_path == "m"
    assert recipe.training["max_steps"] == -1


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("eval_strategy: no", "eval_strategy", "no"),  # YAML 1.1 reads false
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # YAML 1.1 reads text
        ("max_steps: 1e3", "max_steps", 1000),
        ("bf16: yes", "bf16", True),
        ("bf16: off", "bf16", False),
        ("bias: none", "bias", "none"),
        ("exclude_modules: null", "exclude_modules", None),
        ("eval_size: 5", "eval_size", 5),
        ("eval_size: 0.5", "eval_size", 0.5),
        ("prompts: hello", "prompts", ["hello"]),
        ("train_file: [a.jsonl, b.jsonl]", "train_file", ["a.jsonl", "b.jsonl"]),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("resume_from_checkpoint: auto", "resume_from_checkpoint", "auto"),
        ("lr_scheduler_type: cosine", "lr_scheduler_type", "cosine"),
    ],
)
def test_values_mean_what_people_mean(tmp_path: Path, text: str, key: str, value: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((LEAST if key != "train_file" else "model_name_or_path: m\noutput_dir: o\n") + text)
    recipe = read_recipe(path)
    found = next(part[key] for part in (vars(recipe.run), recipe.adapter, recipe.training) if key in part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1", "recipe.yaml:4: there is no key 'lerning_rate'; the nearest is 'learning_rate'"),
        ("lora_r: 8", "there is no key 'lora_r'; here it is called 'r'"),
        ("cutoff_len: 8", "here it is called 'max_length'"),
        ("r: '8'", "r must be an integer; found '8' (str)"),
        ("r: 8.5", "r must be an integer; found 8.5 (float)"),
        ("r: true", "r must be an integer; found True (bool)"),
        ("r: null", "r must be an integer; found None (null)"),
        ("learning_rate: fast", "learning_rate must be a number; found 'fast' (str)"),
        ("packing: 1", "packing must be true or false; found 1 (int)"),
        ("task: regression", "task must be one of causal_lm, sequence_classification; found 'regression'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type must be one of linear, cosine"),
        ("rank_pattern: {q_proj: two}", "rank_pattern must be a mapping; found 'two'"),
        ("max_length: 0", "max_length must be at least 1; found 0"),
        ("eval_size: 1.5", "eval_size must be a count or a fraction between 0 and 1; found 1.5"),
        ("dataset_name: x", "train_file and dataset_name are both given"),
        ("r: 8\nr: 9", "recipe.yaml:5: r is given a second time (first: "),
        ("r: [", "is not valid YAML"),
        ("backend: tpuu", "there is no backend 'tpuu'"),
        ("backend: cpu\nstrategies: {gather: one_hott}", "did you mean 'one_hot'?"),
    ],
)
def test_a_wrong_recipe_is_refused_with_place_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    assert "--r: r must be an integer; found 'x' (str)" in refused(tmp_path, "", "--r", "x")
    assert "unexpected 'stray'" in refused(tmp_path, "", "stray")
    assert "--r is given a second time" in refused(tmp_path, "", "--r", "1", "--r", "2")
    assert "--packing: packing must be true or false; found 'maybe'" in refused(tmp_path, "", "--packing", "maybe")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, "lerning_rate: 1\nr: x\n", "--max_steps", "many")
    assert "3 errors" in message
    assert all(part in message for part in ("lerning_rate", "recipe.yaml:5: r must", "--max_steps: max_steps must"))


def test_the_needed_keys_are_named() -> None:
    with pytest.raises(RecipeError, match=r"model_name_or_path is missing.*\n.*output_dir is missing"):
        read_recipe(None)


def test_a_missing_or_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.yaml: No such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match=r"list.yaml: expected `key: value` lines, found a seq"):
        read_recipe(tmp_path / "list.yaml")


def test_names_of_other_transformers_versions_are_understood(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, "gradient_checkpointing: true\nwarmup_ratio: 0.1\n"))
    installed = training_arguments_class().__dataclass_fields__
    assert recipe.training.keys() <= installed.keys()
    assert recipe.training.get("activation_checkpointing", recipe.training.get("gradient_checkpointing")) is True
    assert recipe.training.get("warmup_steps", recipe.training.get("warmup_ratio")) == 0.1


def test_the_recipes_backend_and_strategies_are_put_in_use(tmp_path: Path) -> None:
    read_recipe(write(tmp_path, "backend: cpu\nstrategies: {gather: one_hot}\n"))
    assert get_backend().strategies["gather"] == "one_hot"


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path, "eval_strategy: no\nlearning_rate: 1e-5\nalpha_pattern: {a.*: 2.5}\nprompts: ['no']\n")
    )
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    again: Recipe = read_recipe(tmp_path / "resolved.yaml")
    assert again == recipe


def test_json_is_a_recipe_too(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"model_name_or_path": "m", "output_dir": "o", "r": 3}')
    assert read_file(tmp_path / "r.json")["r"].value == 3
