"""How a recipe's `quantization` key loads the frozen weights in fewer bits, and what has to be there for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from paca.recipe import RecipeError, RunOptions

# What `paca.quantised` calls a format in fingerprints, and what a recipe does.
_RECORDED = {"nf4": "nf4", "int8": "int8", "Float8Tensor": "fp8"}
PACKAGES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "fp8": "torchao"}
EXTRA = "paca-torch[quant]"  # installs them


def loading_options(run: RunOptions, config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise a model while it is loaded, on the device in use, or none.

    Linear layers but the output layer are quantised; norms, embeddings and output layer stay in the recipe's dtype, as
    in TRL, and are not cast to float32 as PEFT's `prepare_model_for_kbit_training` would.

    Args:
        run: whose `quantization` says how; "none" needs no arguments.
        config: the model's transformers configuration.

    Raises:
        RecipeError: if the package is missing, the device has no kernels for the format, or the model is quantised.
    """
    from paca.registry import get_backend

    if run.quantization == "none":
        return {}
    wanted, backend = run.quantization, get_backend()
    if already := getattr(config, "quantization_config", None):
        method = already.get("quant_method") if isinstance(already, dict) else getattr(already, "quant_method", already)
        raise RecipeError(
            f"quantization {wanted}: {run.model_name_or_path} is quantised already ({method}) and is loaded as it is; "
            "leave the key out"
        )
    package = PACKAGES[wanted]
    if find_spec(package) is None:
        raise RecipeError(f"quantization {wanted} needs {package}, which is not installed: pip install '{EXTRA}'")
    formats, device = backend.capabilities.quantised, backend.device()
    if wanted not in formats:
        known = ", ".join([*sorted(formats), "none"])
        raise RecipeError(f"quantization {wanted}: the {backend.name} backend does not have it; it has {known}")
    try:
        settings = _SETTINGS[wanted](compute_dtype(run, config), device)
    except ImportError as error:  # installed, but not for this torch or this machine
        raise RecipeError(f"quantization {wanted}: {package} cannot be used here: {error}") from error
    return {"quantization_config": settings, "device_map": {"": device}}


def recorded(settings: Mapping[str, Any]) -> str:
    """Say how the base was quantised that an adapter's settings have fingerprints of; "none" if it was not, or unknown.

    Args:
        settings: as in `adapter_config.json`.
    """
    fingerprints = settings.get("base_fingerprint") or {}
    formats = {":".join(str(found).split(":")[1:-1]) for found in fingerprints.values()}
    return next((_RECORDED[found] for found in sorted(formats) if found in _RECORDED), "none")


def compute_dtype(run: RunOptions, config: Any) -> Any:
    """The dtype that GEMMs run in: the recipe's, or that of the checkpoint."""
    import torch

    named = run.dtype if run.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named


def _nf4(dtype: Any, device: Any) -> Any:
    """QLoRA's format (arXiv 2305.14314): 4-bit NormalFloat, double quantisation."""
    from transformers import BitsAndBytesConfig

    _check_bitsandbytes("nf4", device)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _int8(dtype: Any, device: Any) -> Any:
    """LLM.int8 (arXiv 2208.07339), whose outlier channels are multiplied in 16 bits."""
    from transformers import BitsAndBytesConfig

    _check_bitsandbytes("int8", device)
    # It tells of each product that its input is cast, some thousand times a minute.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True)


def _fp8(dtype: Any, device: Any) -> Any:
    """A float8 weight with a scale for each row; activations stay in the GEMM's dtype."""
    from transformers import TorchAoConfig

    quantization = import_module("torchao.quantization")  # which has no types
    return TorchAoConfig(quantization.Float8WeightOnlyConfig(set_inductor_config=False))


_SETTINGS: dict[str, Callable[[Any, Any], Any]] = {"nf4": _nf4, "int8": _int8, "fp8": _fp8}


def _check_bitsandbytes(wanted: str, device: Any) -> None:
    import bitsandbytes

    known = set(getattr(bitsandbytes, "supported_torch_devices", ()))
    if known and device.type not in known:
        raise RecipeError(
            f"quantization {wanted}: the installed bitsandbytes is for {', '.join(sorted(known))}, not {device.type}"
        )
