"""GaudiTrainer with what a PaCA model needs of it. Imports optimum-habana, so it is imported when a Trainer is wanted.

optimum-habana swaps transformers' model classes when its training arguments are made: make them before the model.
"""

from __future__ import annotations

import inspect
import logging
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from optimum.habana import (  # type: ignore[import-not-found]
    GaudiConfig,
    GaudiTrainer,
    GaudiTrainingArguments,
)
from torch import nn
from transformers.trainer import safe_globals  # type: ignore[attr-defined]  # defined there by 4.55, not by 5

from paca_hpu import bridge
from paca_hpu.portable import make_portable, make_scheduler_portable
from paca_hpu.writes import write_what_is_due

logger = logging.getLogger("paca")


@dataclass
class PacaGaudiTrainingArguments(GaudiTrainingArguments):  # type: ignore[misc]
    """GaudiTrainingArguments that use the device, in the process's mode, with the vendor's fused operations.

    The last two are fields of GaudiConfig, which a Trainer would otherwise be given beside its arguments.
    """

    use_habana: bool = True
    use_lazy_mode: bool = field(default_factory=bridge.is_lazy)
    use_fused_adam: bool = True
    use_fused_clip_norm: bool = True

    def __post_init__(self) -> None:
        if self.use_lazy_mode != bridge.is_lazy():
            raise ValueError(
                f"use_lazy_mode={self.use_lazy_mode} needs {bridge.MODE}={int(self.use_lazy_mode)} in the environment "
                "before Python starts"
            )
        super().__post_init__()


class PacaGaudiTrainer(GaudiTrainer):  # type: ignore[misc]
    """GaudiTrainer whose checkpoints other Trainers can read, and the other way round.

    Raises:
        ValueError: for `fp8`, which replaces every `nn.Linear`, those inside PaCA layers too, so that their columns
            would no longer train.
    """

    def __init__(
        self, model: Any = None, gaudi_config: Any = None, args: Any = None, *others: Any, **options: Any
    ) -> None:
        if getattr(args, "fp8", False) and model is not None and _has_columns(model):
            raise ValueError(
                "fp8=True lets optimum-habana replace the nn.Linear inside every PaCA layer (isinstance in "
                "accelerate/utils/transformer_engine.py), and the columns would silently stop training; use bf16=True"
            )
        if gaudi_config is None:
            gaudi_config = GaudiConfig(
                use_fused_adam=getattr(args, "use_fused_adam", True),
                use_fused_clip_norm=getattr(args, "use_fused_clip_norm", True),
                use_torch_autocast=bool(getattr(args, "bf16", False)),
            )
        self._said_of: set[Any] = set()
        _mend_checkpointing()
        super().__init__(model, gaudi_config, args, *others, **options)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Write the columns before an HPU graph is recorded, so that the write does not become part of it."""
        if training and self.args.use_hpu_graphs_for_training:
            write_what_is_due(self.model)
        return super()._wrap_model(model, training, dataloader)

    def create_optimizer(self) -> Any:
        """Make the optimizer; its state is saved as other Trainers save theirs."""
        optimizer = super().create_optimizer()
        make_portable(getattr(optimizer, "optimizer", optimizer))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler; its state is saved as other Trainers save theirs."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        make_scheduler_portable(scheduler, self.optimizer if optimizer is None else optimizer)
        return scheduler

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Say so, and go on, where another kind of device saved the checkpoint; GaudiTrainer itself says it to nobody.

        It passes over a missing state on one card, with a line of level INFO, and fails on several.
        """
        if checkpoint is None or _has_random_state_of_hpu(Path(checkpoint)):
            super()._load_rng_state(checkpoint)
            return
        with suppress(KeyError):  # the host's states have been set by then
            super()._load_rng_state(checkpoint)
        if checkpoint not in self._said_of:
            self._said_of.add(checkpoint)
            logger.warning(
                "paca: %s was saved on another kind of device: the random state of the HPU starts anew, and drop-out "
                "differs from what it would have been there",
                checkpoint,
            )


def _has_random_state_of_hpu(checkpoint: Path) -> bool:
    files = sorted(checkpoint.glob("rng_state*.pth"))
    if not files:
        return True  # GaudiTrainer says that by itself
    with safe_globals():
        return "hpu" in torch.load(files[0], weights_only=True)


def _has_columns(model: nn.Module) -> bool:
    return any(hasattr(module, "paca_delta") for module in model.modules())


def _mend_checkpointing() -> None:
    """Replace optimum-habana's checkpoint function in lazy mode by torch's own where it would drop an argument.

    Release 1.21.2 hands its arguments to a generator of torch by position; torch 2.9 put `early_stop` before them, and
    the recomputation then fails with "'>' not supported between 'NoneType' and 'int'". Can go when no such release is
    supported.
    """
    from optimum.habana.transformers import gradient_checkpointing  # type: ignore[import-not-found]

    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    takes_early_stop = "early_stop" in inspect.signature(generator).parameters
    leaves_it_out = re.search(r"\bdebug,\s*\*args", inspect.getsource(gradient_checkpointing.checkpoint))
    if takes_early_stop and leaves_it_out:
        gradient_checkpointing.checkpoint = _checkpoint


_torchs_checkpoint = torch.utils.checkpoint.checkpoint


def _checkpoint(function: Any, *args: Any, use_reentrant: bool | None = None, **options: Any) -> Any:
    """Recompute as torch does; never reentrant, as optimum-habana demands in lazy mode."""
    return _torchs_checkpoint(function, *args, use_reentrant=False, **options)
