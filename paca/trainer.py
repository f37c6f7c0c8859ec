"""The Trainer of the device in use. PaCA needs no callback in it: any Trainer trains a PaCA model."""

from __future__ import annotations

import math
from typing import Any

from paca.data import IGNORED
from paca.registry import get_backend


def trainer_class() -> type[Any]:
    """Return the Trainer class of the backend in use: transformers' own, or the device's drop-in for it."""
    return get_backend().trainer()[0]


def training_arguments_class() -> type[Any]:
    """Return the TrainingArguments class that belongs to `trainer_class()`."""
    return get_backend().trainer()[1]


def exact(base: type[Any], perplexity: bool) -> type[Any]:
    """Return a Trainer class that measures and resumes exactly.

    Its `eval_loss` is the mean over all target tokens of the evaluation data. The stock Trainer averages the means of
    batches, so that its value depends on how rows fall into batches, and its exponential is no perplexity.

    Args:
        base: a Trainer class.
        perplexity: whether to add `eval_perplexity`, exp(eval_loss), to the metrics.
    """
    import torch
    from torch import Tensor

    class ExactTrainer(base):  # type: ignore[misc]
        """Notes loss and token count of each batch that the base class evaluates."""

        def get_train_dataloader(self) -> Any:
            loader = super().get_train_dataloader()
            _never_go_back(getattr(getattr(loader, "batch_sampler", None), "sampler", None))
            return loader

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().prediction_step(model, inputs, *args, **kwargs)
            labels = inputs["labels"]
            # A language model's loss is over all labels but the first of a row; a classifier has one label a row.
            targets = (labels[..., 1:] != IGNORED).sum() if labels.dim() == 2 else torch.tensor(labels.numel())
            self._batches.append((result[0].detach(), targets))
            return result

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            self._batches: list[tuple[Tensor, Tensor]] = []
            output = super().evaluation_loop(*args, **kwargs)
            pairs = [(float(loss), int(targets)) for loss, targets in self._batches]
            total = math.fsum(loss * targets for loss, targets in pairs if targets)
            count = float(sum(targets for _, targets in pairs))
            if self.args.world_size > 1:
                sums = torch.tensor([total, count], device=self.args.device)
                total, count = self.accelerator.reduce(sums, "sum").tolist()
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = total / count
            if perplexity:
                output.metrics[f"{prefix}_perplexity"] = math.exp(min(total / count, 700.0))  # exp(710) overflows
            return output

    return ExactTrainer


def _never_go_back(sampler: Any) -> None:
    """Keep a sampler from being set to an epoch before its own.

    accelerate 1.10, which transformers 4.55 goes with, skips the batches behind a checkpoint with a loader that starts
    again at epoch 0, so that a run resumed in the middle of a later epoch sees rows in another order. Can go when
    accelerate 1.15, which is right, is the oldest in use.
    """
    if not hasattr(sampler, "set_epoch"):
        return
    set_epoch = sampler.set_epoch
    sampler.set_epoch = lambda epoch: set_epoch(max(epoch, sampler.epoch))
