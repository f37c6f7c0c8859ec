"""How many parameters a recipe trains and how much memory it takes, told from the model's configuration alone.

Nothing is downloaded but the configuration and nothing is allocated: the model is made on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from paca.pretrained import dtype_argument
from paca.recipe import Recipe

# Bytes of optimizer state for each trained float32 value; two moments unless named here.
_OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "lion": 4}
_TWO_MOMENTS = 8


@dataclass(frozen=True)
class Estimate:
    """Counts and bytes; `activations` is None where the model cannot be run without values, as `remark` then says."""

    trainable: int
    total: int
    layers: int
    weights: int
    columns: int
    deltas: int
    gradients: int
    optimizer: int
    activations: int | None
    sequences: int
    length: int
    remark: str = ""

    @property
    def bytes(self) -> int:
        """All of it."""
        parts = (self.weights, self.columns, self.deltas, self.gradients, self.optimizer, self.activations or 0)
        return sum(parts)

    def lines(self) -> list[str]:
        """What `--dry-run` prints."""
        share = 100 * self.trainable / self.total
        batch = f"{self.sequences} x {self.length} tokens"  # dynamic padding may make them shorter
        kept = _size(self.activations) if self.activations is not None else "not estimated"
        remark = f" ({self.remark})" if self.remark else ""
        return [
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}",
            f"memory of one training step, {self.layers} layers adapted:",
            f"  weights               {_size(self.weights)}",
            f"  base columns kept     {_size(self.columns)}",
            f"  deltas                {_size(self.deltas)}",
            f"  gradients             {_size(self.gradients)}",
            f"  optimizer             {_size(self.optimizer)}",
            f"  kept for backward     {kept}, at {batch}{remark}",
            f"  total                 {_size(self.bytes)}",
            "Sums of tensor sizes. What is kept for backward is counted by running the frozen model on shapes alone,",
            "plus r channels for each gather. Temporaries, caches and the framework itself come on top.",
        ]


def estimate(recipe: Recipe, config: Any, length: int, classes: int = 0) -> Estimate:
    """Count parameters and bytes for one training step.

    Args:
        recipe: a checked recipe.
        config: the model's transformers configuration.
        length: tokens of one sequence.
        classes: how many classes a classification has.

    Raises:
        ValueError, TypeError: if the adapter does not fit the model.
    """
    import torch
    from peft import get_peft_model

    from paca.layer import PacaLayer
    from paca.training import adapter_config

    if classes:
        config.num_labels = classes
    dtype = _dtype(recipe, config)
    # How columns are chosen changes neither counts nor bytes, and the other ways need values.
    settings = replace(adapter_config(recipe), selection="random")
    with torch.device("meta"):
        base = _empty(recipe, config, dtype)
        weights = sum(p.numel() * p.element_size() for p in base.parameters())
        model = get_peft_model(base, settings, low_cpu_mem_usage=True)
    trainable, total = model.get_nb_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    held = sum(p.numel() * p.element_size() for p in trained)
    layers = [module for module in model.modules() if isinstance(module, PacaLayer)]
    width = torch.empty((), dtype=dtype).element_size()
    columns = sum(delta.numel() * width for layer in layers for delta in layer.paca_delta.values())
    sequences = int(recipe.training.get("per_device_train_batch_size", 8))
    kept, remark = _kept_for_backward(recipe, config, settings, dtype, sequences, length)
    return Estimate(
        trainable=trainable,
        total=total,
        layers=len(layers),
        weights=weights,
        columns=columns,
        deltas=held,
        gradients=held,
        optimizer=sum(p.numel() for p in trained) * _optimizer_bytes(recipe.training),
        activations=kept,
        sequences=sequences,
        length=length,
        remark=remark,
    )


def _kept_for_backward(
    recipe: Recipe, config: Any, settings: Any, dtype: Any, sequences: int, length: int
) -> tuple[int | None, str]:
    """Bytes that autograd keeps between forward and backward, and a remark, or why they are unknown.

    Under gradient checkpointing: what the ends of the model and one block keep, and the input of every block.
    """
    import copy

    from torch._subclasses.fake_tensor import DataDependentOutputException

    blocks, inputs = config, 0
    if recipe.training.get("gradient_checkpointing") or recipe.training.get("activation_checkpointing"):
        blocks = copy.deepcopy(config)
        blocks.num_hidden_layers = 1
        if getattr(blocks, "layer_types", None):
            blocks.layer_types = blocks.layer_types[:1]
        inputs = int(config.num_hidden_layers) * sequences * length * int(config.hidden_size) * dtype.itemsize

    def kept(padded: bool) -> int:
        return inputs + _saved_bytes(recipe, blocks, settings, dtype, sequences, length, padded)

    causal = recipe.run.task == "causal_lm"
    try:
        try:
            return kept(padded=not (causal and recipe.run.packing)), ""
        except DataDependentOutputException:
            # transformers before 5 look into the mask, to leave it out where nothing is padded.
            return kept(padded=False), "without the attention mask of padded batches"
    except Exception as error:  # custom model code may look at values, which shapes alone do not have
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:100]


def _saved_bytes(
    recipe: Recipe, config: Any, settings: Any, dtype: Any, sequences: int, length: int, padded: bool
) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from paca.model import PacaModel, rank_of
    from paca.select import shared_name

    kept: dict[int, tuple[Any, int]] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage, storage.nbytes())  # held, so that no address is used twice
        return tensor

    with FakeTensorMode():
        model = _empty(recipe, config, dtype)
        model.requires_grad_(False).train()
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        targets = PacaModel.targets(model, settings)
        for module in targets.values():
            module.register_forward_hook(_start_gradient)
        ids = torch.zeros((sequences, length), dtype=torch.int64)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        if recipe.run.task != "causal_lm":
            batch["labels"] = torch.zeros((sequences,), dtype=torch.int64)
        elif not padded:
            # Attention needs no mask; on shapes alone, transformers sees that only where there is a cache.
            batch |= {"attention_mask": None, "use_cache": True}
        low = bool(recipe.training.get("bf16") or recipe.training.get("fp16"))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=low)
        with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(**batch)
    gathers = {shared_name(name) if settings.share_columns else name: rank_of(settings, name) for name in targets}
    channels = sequences * length * sum(gathers.values()) * (2 if low else dtype.itemsize)
    return channels + sum(size for key, (_, size) in kept.items() if key not in own)


def _start_gradient(module: Any, inputs: Any, output: Any) -> None:
    """Let gradients flow from the first adapted layer on, as they do when it trains."""
    if not output.requires_grad:
        output.requires_grad_(True)


def _empty(recipe: Recipe, config: Any, dtype: Any) -> Any:
    """The model without values, on the device of the surrounding context."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    if recipe.run.task == "sequence_classification":
        auto = transformers.AutoModelForSequenceClassification
    options = {dtype_argument(): dtype, "trust_remote_code": recipe.run.trust_remote_code}
    return auto.from_config(config, **options)


def _dtype(recipe: Recipe, config: Any) -> Any:
    import torch

    named = recipe.run.dtype
    found = getattr(torch, named) if named != "auto" else getattr(config, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def _optimizer_bytes(training: Mapping[str, Any]) -> int:
    name = str(training.get("optim", "adamw_torch"))
    if "8bit" in name:
        return 2
    return next((size for kind, size in _OPTIMIZER_BYTES.items() if name.startswith(kind)), _TWO_MOMENTS)


def _size(number: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale / 10:
            return f"{number / scale:8.2f} {unit}"
    return f"{number / 2**10:8.2f} KiB"
