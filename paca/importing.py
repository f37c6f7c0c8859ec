"""Brings adapters of other tools into paca's form: one-hot LoRA, and files of PEFT's own PaCA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from paca.convert import import_lora
from paca.errors import AdapterError
from paca.fingerprint import size_only
from paca.layer import in_out_features
from paca.pretrained import adapter_settings, dtype_argument, model_source
from paca.recipe import RecipeError
from paca.saved import SavedAdapter, read_adapter, refuse_full, to_tensors, write_adapter


def import_adapter(folder: Path, out: Path, base: str | None = None) -> str:
    """Write an adapter of another tool as one of ours, and say what it was.

    Args:
        folder: a saved LoRA adapter with one-hot A, or one of PEFT's own PaCA, whose file does not say how wide the
            layers are.
        out: must not exist, or be empty.
        base: the base model's folder or name, from whose configuration the widths are taken; a PaCA file needs it
            unless its own config names the base.

    Raises:
        RecipeError, FileNotFoundError, FileExistsError, AdapterError: if a folder is not as said, or the adapter has
            what ours has not.
    """
    kind = adapter_settings(folder, named_base=False).get("peft_type")
    if kind == "LORA":
        import_lora(folder, out)
        return "LoRA with one-hot A"
    refuse_full(out)
    saved = read_adapter(folder)
    saved.refuse_mask("import")
    source = base or saved.config.base_model_name_or_path
    if not source:
        raise AdapterError(f"{folder} does not name its base model; say it with --base, so that widths are known")
    config = copy.deepcopy(saved.config)
    config.base_fingerprint = _widths(str(source), saved) | (config.base_fingerprint or {})
    write_adapter(config, to_tensors(SavedAdapter(config, saved.layers, saved.others)), out)
    return "PaCA"


def _widths(source: str, saved: SavedAdapter) -> dict[str, str]:
    """Look up each adapted layer in the base model, made from its configuration without weights.

    Raises:
        AdapterError: if the base has no such layer, or one of another shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model_source(source))
        with torch.device("meta"):
            known: dict[str, Any] = {dtype_argument(): torch.float32}
            model = AutoModelForCausalLM.from_config(config, **known)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the base model {source} cannot be looked up: {error}") from error
    modules = dict(model.named_modules())
    widths = {}
    for name, layer in saved.layers.items():
        if name not in modules:
            raise AdapterError(f"{source} has no module {name}, which the adapter trains: it is another base model")
        in_features, out_features = in_out_features(modules[name])
        if out_features != len(layer.delta) or int(layer.index.max()) >= in_features:
            raise AdapterError(
                f"{name} maps {in_features} to {out_features} in {source}, and the adapter trains column "
                f"{int(layer.index.max())} of {len(layer.delta)} outputs: it is another base model"
            )
        widths[name] = size_only(in_features)
    return widths
