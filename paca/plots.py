"""The loss over the optimizer steps, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paca.whole import replacing


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, title: str, before: float | None = None) -> None:
    """Draw training and evaluation loss.

    Args:
        history: the Trainer's `log_history`: entries with `step` and `loss` or `eval_loss`.
        path: where to write the PNG; it replaces what is there when it is whole.
        title: above the picture.
        before: the evaluation loss before the first step.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trained = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    # The last evaluation may have been logged twice, at the end of an epoch and of the run.
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if before is not None:
        held_out = {0: before} | held_out
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if held_out:
        points = sorted(held_out.items())
        axes.plot(*zip(*points, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)" if "perplexity" in str(history) else "loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")
