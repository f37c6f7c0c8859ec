"""Log lines that a person can read, above the Trainer's progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a line shows, in this order, and how. The rest is in trainer_state.json.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "eval_perplexity": ("perplexity", "{:.2f}"),
    "eval_accuracy": ("accuracy", "{:.4f}"),
    "eval_before_loss": ("held-out loss", "{:.4f}"),
    "eval_before_perplexity": ("perplexity", "{:.2f}"),
    "eval_before_accuracy": ("accuracy", "{:.4f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
}


def log_line(logs: Mapping[str, Any], step: int, last: int) -> str | None:
    """One line for what the Trainer logs, or None for what is reported elsewhere."""
    shown = [
        f"{name} {form.format(float(logs[key]))}" for key, (name, form) in _SHOWN.items() if logs.get(key) is not None
    ]
    if not shown:
        return None
    where = f"step {step:>{len(str(last))}}/{last}" if last else "step 0"
    return " · ".join([where, *shown])


def use_readable_log(trainer: Any, lines: bool = True) -> None:
    """Put lines of ours, or none, in the place of the Trainer's printed dictionaries."""
    from tqdm import tqdm
    from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

    class ReadableLog(TrainerCallback):
        """Prints what is logged."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            line = log_line(logs or {}, state.global_step, state.max_steps)
            if line and state.is_world_process_zero:
                tqdm.write(line)

    class QuietProgress(ProgressCallback):
        """The progress bar without its own log lines."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    bar = any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if bar:
        trainer.add_callback(QuietProgress)
    if lines:
        trainer.add_callback(ReadableLog)
