"""Turns a PaCA adapter into a LoRA adapter without loss: A holds the one-hot rows of the trained columns, B the deltas.

W0 + s·B·A = W0 + s·Δ·Sᵀ, so that merged weights have the same bits and every LoRA server can serve the adapter.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from paca.config import PEFT_TYPE, settings
from paca.fingerprint import in_features_of

_DELTA, _INDICES = ".paca_delta", ".paca_indices"


def convert_to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return a `LoraConfig` and its tensors, as PEFT saves them, that do what a PaCA adapter of `model` does.

    Args:
        model: a PEFT model with a PaCA adapter.
        adapter_name: which adapter.

    Raises:
        ValueError: if there is no such PaCA adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter_name not in configs or configs[adapter_name].peft_type != PEFT_TYPE:
        found = ", ".join(f"{name} ({config.peft_type})" for name, config in configs.items()) or "none"
        raise ValueError(f"the model has no PaCA adapter {adapter_name!r}; it has: {found}")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    config = configs[adapter_name]
    lora = _lora_tensors(config, tensors)
    config.base_fingerprint = None  # of these tensors only
    return _lora_config(config), lora


def export_lora(adapter_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Write the LoRA form of a saved PaCA adapter to a new folder; stock PEFT loads it without paca.

    Args:
        adapter_dir: a folder written by `save_pretrained`.
        out_dir: must not exist, or be empty.

    Returns:
        `out_dir`.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: if either folder is not as said, or the adapter is broken.
    """
    source, target = Path(adapter_dir), Path(out_dir)
    weights = source / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{source} is not a saved adapter: there is no {SAFETENSORS_WEIGHTS_NAME} in it")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; choose a new folder")
    config = PeftConfig.from_pretrained(str(source))
    if config.peft_type != PEFT_TYPE:
        raise ValueError(f"{source} holds a {config.peft_type} adapter, not PaCA")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is truncated or damaged: {error}") from error
    lora = _lora_tensors(config, tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    save_file(lora, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _lora_config(config).save_pretrained(str(unfinished))
    unfinished.chmod(0o755)
    os.replace(unfinished, target)
    return target


def _lora_config(config: Any) -> LoraConfig:
    ours = settings(config)
    return LoraConfig(
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=ours.inference_mode,
        r=ours.r,
        lora_alpha=ours.paca_alpha,
        lora_dropout=0.0,
        target_modules=ours.target_modules,
        exclude_modules=ours.exclude_modules,
        layers_to_transform=ours.layers_to_transform,
        layers_pattern=ours.layers_pattern,
        rank_pattern=dict(ours.rank_pattern),
        alpha_pattern=dict(ours.alpha_pattern),
        fan_in_fan_out=ours.fan_in_fan_out,
        bias="lora_only" if ours.bias == "paca_only" else ours.bias,
        modules_to_save=ours.modules_to_save,
    )


def _lora_tensors(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and expand `<module>.paca_delta`, `<module>.paca_indices` to LoRA's two matrices; others pass."""
    widths = {name: in_features_of(recorded) for name, recorded in (settings(config).base_fingerprint or {}).items()}
    lora: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module = key.removesuffix(_DELTA)
        if key.endswith(_INDICES):
            continue
        if module == key:
            lora[key] = tensor.contiguous()
            continue
        name = module.removeprefix("base_model.model.")
        if name not in widths:
            raise ValueError(
                f"the adapter does not record the width of {name} (it was saved by another library); load it on its "
                "base model and call paca.convert_to_lora(model)"
            )
        if f"{module}{_INDICES}" not in tensors:
            raise ValueError(f"the adapter has no column numbers for {name}: {module}{_INDICES} is missing")
        one_hot = F.one_hot(tensors[f"{module}{_INDICES}"].cpu().long(), widths[name])  # (r, in)
        lora[f"{module}.lora_A.weight"] = one_hot.to(tensor.dtype).contiguous()
        lora[f"{module}.lora_B.weight"] = tensor.detach().cpu().contiguous()
    if not any(key.endswith(".lora_B.weight") for key in lora):
        raise ValueError("the adapter has no PaCA columns")
    return lora
