"""The methods whose memory is predicted, and how each makes a model trainable on shapes alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from paca.config import PacaConfig
from paca.estimate.layers import FrozenLinear, MaskStandIn, PacaStandIn, qlora_layer
from paca.model import PacaModel, rank_of
from paca.recipe import Recipe
from paca.select import shared_name


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Attributes:
        family: "paca" or "lora".
        weight_format: of the frozen linears: "none", "nf4", "int8" or "fp8".
        low: whether LoRA's adapters are in the GEMM's dtype instead of PEFT's default, float32.
        float8_gemm: whether PaCA's backend multiplies dense weights in float8, for which it copies them twice.
    """

    family: str
    weight_format: str = "none"
    low: bool = False
    float8_gemm: bool = False

    def label(self, dtype: torch.dtype) -> str:
        """Name it in a table, with the dtypes that set it apart.

        Args:
            dtype: of the GEMMs.
        """
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
        name = {"paca": "PaCA", "lora": "LoRA"}[self.family]
        weights = short if self.weight_format == "none" else self.weight_format
        adapters = f", {short if self.low else 'fp32'} adapters" if self.family == "lora" else ""
        return f"{'' if self.weight_format == 'none' else 'Q'}{name} {weights}{adapters}"


METHODS = {
    "lora": Method("lora"),
    "lora-nocast": Method("lora", low=True),
    "paca": Method("paca"),
    "qlora": Method("lora", "nf4"),
    "qlora-nocast": Method("lora", "nf4", low=True),
    "qpaca": Method("paca", "nf4"),
}


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe trains with."""
    return with_gemm_of(recipe, replace(METHODS["paca"], weight_format=recipe.run.quantization))


def with_gemm_of(recipe: Recipe, method: Method) -> Method:
    """Return a method that multiplies dense weights as a recipe wants it."""
    return replace(method, float8_gemm=(recipe.run.strategies or {}).get("gemm") == "fp8")


def adapted(model: Any, method: Method, settings: PacaConfig, dtype: torch.dtype) -> Any:
    """Return the model with an adapter, as far as memory goes.

    Args:
        model: a transformers model on shapes alone; changed.
        method: how it is trained.
        settings: what is adapted, at which rank; LoRA takes the same.
        dtype: of the GEMMs.
    """
    model.requires_grad_(False)
    targets = list(PacaModel.targets(model, settings))
    if method.weight_format != "none":
        _quantise(model, method.weight_format, dtype)
    if method.family == "lora":
        return _with_lora(model, method, settings, dtype)
    _with_columns(model, targets, settings, dtype, method.float8_gemm)
    if settings.bias == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith(".bias"))
    for name in _saved_modules(model, settings):
        _train_in_full(model, name)
    return model


def _with_columns(model: Any, targets: list[str], settings: PacaConfig, dtype: torch.dtype, float8_gemm: bool) -> None:
    layers = {name: model.get_submodule(name) for name in targets}
    tied = {id(weight) for weight in _tied_weights(model)}
    for name, layer in layers.items():
        swap = settings.residency == "swap" or id(layer.weight) in tied
        drawn_as = shared_name(name) if settings.share_columns else name
        rank = rank_of(settings, name)
        stand_in: nn.Module = (
            MaskStandIn(layer, rank, dtype, swap)
            if settings.masked
            else PacaStandIn(layer, rank, drawn_as, dtype, swap, float8_gemm)
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, stand_in)
        if layer.bias is not None and settings.bias != "none":
            layer.bias.requires_grad_(True)


def _quantise(model: Any, weight_format: str, dtype: torch.dtype) -> None:
    """Quantise every linear but the one that ends the model, as transformers does."""
    last = next(reversed(list(model.named_parameters())))[0].rpartition(".")[0]
    kept = {id(model.get_output_embeddings()), id(model.get_submodule(last))}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and id(module) not in kept:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FrozenLinear(module, weight_format, dtype))


def _with_lora(model: Any, method: Method, settings: PacaConfig, dtype: torch.dtype) -> Any:
    from peft import LoraConfig, get_peft_model

    same = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.r,
        lora_dropout=0.0,
        bias="lora_only" if settings.bias == "paca_only" else settings.bias,
        modules_to_save=settings.modules_to_save,
        task_type=settings.task_type,
        **{name: copy.copy(getattr(settings, name)) for name in same},
    )
    config._register_custom_module({FrozenLinear: qlora_layer()})
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    if method.low:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return adapted


def _tied_weights(model: Any) -> list[torch.Tensor]:
    seen: dict[int, int] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for _, parameter in named:
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return [parameter for _, parameter in named if seen[id(parameter)] > 1]


def _saved_modules(model: Any, settings: PacaConfig) -> list[str]:
    """The modules that train in full: those that are named, and the head of a classification."""
    heads = ["classifier", "score"] if settings.task_type == "SEQ_CLS" else []
    wanted = [*(settings.modules_to_save or []), *heads]
    return [name for name, _ in model.named_modules() if any(name.endswith(end) for end in wanted if name)]


def _train_in_full(model: Any, name: str) -> None:
    """Train a copy of a module; PEFT keeps the pretrained one beside it."""
    parent, _, leaf = name.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(name)
    owner.add_module(f"{leaf}_pretrained", module)
    setattr(owner, leaf, copy.deepcopy(module).requires_grad_(True))
