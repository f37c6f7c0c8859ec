"""A recipe: one flat mapping of keys, from a YAML file and the command line, checked before anything else starts.

The keys are those of three dataclasses: the device's `TrainingArguments`, `PacaConfig`, and `RunOptions` below. New
fields of the first two become keys by themselves.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names each key, what was found and what to do."""


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beyond the keys of TrainingArguments and PacaConfig: the model, the data and what is shown."""

    # The model
    model_name_or_path: str
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    tokenizer_name_or_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    attn_implementation: str | None = None
    backend: str | None = None
    strategies: dict[str, str] | None = None
    gaudi: dict[str, Any] | None = None
    # The data
    train_file: str | list[str] | None = None
    eval_file: str | list[str] | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    eval_size: int | float | None = None
    columns: dict[str, str] | None = None
    sample_by: Literal["line", "paragraph", "document"] = "line"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_length: int | None = None
    packing: bool = False
    pad_to_max_length: bool = False
    completion_only_loss: bool | None = None
    classes: list[str] | None = None
    calibration_samples: int = 64
    # What is shown and where a run starts
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 64
    evaluate_before: bool = True
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: the keys of each owner, all types right, nothing unknown."""

    run: RunOptions
    training: dict[str, Any]
    adapter: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        """Where everything that a run makes is put."""
        return Path(self.training["output_dir"]).expanduser()

    def flat(self) -> dict[str, Any]:
        """All keys in one mapping, as a file would give them; options left at None are not in it."""
        run = {f.name: getattr(self.run, f.name) for f in fields(RunOptions)}
        return {key: _plain(value) for key, value in (run | self.adapter | self.training).items() if value is not None}

    def to_yaml(self) -> str:
        """The recipe as a file that `paca train` reads back to the same recipe."""
        return yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True, width=100)

    def with_run(self, **changes: Any) -> Recipe:
        """The recipe with other run options."""
        return replace(self, run=replace(self.run, **changes))

    def with_training(self, **changes: Any) -> Recipe:
        """The recipe with other keys of TrainingArguments."""
        return replace(self, training=self.training | changes)


@dataclass(frozen=True)
class Given:
    """A value as it was given, and where, for messages."""

    value: Any
    where: str
    words: tuple[str, ...] | None = None  # the command line's own words, not yet read as YAML


# What the Trainer would do otherwise suits a library more than a person who waits for a command.
DEFAULTS = {
    "report_to": "none",
    "logging_steps": 10,
    "logging_first_step": True,
    "label_names": ["labels"],
    "remove_unused_columns": False,  # the collator takes what it needs; a model's forward may take **kwargs
}
ADAPTER_DEFAULTS = {"target_modules": "all-linear"}

# Fields that are not a user's to set: they are derived, or have no effect here, or cannot be written down.
_NOT_KEYS = {
    "training": {"do_train", "do_eval", "do_predict", "local_rank", "parallelism_config"},
    "adapter": {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "base_model_name_or_path",
        "base_fingerprint",
    },
}

# Names that changed between transformers 4.55 and 5: a recipe may use either, the installed one is passed on.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "warmup_ratio": "warmup_steps",  # a fraction, which `warmup_steps` takes since it became a float
}

# What other tools call our keys, for the hint in an error.
_ELSEWHERE = {
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_alpha": "paca_alpha",
    "alpha": "paca_alpha",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "dataset": "dataset_name",
    "torch_dtype": "dtype",
    "validation_file": "eval_file",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}


def read_recipe(path: Path | None, words: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and the command line's `--key value …`, which win over the file; errors as in `resolve`."""
    return resolve((read_file(path) if path is not None else {}) | read_words(words))


def resolve(given: Mapping[str, Given]) -> Recipe:
    """Put the recipe's backend in use and check its keys, because those of TrainingArguments depend on the device.

    Raises:
        RecipeError: naming every key that is unknown, missing or of the wrong type, with where it was given.
    """
    _choose_backend(given)
    from paca.trainer import training_arguments_class

    return check(given, training_arguments_class())


def read_file(path: Path) -> dict[str, Given]:
    """Read the flat mapping in a YAML (or JSON) file.

    Raises:
        RecipeError: if there is no such file, it is not a mapping, or a key is given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text: {error}") from error
    loader = _loader_class()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"recipe {path}: expected `key: value` lines, found a {node.tag.rpartition(':')[2]}")
        given: dict[str, Given] = {}
        for key_node, value_node in node.value:
            key, where = str(loader.construct_object(key_node)), f"{path}:{key_node.start_mark.line + 1}"
            if key in given:
                raise RecipeError(f"{where}: {key} is given a second time (first: {given[key].where})")
            given[key] = Given(loader.construct_object(value_node, deep=True), where)
        return given
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def read_words(words: Sequence[str]) -> dict[str, Given]:
    """Read `--key value`, `--key=value`, `--key a b c` (a list) and `--key` (true).

    Raises:
        RecipeError: for a word that belongs to no key, or a key given twice.
    """
    given: dict[str, Given] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or word == "--":
            raise RecipeError(f"unexpected {word!r} on the command line: keys are given as --key value")
        key, equals, value = word[2:].partition("=")
        end = position + 1
        while not equals and end < len(words) and not words[end].startswith("--"):
            end += 1
        values = (value,) if equals else tuple(words[position + 1 : end])
        key, where = key.replace("-", "_"), word.partition("=")[0]
        if key in given:
            raise RecipeError(f"{where} is given a second time")
        given[key] = Given([read_scalar(v) for v in values] if len(values) > 1 else None, where, values)
        position = end
    return given


def read_scalar(text: str) -> Any:
    """Read one command line word as YAML: numbers, lists and mappings mean what they do in a file, text stays whole."""
    loader = _loader_class()(text)
    try:
        value = loader.get_single_data()
    except yaml.YAMLError:
        return text
    finally:
        loader.dispose()
    return text if isinstance(value, str) else value


def check(given: Mapping[str, Given], arguments: type) -> Recipe:
    """Check keys and types against TrainingArguments, PacaConfig and RunOptions.

    Args:
        given: what the file and the command line said.
        arguments: the TrainingArguments class of the device.

    Raises:
        RecipeError: listing everything that is wrong, not only the first.
    """
    keys = known_keys(arguments)
    faults: list[str] = []
    values: dict[str, dict[str, Any]] = {
        "run": {},
        "training": {k: v for k, v in DEFAULTS.items() if k in keys},
        "adapter": dict(ADAPTER_DEFAULTS),
    }
    for name, item in given.items():
        key = _installed_name(name, keys)
        if key not in keys:
            faults.append(f"{item.where}: there is no key {name!r}{_nearest(name, keys)}")
            continue
        owner, hint = keys[key]
        try:
            values[owner][key] = (
                convert_words(item.words, hint) if item.words is not None else convert(item.value, hint)
            )
        except _Mismatch as mismatch:
            faults.append(f"{item.where}: {name} must be {describe(hint)}; found {mismatch}")
    if values["run"].get("gaudi"):
        values["run"]["gaudi"], wrong = _of_section(values["run"]["gaudi"], keys, given["gaudi"].where)
        faults += wrong
    faults += _missing(values, given)
    faults += _out_of_range(values, given)
    if faults:
        raise RecipeError(
            "the recipe has " + ("an error" if len(faults) == 1 else f"{len(faults)} errors") + _listed(faults)
        )
    return Recipe(RunOptions(**values["run"]), values["training"], values["adapter"])


def known_keys(arguments: type) -> dict[str, tuple[str, Any]]:
    """Every key with its owner ("run", "training" or "adapter") and its type hint; ours come first."""
    from paca.config import PacaConfig

    keys: dict[str, tuple[str, Any]] = {}
    for owner, cls in (("run", RunOptions), ("adapter", PacaConfig), ("training", arguments)):
        hints = get_type_hints(cls)
        for item in _settable(fields(cls)):
            if item.name not in _NOT_KEYS.get(owner, ()):
                keys.setdefault(item.name, (owner, hints[item.name]))
    return keys


def _of_section(
    section: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Check the keys that hold on one device only; where its Trainer is not installed, nobody knows the others' types.

    Returns:
        The section with its values converted, and what is wrong with it.
    """
    converted, faults = dict(section), []
    knows_all = "use_habana" in keys
    for name, value in section.items():
        owner, hint = keys.get(name, ("", None))
        if (not owner and knows_all) or owner not in ("", "training"):
            faults.append(f"{where}: gaudi: takes keys of GaudiTrainingArguments, found {name!r}{_nearest(name, keys)}")
        elif owner:
            try:
                converted[name] = convert(value, hint)
            except _Mismatch as mismatch:
                faults.append(f"{where}: gaudi: {name} must be {describe(hint)}; found {mismatch}")
    return converted, faults


class _Mismatch(Exception):
    """A value that does not fit its type; the message shows it."""

    def __init__(self, value: Any) -> None:
        super().__init__(f"{value!r} ({'null' if value is None else type(value).__name__})")


def convert(value: Any, hint: Any) -> Any:
    """Return the value as the hinted type, changing only what YAML leaves open: 1e3 for 1000, yes, no, one for a list.

    Raises:
        _Mismatch: if it does not fit.
    """
    if hint is Any or (hint is type(None) and value is None):
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        choices = [arg for arg in args if _is_choice(arg)]
        # An enum next to `str` is the list of the strings that are meant: `SchedulerType | str`.
        members = [arg for arg in args if not (choices and arg is str)]
        # What is of a member's very type stays as it is: 3 an int, "a" text and no list of one.
        for arg in sorted(members, key=lambda arg: type(value) is not arg):
            try:
                return convert(value, arg)
            except _Mismatch:
                continue
        raise _Mismatch(value)
    if _is_choice(hint):
        if value in _choices(hint):
            return value
        raise _Mismatch(value)
    if origin is list or hint is list:
        if isinstance(value, str) and args == (str,):
            return [value]
        if not isinstance(value, (list, tuple)):
            raise _Mismatch(value)
        return [convert(item, args[0]) if args else item for item in value]
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise _Mismatch(value)
        return {convert(k, args[0]): convert(v, args[1]) for k, v in value.items()} if args else value
    return _convert_plain(value, hint)


def _convert_plain(value: Any, hint: Any) -> Any:
    if hint is bool and isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    allowed = (int, float) if hint is float else hint
    if isinstance(hint, type) and isinstance(value, allowed) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _Mismatch(value)


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def convert_words(words: tuple[str, ...], hint: Any) -> Any:
    """Return the command line's words as the hinted type; a text key takes `2024` as text."""
    if not words:
        return convert(True, hint)
    value = [read_scalar(word) for word in words] if len(words) > 1 else read_scalar(words[0])
    try:
        return convert(value, hint)
    except _Mismatch:
        if value is None:
            raise
        try:
            return convert(list(words) if len(words) > 1 else words[0], hint)
        except _Mismatch:
            raise _Mismatch(value) from None


def describe(hint: Any) -> str:
    """Name a type hint for people: "int", "true or false", "text or a list of text", "one of linear, cosine"."""
    plain = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        dict: "a mapping",
        list: "a list",
    }
    if hint in plain:
        return plain[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        members = [arg for arg in args if arg is not type(None)]
        if any(_is_choice(arg) for arg in members):
            members = [arg for arg in members if arg is not str]
        if int in members and float in members:
            members.remove(int)
        named = [describe(arg) for arg in members] + (["null"] if type(None) in args else [])
        return " or ".join(dict.fromkeys(named))
    if _is_choice(hint):
        return "one of " + ", ".join(str(choice) for choice in _choices(hint))
    if origin is list:
        return f"a list of {describe(args[0]).removeprefix('an ').removeprefix('a ')}s".replace("texts", "text")
    if origin is dict:
        return "a mapping"
    return getattr(hint, "__name__", str(hint))


def _is_choice(hint: Any) -> bool:
    return get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, Enum))


def _choices(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) is Literal else [member.value for member in hint]


def _installed_name(name: str, keys: Mapping[str, Any]) -> str:
    """The name under which the installed transformers knows a key that it renamed."""
    old = {new: old for old, new in _RENAMED.items() if new != "warmup_steps"}
    new = _RENAMED.get(name)
    if new in keys and (name not in keys or name.startswith("gradient_checkpointing")):
        return str(new)
    return old[name] if name in old and name not in keys else name


def _nearest(name: str, keys: Iterable[str]) -> str:
    if (meant := _ELSEWHERE.get(name, "")) in keys:
        return f"; here it is called {meant!r}"
    near = get_close_matches(name, keys, n=1)
    return f"; the nearest is {near[0]!r}" if near else "; docs/training.md lists the keys"


# The least that a number may be, where TrainingArguments takes any and the Trainer finds out when the data is read.
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
}


def _out_of_range(values: Mapping[str, Mapping[str, Any]], given: Mapping[str, Given]) -> list[str]:
    from paca.config import PacaConfig

    training, faults = values["training"], []
    for name, least in _AT_LEAST.items():
        if isinstance(number := training.get(name), int | float) and number < least:
            faults.append(f"{given[name].where}: {name} must be at least {least}; found {number}")
    if training.get("max_steps") == 0:
        faults.append(f"{given['max_steps'].where}: max_steps 0 trains nothing; leave it out to train num_train_epochs")
    if training.get("bf16") and training.get("fp16"):
        faults.append("bf16 and fp16 are both on: keep one")
    try:
        PacaConfig(**values["adapter"])
    except (ValueError, TypeError) as error:
        faults.append(str(error))
    return faults


def _missing(values: Mapping[str, Mapping[str, Any]], given: Mapping[str, Given]) -> list[str]:
    run, training = values["run"], values["training"]
    faults = []
    if "model_name_or_path" not in given:
        faults.append("model_name_or_path is missing: a folder, a name on the hub, or quickstart:NAME")
    if not training.get("output_dir") and "output_dir" not in given:
        faults.append("output_dir is missing: the folder that receives the adapter, the checkpoints and the metrics")
    if run.get("train_file") and run.get("dataset_name"):
        faults.append("train_file and dataset_name are both given: keep one")
    for name in ("max_length", "max_train_samples", "max_eval_samples", "max_new_tokens", "calibration_samples"):
        if run.get(name) is not None and run[name] < 1:
            faults.append(f"{given[name].where}: {name} must be at least 1; found {run[name]}")
    size = run.get("eval_size")
    if size is not None and (size <= 0 or (isinstance(size, float) and size >= 1)):
        faults.append(
            f"{given['eval_size'].where}: eval_size must be a count or a fraction between 0 and 1; found {size}"
        )
    if size is not None and (run.get("eval_file") or run.get("eval_split")):
        faults.append("eval_size and eval_file or eval_split are both given: keep one")
    return faults


def _choose_backend(given: Mapping[str, Given]) -> None:
    """Put the recipe's backend in use, or the detected one with the recipe's strategies."""
    from paca.errors import BackendUnavailableError
    from paca.registry import get_backend, set_backend

    name, strategies = given.get("backend"), given.get("strategies")
    if name is None and strategies is None:
        return
    try:
        wanted = _text(name) if name is not None else get_backend().name
        options = (
            convert_words(strategies.words, dict)
            if strategies and strategies.words
            else strategies and strategies.value
        )
        set_backend(wanted, **(options or {}))
    except (ValueError, TypeError, BackendUnavailableError, _Mismatch) as error:
        where = (name or strategies or Given(None, "backend")).where
        raise RecipeError(f"{where}: {error}") from error


def _text(item: Given) -> str:
    return item.words[0] if item.words else str(item.value)


def _listed(faults: Sequence[str]) -> str:
    return f": {faults[0]}" if len(faults) == 1 else ":\n  " + "\n  ".join(faults)


def _settable(items: Iterable[Field[Any]]) -> list[Field[Any]]:
    return [item for item in items if item.init and not item.name.startswith("_")]


def _plain(value: Any) -> Any:
    """The value as YAML's own types."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value


@cache
def _loader_class() -> type[yaml.SafeLoader]:
    """YAML 1.2's scalars: `no` is text, `1e-3` a number. PyYAML has 1.1's, where it is the other way round."""

    class Loader(yaml.SafeLoader):
        pass

    replaced = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(number), list("-+0123456789."))
    return Loader
