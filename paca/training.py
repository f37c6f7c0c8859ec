"""Runs a recipe: checks, data, model, evaluation before, training, evaluation after, and the files a run leaves."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paca import checkpoint as checkpoints
from paca.checkpoint import Checkpoint, CheckpointError
from paca.config import PacaConfig
from paca.data import Collator, Encoding, Prepared, count, form_of, label_names, prepare
from paca.pretrained import (
    TASK_TYPES,
    adapter_settings,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    to_device,
)
from paca.progress import use_readable_log
from paca.quantising import loading_options, recorded
from paca.recipe import Given, Recipe, RecipeError, read_file, resolve
from paca.rows import DataError, Rows, open_files, open_hub
from paca.schedule import dropped_out, go_to, steps_an_epoch
from paca.trainer import exact, trainer_class, training_arguments_class
from paca.whole import remove_unfinished, write_text

Say = Callable[[str], None]
logger = logging.getLogger("paca")

DEFAULT_LENGTH = 1024  # tokens, where neither recipe nor model says less

RECIPE, RESULTS, STATE, SAMPLES = "recipe.yaml", "all_results.json", "trainer_state.json", "samples.json"
PLOT, CARD = "training_loss.png", "README.md"
_OUTPUTS = (RECIPE, RESULTS, STATE, SAMPLES, PLOT, CARD, "adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Data:
    """A run's data; `held_out` is None if there is none, `classes` is empty but for a classification."""

    train: Prepared | None
    held_out: Prepared | None
    classes: tuple[str, ...]
    chat: bool  # whether the rows went through a chat template, so that prompts should, too


def train(recipe: Recipe, say: Say = print) -> dict[str, Any]:
    """Run a recipe from the pretrained model, or a checkpoint, to the saved adapter.

    Args:
        recipe: a checked recipe.
        say: receives each line meant for the user; on ranks other than the first nothing is said.

    Returns:
        The metrics, as written to `all_results.json`.

    Raises:
        RecipeError, DataError, CheckpointError: before any training, for what cannot work; CheckpointError also when
            the disk is full.
    """
    say = say if _is_main() else lambda line: None
    start = starting_point(recipe, say)
    run = recipe.run
    config, tokenizer = load_config(run), load_tokenizer(run)
    length = sequence_length(recipe, config, tokenizer)
    check_adapter_fits(recipe, config)
    loading_options(run, config)  # what cannot be quantised here is refused before data and weights are read
    data = load_data(recipe, tokenizer, length)
    assert data.train is not None
    _check_ids(data, config, tokenizer)
    if data.classes:
        recipe = recipe.with_run(classes=list(data.classes))  # whoever loads the adapter needs their order
    arguments = training_arguments(recipe, data)
    say(f"training data   {data.train.summary()}")
    if data.held_out:
        say(f"held-out data   {data.held_out.summary()}")

    from transformers import set_seed

    set_seed(arguments.seed)  # a classification head that the base model lacks is drawn now
    model = adapted_model(recipe, config, data, tokenizer, length, say)
    trainable, total = model.get_nb_trainable_parameters()
    counts = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    say(counts)

    if start and not recipe.adapter.get("reselect"):  # whose checkpoints differ in their columns
        expect_base_of(model, start)
    trainer = make_trainer(recipe, arguments, model, tokenizer, data, length)
    use_readable_log(trainer)
    out = recipe.output_dir
    try:
        if _is_main():
            _clear_the_way(recipe, start, say)
            write_text(out / RECIPE, recipe.to_yaml())
        before, samples = _before(recipe, trainer, tokenizer, data, say)
        set_seed(arguments.seed)  # what was evaluated or generated before must not change the training
        metrics = before | _train(trainer, start)
        if data.held_out:
            metrics |= _after(trainer)
        _add_samples(samples, "after", recipe, trainer, tokenizer, data.chat)
        trainer.accelerator.wait_for_everyone()
        _save(recipe, trainer, metrics, samples, counts)
    except Exception as error:
        if checkpoints.is_disk_full(error):
            remove_unfinished(out)
            raise CheckpointError(f"the disk is full: {error}. {checkpoints.after_full_disk(out)}") from error
        raise
    if dropped := dropped_out(model):
        say(f"dropped out     {len(dropped)} layers, which are as pretrained: {', '.join(dropped)}")
    _report(recipe, metrics, samples, data.chat, say)
    return metrics


def evaluate(recipe: Recipe, adapter: Path | None, say: Say = print) -> dict[str, Any]:
    """Measure the held-out loss of a recipe's model, with an adapter or without.

    Raises:
        RecipeError, DataError: if there is nothing to evaluate on.
    """
    say = say if _is_main() else lambda line: None
    run = recipe.run
    config, tokenizer = load_config(run), load_tokenizer(run)
    length = sequence_length(recipe, config, tokenizer)
    loading_options(run, config)
    data = load_data(recipe, tokenizer, length, only_held_out=True)
    if data.held_out is None:
        raise RecipeError("there is nothing to evaluate on: give eval_file, eval_split or eval_size")
    _check_ids(data, config, tokenizer)
    say(f"held-out data   {data.held_out.summary()}")
    with TemporaryDirectory() as scratch:  # the Trainer wants a folder even where nothing is saved
        arguments = training_arguments(recipe.with_training(output_dir=scratch), data, evaluate_only=True)
        model = base_model(recipe, config, data.classes, tokenizer)
        if adapter:
            model = load_adapter(model, adapter)
        elif getattr(model, "is_quantized", False):
            model._hf_peft_config_loaded = True  # else the Trainer refuses it for want of what could be trained
        trainer = make_trainer(recipe, arguments, model, tokenizer, data, length)
        use_readable_log(trainer, lines=False)
        metrics: dict[str, Any] = trainer.evaluate()
    return {key: value for key, value in metrics.items() if key not in ("epoch", "eval_model_preparation_time")}


def of_adapter(adapter: Path, given: Mapping[str, Given]) -> Recipe:
    """The recipe that an adapter was trained by, or the least that its settings say; keys in `given` win.

    Raises:
        RecipeError: if the folder holds no adapter.
    """
    settings = adapter_settings(adapter)
    # A checkpoint's recipe is that of the run around it.
    saved = next((read_file(f) for f in (adapter / RECIPE, adapter.parent / RECIPE) if f.is_file()), {})
    task = {theirs: ours for ours, theirs in TASK_TYPES.items()}.get(settings.get("task_type") or "", "causal_lm")
    least = {
        "model_name_or_path": settings["base_model_name_or_path"],
        "task": task,
        "quantization": recorded(settings),
    }
    where = str(adapter / "adapter_config.json")
    known = {key: Given(value, where) for key, value in least.items()} | saved | dict(given)
    for key in ("resume_from_checkpoint", "overwrite_output_dir"):
        known.pop(key, None)
    return resolve(known | {"output_dir": Given(str(adapter), where)})


def adapter_model(recipe: Recipe, adapter: Path | None) -> tuple[Any, Any]:
    """The recipe's base model, with the adapter on it if one is given, and the tokenizer saved with it."""
    saved = adapter or recipe.output_dir
    has_tokenizer = (saved / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(recipe.with_run(tokenizer_name_or_path=str(saved)).run if has_tokenizer else recipe.run)
    model = base_model(recipe, load_config(recipe.run), tuple(recipe.run.classes or ()), tokenizer)
    return (load_adapter(model, adapter) if adapter else model), tokenizer


# ---------------------------------------------------------------------------------------- checks before work starts


def starting_point(recipe: Recipe, say: Say) -> Checkpoint | None:
    """Decide where a run starts: at a checkpoint, or None for the pretrained model.

    Raises:
        RecipeError: if the output folder holds something and the recipe neither resumes nor overwrites, or the run to
            be resumed was another one.
        CheckpointError: if the checkpoint that the recipe names is not complete.
    """
    out, resume = recipe.output_dir, recipe.run.resume_from_checkpoint
    if out.exists() and not out.is_dir():
        raise RecipeError(f"output_dir {out} is a file")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError(f"output_dir {out} cannot be written: {parent} is read-only, or belongs to somebody else")
    named = isinstance(resume, str) and resume.lower() not in ("auto", "true", "false")
    if named:
        start: Checkpoint | None = checkpoints.require_complete(Path(str(resume)).expanduser())
    elif resume and str(resume).lower() != "false":
        start, passed_over = checkpoints.newest_complete(out)
        for path, fault in passed_over.items():
            say(f"passed over {path}: {fault}")
        if start is None:
            say(f"no complete checkpoint in {out}: starting from the pretrained model")
    else:
        start = None
    resumes_here = bool(resume) and (not named or (start is not None and start.path.parent.resolve() == out.resolve()))
    if resumes_here and (out / RECIPE).is_file():
        _check_same_run(recipe, say)
    elif not resumes_here and not recipe.run.overwrite_output_dir and _holds_a_run(out):
        raise RecipeError(
            f"output_dir {out} is not empty: choose another, go on with --resume_from_checkpoint auto, or replace what "
            "an earlier run left there with --overwrite_output_dir true"
        )
    if start:
        say(f"resuming from {start.path}")
        say_what_stays_behind(start, say)
    return start


def say_what_stays_behind(start: Checkpoint, say: Say) -> None:
    """Say which random state of a checkpoint the device in use cannot take over; the Trainer is silent about it."""
    from paca.registry import get_backend

    here = get_backend().device().type
    if others := sorted(checkpoints.random_states_of_devices(start.path) - {here}):
        say(f"the random state of {', '.join(others)} stays behind, as this run is on {here}: drop-out will differ")


def _holds_a_run(out: Path) -> bool:
    """Whether a folder holds more than the recipe of a run that never got to a result."""
    return out.is_dir() and any(path.name != RECIPE for path in out.iterdir())


def check_adapter_fits(recipe: Recipe, config: Any) -> None:
    """Find targets and ranks that the model does not have on a model without values, before data and weights are read.

    Raises:
        RecipeError: naming the layer, or the layers there are.
    """
    import torch
    from torch import nn

    from paca.estimate.step import Model
    from paca.model import PacaModel

    settings = adapter_config(recipe)
    try:
        with torch.device("meta"):
            model = Model(config, recipe.run.task, torch.float32, settings, recipe.run.trust_remote_code).empty()
    except Exception:  # custom code may look at values while it builds; such a model is checked when it is adapted
        logger.debug("the model cannot be built without values", exc_info=True)
        return
    try:
        if not PacaModel.targets(model, settings):
            linears = {
                name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"target_modules {recipe.adapter.get('target_modules')} matches no layer; the model's linear ones are "
                f"called {', '.join(sorted(linears))}"
            )
        PacaModel.check_fits(model, PacaModel.with_columns(model, settings), calibrates=True)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def sequence_length(recipe: Recipe, config: Any, tokenizer: Any) -> int:
    """Tokens of a sequence: `max_length`, or the model's limit and at most 1024.

    Raises:
        RecipeError: if `max_length` is beyond the model's limit.
    """
    limit, asked = max_positions(config, tokenizer), recipe.run.max_length
    if asked and limit and asked > limit:
        raise RecipeError(f"max_length {asked} is more than the {limit} tokens this model was made for")
    return asked or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)


def open_rows(recipe: Recipe) -> tuple[Rows | None, Rows | None]:
    """The sources of training and evaluation rows.

    Raises:
        DataError: if a file does not exist or is of an unknown kind, or the hub does not give the data set.
    """
    run = recipe.run

    def files(paths: str | list[str] | None, limit: int | None) -> Rows | None:
        paths = [paths] if isinstance(paths, str) else paths
        return open_files(paths, run.sample_by, run.columns, limit) if paths else None

    train, held_out = files(run.train_file, run.max_train_samples), files(run.eval_file, run.max_eval_samples)
    if run.dataset_name:
        name, subset = run.dataset_name, run.dataset_config
        train = open_hub(name, subset, run.train_split, run.columns, run.max_train_samples)
        if run.eval_split:
            held_out = open_hub(name, subset, run.eval_split, run.columns, run.max_eval_samples)
    return train, held_out


def _check_same_run(recipe: Recipe, say: Say) -> None:
    """Refuse to resume another adapter; say which other keys changed."""
    was = {key: item.value for key, item in read_file(recipe.output_dir / RECIPE).items()}
    now = recipe.flat()
    ways = {"resume_from_checkpoint", "overwrite_output_dir", "output_dir"}
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key) and key not in ways)
    fixed = {*PacaConfig.__dataclass_fields__, "model_name_or_path", "quantization", "task", "classes"}
    lines = [f"{key}: was {was.get(key)!r}, is {now.get(key)!r}" for key in changed]
    if fixed & set(changed):
        raise RecipeError(
            f"output_dir {recipe.output_dir} holds a run of another adapter ({'; '.join(lines)}): resume it with its "
            "own recipe, or choose another folder"
        )
    for line in lines:
        say(f"changed since the run began: {line}")


def _check_ids(data: Data, config: Any, tokenizer: Any) -> None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    largest = max(part.largest_id for part in (data.train, data.held_out) if part)
    if largest >= text.vocab_size:
        raise RecipeError(
            f"the tokenizer gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model knows "
            f"{text.vocab_size} tokens only: they do not belong together"
        )


# ---------------------------------------------------------------------------------------- data, model, Trainer


def load_data(recipe: Recipe, tokenizer: Any, length: int, only_held_out: bool = False) -> Data:
    """Read, check and tokenise the recipe's data."""
    run = recipe.run
    rows, held_out_rows = open_rows(recipe)
    if rows is None and (not only_held_out or run.eval_size):
        raise RecipeError("there is nothing to train on: give train_file or dataset_name")
    some = rows or held_out_rows
    if some is None:
        return Data(None, None, (), chat=False)
    classes = class_names(recipe, some)
    if run.packing and classes:
        raise RecipeError("packing joins documents, which a classification must keep apart: set packing: false")
    form = form_of(some, run.task)
    encoding = Encoding(length, run.completion_only_loss, run.packing, classes)

    def prepared(source: Rows, keep: Callable[[int], bool] | None = None, part: str = "") -> Prepared:
        return prepare(source, tokenizer, run.task, encoding, keep, part)

    train = held_out = None
    if run.eval_size and rows is not None:
        kept_out, part = _held_out_numbers(recipe, rows)
        held_out = prepared(rows, kept_out.__contains__, f"held out {part}")
        train = None if only_held_out else prepared(rows, lambda number: number not in kept_out, f"train {part}")
    else:
        train = prepared(rows) if rows is not None and not only_held_out else None
        held_out = prepared(held_out_rows) if held_out_rows is not None else None
    chat = form == "messages" or isinstance(next(iter(some)).values.get("prompt"), list)
    return Data(train, held_out, classes, chat)


def class_names(recipe: Recipe, rows: Rows) -> tuple[str, ...]:
    """The classes of a classification: the recipe's, or those of the data; none for another task."""
    if recipe.run.task != "sequence_classification":
        return ()
    classes = tuple(recipe.run.classes or label_names(rows))
    if len(classes) < 2:
        raise DataError(f"{rows.name}: all rows have the same label, {classes[0]!r}")
    return classes


def _held_out_numbers(recipe: Recipe, rows: Rows) -> tuple[set[int], str]:
    """Draw the rows that are kept out of training, and name the choice."""
    import numpy

    size, total = recipe.run.eval_size, count(rows)
    assert size is not None
    number = size if isinstance(size, int) else max(1, round(size * total))
    if number >= total:
        raise DataError(f"eval_size {size} leaves none of the {total} rows of {rows.name} to train on")
    seed = int(recipe.training.get("seed", 42))
    chosen = numpy.random.default_rng(seed).permutation(total)[:number]
    return set(chosen.tolist()), f"{number} of {total} by seed {seed}"


def adapter_config(recipe: Recipe) -> PacaConfig:
    """The recipe's PacaConfig.

    Raises:
        RecipeError: if it refuses a value.
    """
    try:
        config = PacaConfig(task_type=TASK_TYPES[recipe.run.task], revision=recipe.run.revision, **recipe.adapter)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    quantization, optim = recipe.run.quantization, str(recipe.training.get("optim", ""))
    if config.masked and quantization != "none":
        raise RecipeError(
            f"selection: {config.selection} trains entries that live in the weight, and quantization: "
            f"{quantization} quantises it; choose columns (selection: random), or leave the model as it is"
        )
    if (config.groups or config.copermute) and quantization != "none":
        raise RecipeError(
            f"{'groups' if config.groups else 'copermute'} needs weights that can be written, and quantization: "
            f"{quantization} quantises them; leave one of the two out"
        )
    by_column = [key for key in ("prefix_training", "groups", "reselect") if getattr(config, key) is not None]
    if by_column and any(form in optim for form in ("8bit", "4bit", "adafactor")):
        raise RecipeError(
            f"{by_column[0]} holds or clears single columns of the optimizer's state, which optim: {optim} keeps in "
            "another form; choose one with plain moments, such as adamw_torch"
        )
    return config


def training_arguments(recipe: Recipe, data: Data, evaluate_only: bool = False) -> Any:
    """The device's TrainingArguments, with the defaults that depend on data and device.

    Raises:
        RecipeError: if they refuse a value or contradict the data.
    """
    from paca.registry import get_backend

    chosen = dict(recipe.training)
    known = training_arguments_class().__dataclass_fields__
    chosen = {key: value for key, value in get_backend().training_arguments().items() if key in known} | chosen
    if name := get_backend().recipe_section:
        section = getattr(recipe.run, name) or {}
        if unknown := sorted(section.keys() - known.keys()):
            logger.warning("paca: %s: %s: ignored, the Trainer in use has no such argument", name, ", ".join(unknown))
        chosen |= {key: value for key, value in section.items() if key in known}
    if data.held_out:
        chosen.setdefault("eval_strategy", "epoch")
    elif str(chosen.get("eval_strategy", "no")) != "no":
        raise RecipeError(
            f"eval_strategy {chosen['eval_strategy']} needs held-out data: give eval_file, eval_split or eval_size"
        )
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if chosen.get(name) and f"{name}_kwargs" in known:
            chosen.setdefault(f"{name}_kwargs", {"use_reentrant": False})
    if evaluate_only:
        chosen |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    try:
        return training_arguments_class()(**chosen)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"TrainingArguments: {error}") from error


def base_model(recipe: Recipe, config: Any, classes: tuple[str, ...], tokenizer: Any) -> Any:
    """The pretrained model, told about the classes and the padding token."""
    if classes:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    model = load_model(recipe.run, config)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def adapted_model(recipe: Recipe, config: Any, data: Data, tokenizer: Any, length: int, say: Say) -> Any:
    """The pretrained model with a fresh adapter; a calibration pass chooses columns where the recipe asks for it.

    Raises:
        RecipeError: if the adapter does not fit the model.
    """
    from peft import get_peft_model

    from paca.calibration import calibrate
    from paca.registry import get_backend
    from paca.select import MEASURED

    backend, settings = get_backend(), adapter_config(recipe)
    model = base_model(recipe, config, data.classes, tokenizer)
    kept = "" if recipe.run.quantization == "none" else f", frozen linears in {recipe.run.quantization}"
    name, where = recipe.run.model_name_or_path, f"{backend.name} ({backend.describe()})"
    say(f"model           {name}, {model.dtype}{kept}, on {where}")
    say(f"strategies      {', '.join(f'{kind}={name}' for kind, name in backend.strategies.items())}")
    try:
        if settings.selection in MEASURED and not settings.columns:
            say(f"calibrating     selection={settings.selection} on {recipe.run.calibration_samples} sequences")
            model = to_device(model, backend.device())
            settings = calibrate(
                model, settings, _calibration_batches(recipe, data, tokenizer, length, backend.device())
            )
        adapted = get_peft_model(model, settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    kwargs = recipe.training.get("activation_checkpointing_kwargs") or recipe.training.get(
        "gradient_checkpointing_kwargs"
    )
    if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        adapted.enable_input_require_grads()  # else reentrant checkpointing passes no gradients
    return adapted


def expect_base_of(model: Any, start: Checkpoint) -> None:
    """Have a checkpoint refused, when it is loaded, if it was trained on another base, or one quantised otherwise.

    PEFT takes over the tensors alone where the adapter is there already.
    """
    from paca.layer import PacaLayer

    fingerprints = adapter_settings(start.path, named_base=False).get("base_fingerprint") or {}
    for layer in model.modules():
        if isinstance(layer, PacaLayer):
            layer.expected_fingerprint |= dict.fromkeys(layer.paca_delta, fingerprints.get(layer.name, ""))


def _calibration_batches(recipe: Recipe, data: Data, tokenizer: Any, length: int, device: Any) -> Any:
    assert data.train is not None
    rows, size = data.train.dataset, int(recipe.training.get("per_device_train_batch_size", 8))
    collate = _collator(recipe, tokenizer, length)
    number = min(recipe.run.calibration_samples, len(rows))
    for first in range(0, number, size):
        batch = collate([rows[i] for i in range(first, min(first + size, number))])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _collator(recipe: Recipe, tokenizer: Any, length: int) -> Collator:
    static = recipe.run.packing or recipe.run.pad_to_max_length
    return Collator(tokenizer.pad_token_id, length if static else None)


def make_trainer(recipe: Recipe, arguments: Any, model: Any, tokenizer: Any, data: Data, length: int) -> Any:
    """The device's Trainer for a recipe's model and data."""
    causal = recipe.run.task == "causal_lm"
    return exact(trainer_class(), perplexity=causal)(
        model=model,
        args=arguments,
        train_dataset=data.train.dataset if data.train else None,
        eval_dataset=data.held_out.dataset if data.held_out else None,
        data_collator=_collator(recipe, tokenizer, length),
        processing_class=tokenizer,
        compute_metrics=None if causal else _accuracy,
    )


def _accuracy(predictions: Any) -> dict[str, float]:
    scores = predictions.predictions[0] if isinstance(predictions.predictions, tuple) else predictions.predictions
    return {"accuracy": float((scores.argmax(-1) == predictions.label_ids).mean())}


# ---------------------------------------------------------------------------------------- the run itself


def _before(
    recipe: Recipe, trainer: Any, tokenizer: Any, data: Data, say: Say
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Measure and sample the model before the first step; a fresh adapter leaves it as it was pretrained."""
    samples = [{"prompt": prompt} for prompt in recipe.run.prompts]
    if not recipe.run.evaluate_before:
        return {}, samples
    say("before training")
    metrics: dict[str, Any] = trainer.evaluate(metric_key_prefix="eval_before") if data.held_out else {}
    _add_samples(samples, "before", recipe, trainer, tokenizer, data.chat)
    return metrics, samples


def _after(trainer: Any) -> dict[str, Any]:
    """Measure the trained model, unless that was done after the last step."""
    last: dict[str, Any] = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {key: value for key, value in last.items() if key != "step"}
    metrics: dict[str, Any] = trainer.evaluate()
    return metrics


def _add_samples(
    samples: list[dict[str, str]], when: str, recipe: Recipe, trainer: Any, tokenizer: Any, chat: bool
) -> None:
    from paca.generation import generate

    if not samples or recipe.run.task != "causal_lm" or not _is_main():
        return
    prompts = [sample["prompt"] for sample in samples]
    answers = generate(trainer.model, tokenizer, prompts, chat=chat, max_new_tokens=recipe.run.max_new_tokens)
    for sample, answer in zip(samples, answers, strict=True):
        sample[when] = answer


def _train(trainer: Any, start: Checkpoint | None) -> dict[str, Any]:
    """Train, or take over the adapter of a run that was killed after its last step."""
    from transformers import TrainerState

    from paca.registry import get_backend

    backend = get_backend()
    backend.reset_peak_memory()
    steps_an_epoch(trainer.model, _steps_of_an_epoch(trainer))
    if start is None or start.step < _last_step(trainer):
        go_to(trainer.model, start.step if start else 0)
        output = trainer.train(resume_from_checkpoint=str(start.path) if start else None)
        metrics = {key: value for key, value in output.metrics.items() if key != "total_flos"}
    else:
        # The Trainer would take one more step than the schedule has.
        trainer.state = TrainerState.load_from_json(str(start.path / STATE))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer.model.load_adapter(best or str(start.path), trainer.model.active_adapter, is_trainable=True)
        metrics = {"train_runtime": 0.0}
    return metrics | {"peak_memory_bytes": backend.memory().peak, "global_step": trainer.state.global_step}


def _last_step(trainer: Any) -> int:
    """How many optimizer steps the schedule has."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    return math.ceil(float(trainer.args.num_train_epochs) * _steps_of_an_epoch(trainer))


def _steps_of_an_epoch(trainer: Any) -> int:
    """How many optimizer steps take the Trainer through the data once."""
    batches = len(trainer.get_train_dataloader())
    steps: int = max(math.ceil(batches / trainer.args.gradient_accumulation_steps), 1)
    return steps


def _clear_the_way(recipe: Recipe, start: Checkpoint | None, say: Say) -> None:
    """Remove what the recipe allows to be replaced; rename checkpoints that this run will write again."""
    out, resumes = recipe.output_dir, bool(recipe.run.resume_from_checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    if recipe.run.overwrite_output_dir and not resumes:
        checkpoints.remove_all(out)
        for name in _OUTPUTS:
            (out / name).unlink(missing_ok=True)
    for path in checkpoints.set_aside(out, start.step if start and start.path.parent.resolve() == out.resolve() else 0):
        say(f"renamed to {path.name}: it is ahead of where this run starts")


# ---------------------------------------------------------------------------------------- what a run leaves


def _save(recipe: Recipe, trainer: Any, metrics: dict[str, Any], samples: list[dict[str, str]], counts: str) -> None:
    """Write adapter, state, metrics, plot and card, each whole before it takes its place."""
    from paca.card import model_card
    from paca.plots import plot_loss

    out = recipe.output_dir
    unfinished = out / ".run.unfinished"
    if _is_main():
        remove_unfinished(out)
    trainer.save_model(str(unfinished), _internal_call=True)
    if not _is_main():
        return
    trainer.state.save_to_json(str(unfinished / STATE))
    (unfinished / CARD).write_text(model_card(recipe, metrics, samples, counts), encoding="utf-8")
    # The adapter's weights come last: where they are, everything that belongs to them is.
    for file in sorted(unfinished.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, out / file.name)
    unfinished.rmdir()
    plot_loss(trainer.state.log_history, out / PLOT, recipe.run.model_name_or_path, metrics.get("eval_before_loss"))
    if samples:
        write_text(out / SAMPLES, json.dumps(samples, indent=2, ensure_ascii=False))
    write_text(out / RESULTS, json.dumps(metrics, indent=2))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _report(recipe: Recipe, metrics: dict[str, Any], samples: list[dict[str, str]], chat: bool, say: Say) -> None:
    """Print the results and the commands that come next."""
    from paca.card import before_and_after

    say("")
    if rows := before_and_after(metrics):
        say(f"{'held out':<12}{'before':>12}{'after':>12}")
        for name, before, after in rows:
            say(f"{name:<12}{before:>12}{after:>12}")
        say("")
    for sample in samples:
        say(f"prompt   {sample['prompt']}")
        for when in ("before", "after"):
            if when in sample:
                say(f"{when:<9}{' '.join(sample[when].split()) or '(nothing)'}")
        say("")
    out, adapter = recipe.output_dir, adapter_config(recipe)
    say(f"saved to {out}: adapter, {RECIPE}, {RESULTS}, {STATE}, {SAMPLES}, {PLOT}, {CARD}")
    say("next:")
    folder, merged, lora = (shlex.quote(f"{out}{ending}") for ending in ("", "-merged", "-lora"))
    if recipe.run.task == "causal_lm":
        prompt = json.dumps(samples[0]["prompt"] if samples else "…", ensure_ascii=False)
        say(f"  paca generate {folder}{' --chat' if chat else ''} --prompt {prompt}")
    say(f"  paca evaluate {folder}")
    say(f"  paca merge {folder} --out {merged}")
    if adapter.group_lasso:
        say(f"  paca adapters {folder} --layers")
    if adapter.prefix_training:
        least = adapter.prefix_training["min"]
        say(f"  paca export {folder} --to prefix --r {least} --out {shlex.quote(f'{out}-{least}')}")
    if not adapter.masked:  # LoRA has no form for single entries
        say(f"  paca export {folder} --to lora --out {lora}")


def _is_main() -> bool:
    """Whether this process is the one that speaks and writes; launchers set RANK."""
    return int(os.environ.get("RANK", "0")) == 0
