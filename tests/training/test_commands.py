"""The commands, from a recipe to an exported adapter, and what they say of wrong input."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, write_jsonl
from safetensors.torch import load_file, save_file

from paca.cli import main


class Run:
    """One trained adapter, and what was printed on the way."""

    def __init__(self, folder: Path, words: list[str], printed: str) -> None:
        self.folder, self.words, self.printed = folder, words, printed

    @property
    def results(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "all_results.json").read_text()))


def words_for(model: Path, train: Path, held_out: Path | None, out: Path, *more: str) -> list[str]:
    words = ["--model_name_or_path", str(model), "--train_file", str(train), "--output_dir", str(out), "--disable_tqdm"]
    words += ["--eval_file", str(held_out)] if held_out else []
    steps = ["--max_steps", "20", "--per_device_train_batch_size", "8", "--learning_rate", "2e-2", "--save_steps", "10"]
    return [*words, *steps, "--r", "8", *more]


@pytest.fixture(scope="module")
def trained(llama: Path, texts: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = words_for(llama, texts, held_out, folder, "--prompts", "7 then ", "--max_new_tokens", "5")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *args, **kwargs: lines.append(" ".join(map(str, args))))
        assert main(["train", *words]) == 0
    return Run(folder, words, "\n".join(lines))


# ---------------------------------------------------------------- training


OWN_CODE = """
from transformers import LlamaForCausalLM


class Own(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
"""


def test_a_models_own_code_need_not_name_what_its_forward_takes(
    llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds that folder
    model = shutil.copytree(llama, tmp_path / "own_code")
    (model / "own.py").write_text(OWN_CODE)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    words = ["--model_name_or_path", str(model), "--train_file", str(texts), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *words, "--max_steps", "1", "--trust_remote_code"]) == 0


def test_training_lowers_the_held_out_loss_and_says_so(trained: Run) -> None:
    results = trained.results
    assert results["eval_loss"] < results["eval_before_loss"] - 0.5
    assert results["eval_perplexity"] == pytest.approx(2.718281828459045 ** results["eval_loss"])
    assert f"{results['eval_before_loss']:.4f}" in trained.printed
    assert f"{results['eval_loss']:.4f}" in trained.printed
    assert "trainable params: 4,096 || all params: " in trained.printed
    assert results["global_step"] == 20


def test_a_run_leaves_all_its_files_and_no_other(trained: Run) -> None:
    names = {path.name for path in trained.folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "recipe.yaml", "all_results.json",
        "samples.json", "trainer_state.json", "training_loss.png", "tokenizer.json", "checkpoint-10", "checkpoint-20",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".")]
    assert (trained.folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    [sample] = json.loads((trained.folder / "samples.json").read_text())
    assert sample["before"] != sample["after"]
    card = (trained.folder / "README.md").read_text()
    assert "arxiv.org/abs/2503.01905" in card
    assert "| loss |" in card
    assert "library_name: peft" in card


def test_the_end_names_the_commands_that_come_next(trained: Run) -> None:
    ends = trained.printed[trained.printed.index("next:") :]
    for command in ("paca generate", "paca evaluate", "paca merge", "paca export"):
        assert f"{command} {trained.folder}" in ends


@pytest.mark.parametrize(
    ("option", "there", "missing"),
    [
        (["--prefix_training", "{min: 2, max: 8}"], ["--to prefix --r 2", "--to lora"], "dropped out"),
        (["--group_lasso", "1e4"], ["dropped out     2 layers", "--layers", "--to lora"], "--to prefix"),
        (["--selection", "mask_random"], ["paca merge"], "--to lora"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_comes_next_depends_on_what_was_trained(
    option: list[str],
    there: list[str],
    missing: str,
    llama: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = words_for(llama, texts, None, tmp_path / "run", "--target_modules", "[o_proj]", *option)
    words[words.index("--max_steps") + 1] = "1"
    assert main(["train", *words]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in there)
    assert missing not in shown
    if "--prefix_training" in option:  # and works as it says
        assert main(["export", str(tmp_path / "run"), "--to", "prefix", "--r", "2", "--out", str(tmp_path / "2")]) == 0
        assert main(["generate", str(tmp_path / "2"), "--prompt", "7", "--max-new-tokens", "2"]) == 0
        assert {"recipe.yaml", "tokenizer.json"} <= {path.name for path in (tmp_path / "2").iterdir()}


def test_the_saved_recipe_gives_the_same_adapter_again(trained: Run, tmp_path: Path) -> None:
    assert main(["train", str(trained.folder / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    again, first = (folder / "adapter_model.safetensors" for folder in (tmp_path / "again", trained.folder))
    assert again.read_bytes() == first.read_bytes()


def test_evaluation_before_training_does_not_change_the_training(texts: Path, held_out: Path, tmp_path: Path) -> None:
    """Even where training draws random numbers, here for dropout."""
    model = make_llama(tmp_path / "model", attention_dropout=0.3)
    adapters = []
    for before in ("true", "false"):
        words = words_for(model, texts, held_out, tmp_path / before, "--evaluate_before", before, "--prompts", "7")
        words[words.index("--max_steps") + 1] = "2"
        assert main(["train", *words]) == 0
        adapters.append((tmp_path / before / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_the_loss_is_a_mean_over_tokens_whatever_the_batches(trained: Run, tmp_path: Path) -> None:
    """Rows of very different length, so that a mean of means would differ with the batch size."""
    rows = [{"prompt": "7 then ", "completion": "7 " * (1 + 9 * (n % 2))} for n in range(5)]
    file = write_jsonl(tmp_path / "uneven.jsonl", rows)
    losses = []
    for size in ("1", "2", "5"):
        words = ["--eval_file", str(file), "--per_device_eval_batch_size", size, "--json", str(tmp_path / "m.json")]
        assert main(["evaluate", str(trained.folder), *words]) == 0
        losses.append(json.loads((tmp_path / "m.json").read_text())["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_packed_training_with_held_out_rows_of_its_own(llama: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = words_for(
        llama, texts, None, out, "--packing", "--max_length", "32", "--eval_size", "4", "--max_steps", "2"
    )
    words.remove("20")  # --max_steps is given once
    words.remove("--max_steps")
    assert main(["train", *words]) == 0
    assert json.loads((out / "all_results.json").read_text())["eval_loss"] > 0


@pytest.mark.parametrize("selection", ["weight_norm", "activation_norm_large", "gradient_norm"])
def test_columns_may_be_chosen_from_the_recipes_data(llama: Path, texts: Path, tmp_path: Path, selection: str) -> None:
    words = words_for(llama, texts, None, tmp_path / "run", "--selection", selection, "--calibration_samples", "5")
    words[words.index("--max_steps") + 1] = "1"
    assert main(["train", *words]) == 0


def test_gradient_checkpointing_gives_the_same_adapter(llama: Path, texts: Path, tmp_path: Path) -> None:
    files = []
    for name, more in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        words = words_for(llama, texts, None, tmp_path / name, *more)
        words[words.index("--max_steps") + 1] = "3"
        assert main(["train", *words]) == 0
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_classifier_is_trained_measured_and_merged(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [{"text": letter * 6, "label": name} for letter, name in (("a", "first"), ("z", "last"))] * 12
    file, out = write_jsonl(tmp_path / "train.jsonl", rows), tmp_path / "run"
    words = words_for(bert, file, file, out, "--task", "sequence_classification")
    assert main(["train", *words]) == 0
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_accuracy"] == 1.0
    assert "eval_perplexity" not in results
    assert main(["evaluate", str(out), "--json", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["eval_loss"] == pytest.approx(results["eval_loss"], abs=1e-6)
    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("zzzzzz", return_tensors="pt")["input_ids"]
    assert model.config.id2label[int(model(input_ids=ids).logits.argmax())] == "last"


# ---------------------------------------------------------------- evaluate, generate, merge, export


def evaluated(tmp_path: Path, *words: str) -> float:
    assert main(["evaluate", *words, "--json", str(tmp_path / "metrics.json")]) == 0
    return float(json.loads((tmp_path / "metrics.json").read_text())["eval_loss"])


def test_evaluate_gives_what_training_reported_with_the_adapter_and_without(trained: Run, tmp_path: Path) -> None:
    assert evaluated(tmp_path, str(trained.folder)) == trained.results["eval_loss"]
    assert evaluated(tmp_path, str(trained.folder), "--base") == trained.results["eval_before_loss"]
    recipe = str(trained.folder / "recipe.yaml")
    assert evaluated(tmp_path, recipe) == trained.results["eval_loss"]


def test_a_checkpoint_is_an_adapter_too(trained: Run, tmp_path: Path) -> None:
    assert evaluated(tmp_path, str(trained.folder / "checkpoint-20")) == trained.results["eval_loss"]
    assert evaluated(tmp_path, str(trained.folder / "checkpoint-10")) != trained.results["eval_loss"]


def test_generate_continues_the_prompt_as_training_showed(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    [sample] = json.loads((trained.folder / "samples.json").read_text())
    words = ["generate", str(trained.folder), "--prompt", "7 then ", "--max-new-tokens", "5"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"7 then {sample['after']}\n\n"
    assert main([*words, "--base"]) == 0
    assert capsys.readouterr().out == f"7 then {sample['before']}\n\n"


def test_drawing_is_repeatable_and_leaves_the_random_state_alone(
    trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "generate",
        str(trained.folder),
        "--chat",
        "--prompt",
        "x",
        "--temperature",
        "1.5",
        "--max_new_tokens",
        "8",
    ]
    answers = []
    for seed in ("1", "1", "2"):
        assert main([*words, "--seed", seed]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def _cut_columns(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}.paca_delta"] = tensors[f"{layer}.paca_delta"][:, 1:].contiguous()


def _move_columns(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}.paca_indices"] += 1000


def _lose_deltas(tensors: dict[str, torch.Tensor], layer: str) -> None:
    del tensors[f"{layer}.paca_delta"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_cut_columns, "size mismatch"), (_move_columns, "columns must lie in"), (_lose_deltas, "missing adapter keys")],
)
def test_an_adapter_that_does_not_fit_its_settings_is_refused(
    trained: Run, damage: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.folder, tmp_path / "bad", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors, next(iter(tensors)).rpartition(".")[0])
    save_file(tensors, file)
    assert main(["evaluate", str(tmp_path / "bad")]) == 2
    told = capsys.readouterr().err
    assert "adapter_model.safetensors does not fit its adapter_config.json or the base model" in told
    assert said in told


def test_the_merged_model_computes_what_the_adapted_one_does(trained: Run, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    assert main(["merge", str(trained.folder), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(trained.folder)).eval()
    ids = torch.arange(20)[None]
    assert torch.equal(merged(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}  # no half-written folder beside it
    assert main(["merge", str(trained.folder), "--out", str(tmp_path / "merged")]) == 2


def test_a_commands_warnings_are_shown_without_lines_of_code(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def merge(*_: object) -> None:
        shown.append(warnings.formatwarning("columns were moved", UserWarning, "requantise.py", 103, line="warn("))  # type: ignore[arg-type]

    monkeypatch.setattr("paca.merging.merge", merge)
    before = warnings.formatwarning
    assert main(["merge", str(trained.folder), "--out", str(tmp_path / "merged")]) == 0
    assert shown == ["warning: columns were moved\n"]
    assert warnings.formatwarning is before


def test_export_writes_a_lora_adapter(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained.folder), "--to", "lora", "--out", str(tmp_path / "lora")]) == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert main(["export", str(trained.folder), "--to", "lora", "--out", str(tmp_path / "lora")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_compress_measures_what_its_rounding_costs(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", str(trained.folder), "--bits", "8", "--out", str(tmp_path / "small"), "--evaluate"]
    assert main([*words, "--json", str(tmp_path / "report.json")]) == 0
    assert "held out" in capsys.readouterr().out
    losses = {
        name: metrics["eval_loss"]
        for name, metrics in json.loads((tmp_path / "report.json").read_text())["held_out"].items()
    }
    assert losses["adapter"] == pytest.approx(trained.results["eval_loss"], abs=1e-6)
    assert losses["compressed"] == pytest.approx(losses["adapter"], abs=0.02)
    assert losses["base"] > losses["adapter"] + 0.5
    assert main(["evaluate", str(tmp_path / "small")]) == 0
    assert f"{losses['compressed']:.4f}" in capsys.readouterr().out


def test_a_dry_run_prints_the_recipe_and_counts_and_writes_nothing(
    llama: Path, texts: Path, tmp_path: Path, trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words_for(llama, texts, None, tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate: 0.02" in printed
    counts = next(line for line in trained.printed.splitlines() if line.startswith("trainable params"))
    assert counts in printed
    assert "kept for backward" in printed
    assert list(tmp_path.iterdir()) == []


def test_env_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert capsys.readouterr().out.startswith("Copy-paste the following information")


# ---------------------------------------------------------------- wrong input


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--r": "33"}, "r = 33 is more than the 32 input columns of"),
        ({"--max_length": "300"}, "max_length 300 is more than the 256 tokens this model was made for"),
        ({"--eval_file": "none.jsonl"}, "data file none.jsonl does not exist"),
        ({"--model_name_or_path": "./none"}, "model_name_or_path ./none: there is no such folder"),
        ({"--model_name_or_path": "no/such"}, "the hub is switched off by HF_HUB_OFFLINE=1"),
        ({"--target_modules": "nothing_like_it"}, "the model's linear ones are called down_proj, gate_proj"),
        ({"--r": "0"}, "`r` must be a whole number greater than 0, found 0"),
        ({"--per_device_train_batch_size": "0"}, "per_device_train_batch_size must be at least 1; found 0"),
        ({"--learning_rate": "-1"}, "learning_rate must be at least 0; found -1"),
        ({"--max_steps": "0"}, "max_steps 0 trains nothing"),
        ({"--bf16": "true", "--fp16": "true"}, "bf16 and fp16 are both on"),
        ({"--dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16"),
        ({"--backend": "cuda9"}, "there is no backend 'cuda9'"),
        ({"--selection": "best"}, "best"),
        ({"--eval_strategy": "steps"}, "eval_strategy steps needs held-out data"),
        ({"--resume_from_checkpoint": "none/checkpoint-3"}, "checkpoint none/checkpoint-3 does not exist"),
        ({"--load_best_model_at_end": "true"}, "TrainingArguments: "),
    ],
)
def test_what_cannot_work_is_said_before_work_starts(
    llama: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], expected: str
) -> None:
    words = words_for(llama, texts, None, tmp_path / "run")
    for key, value in changes.items():
        if key in words:
            words[words.index(key) + 1] = value
        else:
            words += [key, value]
    assert expected in refused(capsys, "train", *words)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize("changes", [{"--r": "33"}, {"--target_modules": "nothing_like_it"}, {"--learning_rate": "-1"}])
def test_the_adapter_is_checked_before_data_and_weights_are_read(
    llama: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr("paca.training.load_data", read)
    monkeypatch.setattr("paca.training.base_model", read)
    words = words_for(llama, texts, None, tmp_path / "run")
    for key, value in changes.items():
        words += [key, value] if key not in words else []
        words[words.index(key) + 1] = value
    assert refused(capsys, "train", *words)


def test_an_output_folder_that_cannot_be_written_is_told_first(
    llama: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere but on a read-only disk
    told = refused(capsys, "train", *words_for(llama, texts, None, tmp_path / "a" / "run"))
    assert f"cannot be written: {tmp_path} is read-only" in told


def test_a_folder_with_nothing_but_the_recipe_of_a_failed_start_counts_as_empty(
    llama: Path, texts: Path, held_out: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("r: 8\n")
    words = words_for(llama, texts, held_out, tmp_path / "run")
    words[words.index("--max_steps") + 1] = "1"
    assert main(["train", *words]) == 0


def test_a_dry_run_looks_at_a_recipe_whose_run_is_there(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *trained.words, "--dry-run"]) == 0


def test_what_is_beyond_the_model_is_not_generated(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "generate", str(trained.folder), "--prompt", "7 then ", "--max-new-tokens", "5000")
    assert "more than the 256 that this model was made for" in told


def test_a_folder_with_something_in_it_is_not_overwritten_unasked(
    trained: Run, llama: Path, texts: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.folder, copy)
    (copy / "notes.txt").write_text("mine")
    words = words_for(llama, texts, held_out, copy, "--seed", "7")
    words[words.index("--max_steps") + 1] = "2"
    assert "is not empty: choose another, go on with --resume_from_checkpoint auto" in refused(capsys, "train", *words)
    assert (copy / "adapter_model.safetensors").read_bytes() == (
        trained.folder / "adapter_model.safetensors"
    ).read_bytes()
    assert main(["train", *words, "--overwrite_output_dir"]) == 0
    assert (copy / "notes.txt").read_text() == "mine"
    assert {path.name for path in copy.glob("checkpoint-*")} == {"checkpoint-2"}


def test_the_run_of_another_adapter_is_not_resumed(
    trained: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", *trained.words, "--resume_from_checkpoint"]
    words[words.index("--r") + 1] = "4"
    assert "holds a run of another adapter (r: was 8, is 4)" in refused(capsys, *words)


def test_a_named_corrupt_checkpoint_is_an_error_and_auto_passes_it_over(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.folder, copy)
    broken = copy / "checkpoint-20" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:500])
    words = [str(copy) if word == str(trained.folder) else word for word in trained.words]
    message = refused(capsys, "train", *words, "--resume_from_checkpoint", str(copy / "checkpoint-20"))
    assert "cannot be resumed from: adapter_model.safetensors is truncated or damaged" in message
    assert main(["train", *words, "--resume_from_checkpoint", "true"]) == 0
    assert f"resuming from {copy / 'checkpoint-10'}" in capsys.readouterr().out
    whole, resumed = (folder / "adapter_model.safetensors" for folder in (trained.folder, copy))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_full_disk_is_said_and_the_last_checkpoint_stays_usable(
    llama: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_for(llama, texts, None, tmp_path / "run")
    save = torch.save

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, file, *args, **kwargs)
        if str(file).endswith("checkpoint-20/optimizer.pt"):
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = refused(capsys, "train", *words)
    assert "the disk is full" in message
    assert f"{tmp_path / 'run' / 'checkpoint-10'} is complete. Free some space" in message
    assert not (tmp_path / "run" / "checkpoint-20").exists()
    assert main(["train", *words, "--resume_from_checkpoint", "auto"]) == 0


def test_other_wrong_words_are_told(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a saved adapter" in refused(capsys, "evaluate", str(tmp_path))
    assert "holds no adapter yet" in refused(
        capsys, "evaluate", str(trained.folder / "recipe.yaml"), "--output_dir", "x"
    )
    assert "is not a folder with an adapter" in refused(capsys, "merge", "none", "--out", str(tmp_path / "m"))
    assert "there is no key 'lenght'" in refused(capsys, "evaluate", str(trained.folder), "--lenght", "3")
    with pytest.raises(SystemExit):
        main(["export", "x", "--to", "gguf", "--out", "y"])
    with pytest.raises(SystemExit):
        main(["env", "--stray"])


def test_an_adapter_of_another_base_is_refused(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    message = refused(capsys, "evaluate", str(trained.folder), "--model_name_or_path", str(other))
    assert "fingerprint" in message or "base" in message


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "merge", "export", "env", "estimate", "bench"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"paca {command}" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    """The command line itself; what `import paca` loads is another matter."""
    code = (
        "import sys, types; package = types.ModuleType('paca'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['paca'] = package; from paca.cli import _parser; _parser(); "
        "print([name for name in ('torch', 'transformers', 'peft', 'yaml', 'datasets') if name in sys.modules])"
    )
    package = Path(__file__).parents[2] / "paca"
    done = subprocess.run([sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
