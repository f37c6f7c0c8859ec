"""Runs one training step on shapes alone and says what was in memory when most was.

What repeats is run twice: a model of three layers instead of two shows what a layer costs, and every stage of a step
grows by the same bytes with each further one.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from paca.config import PacaConfig
from paca.estimate.layers import FrozenLinear
from paca.estimate.meter import Meter
from paca.estimate.methods import Method, adapted
from paca.layer import in_out_features
from paca.model import PacaModel, rank_of
from paca.pretrained import dtype_argument
from paca.recipe import Recipe

# Kinds of memory, in the order they are shown.
KINDS = {
    "weights": "weights",
    "columns": "base columns kept",
    "adapter": "deltas or adapters",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "kept": "kept for backward",
    "logits": "logits and loss",
    "dequantised": "dequantised weights",
    "temporary": "other temporaries",
}

# Moments that an optimizer keeps of each trained value, in its dtype; two unless named here.
_MOMENTS = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}

_FEW, _MORE = 2, 3  # layers of the two models that stand for a deep one
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Work:
    """What a step is done on and how, as far as memory goes; hashable, so that no step is simulated twice.

    Attributes:
        sequences, length: the batch.
        padded: whether rows may be shorter, so that attention gets a mask.
        checkpointing: whether blocks are recomputed in backward.
        autocast: whether the Trainer runs the model under bfloat16 autocast.
        accumulates: whether gradients of earlier batches are there already.
        optim: as TrainingArguments call it.
    """

    sequences: int
    length: int
    padded: bool
    checkpointing: bool
    autocast: bool
    accumulates: bool
    optim: str

    @classmethod
    def of(cls, recipe: Recipe, sequences: int, length: int) -> Work:
        """The work that a recipe asks for."""
        training = recipe.training
        causal, filled = recipe.run.task == "causal_lm", recipe.run.packing or sequences == 1
        return cls(
            sequences,
            length,
            padded=not (causal and filled and not recipe.run.pad_to_max_length),
            checkpointing=bool(training.get("gradient_checkpointing") or training.get("activation_checkpointing")),
            autocast=bool(training.get("bf16") or training.get("fp16")),
            accumulates=int(training.get("gradient_accumulation_steps", 1)) > 1,
            optim=str(training.get("optim", "adamw_torch")),
        )


@dataclass(frozen=True, eq=False)
class Model:
    """A model and what is trained of it; compared by identity, because configurations cannot be hashed."""

    config: Any  # transformers' configuration; with the number of layers that is asked for
    task: str
    dtype: torch.dtype
    settings: PacaConfig
    trust_remote_code: bool = False

    def empty(self, layers: int | None = None) -> Any:
        """The pretrained model without values, on the device of the surrounding context.

        Args:
            layers: how many, if not all.
        """
        import transformers

        auto: Any = transformers.AutoModelForCausalLM
        if self.task == "sequence_classification":
            auto = transformers.AutoModelForSequenceClassification
        config = copy.deepcopy(self.config)
        if layers is not None:
            config.num_hidden_layers = layers
            if vars(config).get("layer_types"):  # some work them out from other settings
                config.layer_types = config.layer_types[:layers]
        options = {dtype_argument(): self.dtype, "trust_remote_code": self.trust_remote_code}
        return auto.from_config(config, **options)

    def sizes(self, layers: int | None = None) -> tuple[int, int, int, int]:
        """Count values: all, those of linears, and the inputs and outputs of what is adapted, each r times.

        Raises:
            ValueError: if a layer has fewer inputs than r.
        """
        with torch.device("meta"):
            base = self.empty(layers)
        targets = {name: in_out_features(layer) for name, layer in PacaModel.targets(base, self.settings).items()}
        ranks = {name: rank_of(self.settings, name) for name in targets}
        for name, (wide, _) in targets.items():
            if ranks[name] > wide:
                raise ValueError(
                    f"r = {ranks[name]} is more than the {wide} input columns of {name}; choose r ≤ {wide}"
                )
        return (
            sum(parameter.numel() for parameter in base.parameters()),
            sum(module.weight.numel() for module in base.modules() if type(module) is nn.Linear),
            sum(ranks[name] * wide for name, (wide, _) in targets.items()),
            sum(ranks[name] * tall for name, (_, tall) in targets.items()),
        )


@dataclass(frozen=True)
class Footprint:
    """Bytes of each kind at the highest point of each stage of a step, and those kept from forward to backward."""

    stages: Mapping[str, Mapping[str, int]]
    kept: int
    remark: str = ""

    @property
    def at_peak(self) -> Mapping[str, int]:
        """Bytes of each kind when most is in use."""
        return max(self.stages.values(), key=lambda use: sum(use.values()))

    @property
    def peak(self) -> int:
        """The most bytes in use at any time."""
        return sum(self.at_peak.values())


class CannotRun(RuntimeError):
    """The model cannot be run without values; the message says why."""


@lru_cache(maxsize=4096)
def footprint(model: Model, method: Method, work: Work) -> Footprint:
    """Predict the memory of one training step.

    Raises:
        CannotRun: if the model looks at values, which shapes do not have.
        ValueError, TypeError: if the adapter does not fit the model.
    """
    layers = int(getattr(model.config, "num_hidden_layers", 0))
    if not _repeats(model):
        return _run(model, method, work, None)
    few, more = (_run(model, method, work, some) for some in (_FEW, _MORE))
    stages = {
        stage: {kind: _further(few.stages[stage].get(kind, 0), use.get(kind, 0), layers) for kind in KINDS}
        for stage, use in more.stages.items()
    }
    return Footprint(stages, _further(few.kept, more.kept, layers), more.remark)


def _further(few: int, more: int, layers: int) -> int:
    """Follow the line through the values at `_FEW` and `_MORE` layers."""
    return more + (layers - _MORE) * (more - few)


@lru_cache(maxsize=64)
def _repeats(model: Model) -> bool:
    """Whether all layers of the model are alike, so that a few stand for all."""
    layers = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= _MORE or len(set(getattr(model.config, "layer_types", None) or [])) > 1:
        return False
    few, more, all_of_them = (model.sizes(some) for some in (_FEW, _MORE, layers))
    return all_of_them == tuple(_further(a, b, layers) for a, b in zip(few, more, strict=True))


def _run(model: Model, method: Method, work: Work, layers: int | None) -> Footprint:
    """Simulate one step of a model with so many layers, or all."""
    with _quiet():
        with torch.device("meta"):
            network = adapted(model.empty(layers), method, model.settings, model.dtype).train()
        return _run_on_shapes(network, model, work, whole=layers is None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what libraries remark on caches and renamed methods: it is meant for real runs."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _run_on_shapes(network: Any, model: Model, work: Work, whole: bool) -> Footprint:
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        _take_shapes_only(network)
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
        try:
            try:
                return simulate(network, batch_of(model.task, work), work, vocabulary, whole)
            except DataDependentOutputException:
                # transformers before 5 look into the mask, to leave it out where nothing is padded.
                batch = batch_of(model.task, replace(work, padded=False))
                found = simulate(network, batch, work, vocabulary, whole)
                return replace(found, remark="without the attention mask of padded batches")
        except Exception as error:  # custom model code may look at values, which shapes alone do not have
            raise CannotRun(f"{type(error).__name__}: {error}".splitlines()[0][:100]) from error


def _take_shapes_only(network: Any) -> None:
    """Turn a model without values on the meta device into one on the CPU; tied tensors stay tied."""
    new: dict[int, Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in new:
                    made = torch.empty(old.shape, dtype=old.dtype)
                    new[id(old)] = nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made
                tensors[name] = new[id(old)]


def batch_of(task: str, work: Work) -> dict[str, Any]:
    """What the Trainer gives the model in one step."""
    from transformers import DynamicCache

    ids = torch.zeros((work.sequences, work.length), dtype=torch.int64)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if task != "causal_lm":
        batch["labels"] = torch.zeros((work.sequences,), dtype=torch.int64)
    elif not work.padded:
        # Attention needs no mask; on shapes alone, transformers sees that only where there is a cache, and it makes
        # none when blocks are recomputed.
        batch |= {"attention_mask": None, "use_cache": True}
        batch |= {"past_key_values": DynamicCache()} if work.checkpointing else {}
    return batch


def simulate(network: Any, batch: dict[str, Any], work: Work, vocabulary: int | None, whole: bool) -> Footprint:
    """Run a step of an adapted model and watch its memory.

    Args:
        network: in training mode.
        batch: its arguments.
        work: how the step is done.
        vocabulary: the width of logits.
        whole: whether the model has all its layers, so that no stage needs to grow evenly with their number.
    """
    if work.checkpointing:
        # transformers 5 has another name for it
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    meter = Meter(lambda tensor: "logits" if tensor.dim() > 1 and tensor.shape[-1] == vocabulary else "temporary")
    _record_model(network, meter)
    for tensor in batch.values():
        if isinstance(tensor, Tensor):
            meter.record(tensor, "kept")
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if work.accumulates:
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
            meter.record(parameter.grad, "gradients")
    passed = _follow_gradients(trained, meter)
    with meter:
        with torch.autocast("cpu", torch.bfloat16, enabled=work.autocast):
            loss = network(**batch).loss
        end = meter.moment
        for storage in meter.living():
            if storage.kind == "temporary":
                storage.kind = "kept"
        kept = sum(storage.bytes for storage in meter.living() if storage.kind in ("kept", "logits"))
        loss.backward()
    last = meter.moment
    # A layer is passed when the last of its gradients is there. What is in use only falls, or only rises, from the
    # uppermost layer down to the lowest, so that one of these two has the highest point.
    uppermost, second = (passed[max(passed)], passed[sorted(passed)[:2][-1]]) if passed and not whole else (last, end)
    stages = {
        "forward": meter.use_at(meter.peak(0, end)),
        "backward, uppermost layer": meter.use_at(meter.peak(end, uppermost)),
        "backward, lowest layer": meter.use_at(meter.peak(second, last)),
        "optimizer step": _optimizer_step(meter, trained, work.optim),
    }
    state = sum(_optimizer_bytes(work.optim, parameter) for parameter in trained.values())
    return Footprint({stage: {**use, "optimizer": state} for stage, use in stages.items()}, kept)


def _record_model(network: Any, meter: Meter) -> None:
    """Note what is in memory before the step, by kind."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        columns = any(part in ("base_columns", "paca_indices") for part in name.split("."))
        meter.record(tensor, "adapter" if tensor.requires_grad else "columns" if columns else "weights")
    for module in network.modules():
        if isinstance(module, FrozenLinear):
            module.meter = meter


def _follow_gradients(trained: Mapping[str, Tensor], meter: Meter) -> dict[int, int]:
    """Record gradients as they are made; returns, by layer, the moment of its last one."""
    passed: dict[int, int] = {}
    for name, parameter in trained.items():
        number = _LAYER.search(name)

        def follow(parameter: Tensor, layer: int | None = int(number[1]) if number else None) -> None:
            assert parameter.grad is not None
            meter.record(parameter.grad, "gradients")
            if layer is not None:
                passed[layer] = meter.moment

        parameter.register_post_accumulate_grad_hook(follow)
    return passed


def _optimizer_step(meter: Meter, trained: Mapping[str, Tensor], optim: str) -> dict[str, int]:
    """What is in use while the optimizer steps."""
    now = meter.use_at(meter.moment)
    at_once = "fused" in optim or "8bit" in optim or optim == "sgd"
    # A multi-tensor optimizer makes the denominators of all parameters at once.
    return now | ({} if at_once else {"temporary": sum(p.numel() * p.element_size() for p in trained.values())})


def _optimizer_bytes(optim: str, parameter: Tensor) -> int:
    moments = next((number for kind, number in _MOMENTS.items() if optim.startswith(kind)), 2)
    return moments * parameter.numel() * (1 if "8bit" in optim else parameter.element_size())
