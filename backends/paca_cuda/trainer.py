"""A Trainer whose training steps are replayed from CUDA graphs."""

from __future__ import annotations

from typing import Any

from paca_cuda.graphs import GraphedModel


def graph_trainer() -> tuple[type[Any], type[Any]]:
    """Return a Trainer that captures its model, and its TrainingArguments."""
    from transformers import Trainer, TrainingArguments

    class CUDAGraphTrainer(Trainer):
        """Computes training losses with a `GraphedModel`; evaluation, saving and everything else see the model."""

        _graphed: GraphedModel | None = None

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Compute the loss of one batch, from a graph if the model trains."""
            if not model.training:
                return super().compute_loss(model, inputs, *args, **kwargs)
            if self._graphed is None or self._graphed.module is not model:
                self._graphed = GraphedModel(model)
            return super().compute_loss(self._graphed, inputs, *args, **kwargs)

    return CUDAGraphTrainer, TrainingArguments
