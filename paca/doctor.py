"""Runs a few steps of a recipe and says what a device that compiles graphs would stumble over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from paca.recipe import Given, Recipe, read_file, read_words, resolve

if TYPE_CHECKING:
    from paca.backend import Backend

REHEARSAL = "hpu-rehearsal"
WARM_UP = 2  # torch's AdamW makes its state on the device in the first step


def graphs(path: Path | None, words: Sequence[str], steps: int, say: Callable[[str], None] = print) -> bool:
    """Record the graphs of a recipe's first optimizer steps.

    On a Gaudi it runs there, and the vendor's own count of compilations is printed beside the recorded one; elsewhere
    Gaudi's operations run on the CPU. With `graph=compile` the steps are taken once more, because torch.compile leaves
    everything as it is while operations are recorded.

    Args:
        path: the recipe.
        words: the command line's keys.
        steps: how many optimizer steps to take.
        say: receives each line.

    Returns:
        Whether nothing has to be put right.
    """
    from paca.registry import available_backends

    given = (read_file(path) if path is not None else {}) | read_words(words)
    if available_backends()["hpu"] is not None:
        named = given.get("backend", Given("hpu", ""))
        name = named.words[0] if named.words else named.value
        if name not in ("hpu", REHEARSAL) and given.pop("strategies", None) is not None:
            say(f"the strategies are left aside: they are those of the backend {name}")
        given["backend"] = Given(REHEARSAL, f"the rehearsal, {REHEARSAL}")
    recipe = resolve(given)
    say(
        f"recording {steps} optimizer steps; logging, evaluation and saving are left out: each of them stops the device"
    )
    with TemporaryDirectory() as scratch:
        quiet = _quiet(recipe, scratch, steps)
        recorder, counted = _record(quiet, steps, say)
        compiled, breaks, recounted = _compile(quiet, steps) if _compiles() else ([], [], None)
    for line in recorder.report():
        say(line)
    counts = {"torch.compile's graphs": compiled, "compiled, by the vendor": recounted or counted or []}
    for label, count in counts.items():
        if count:
            say(f"{label:24} {', '.join(map(str, count))} in steps 1 to {len(count)}")
    for reason in breaks:
        say(f"graph break: {reason}")
    return recorder.is_clean and not breaks and not any(sum(count[WARM_UP:]) for count in counts.values())


def _compiles() -> bool:
    from paca.backend import GraphMode
    from paca.registry import get_backend

    return get_backend().graph_mode is GraphMode.COMPILE


def _quiet(recipe: Recipe, folder: str, steps: int) -> Recipe:
    """The recipe without whatever reads values back on purpose."""
    return recipe.with_training(
        output_dir=folder,
        max_steps=steps,
        logging_strategy="no",
        logging_first_step=False,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    ).with_run(eval_size=None, eval_file=None, eval_split=None, prompts=[], evaluate_before=False)


def _record(recipe: Recipe, steps: int, say: Callable[[str], None]) -> tuple[Any, list[int] | None]:
    """Train under the recorder; gives it, and the vendor's count where there is one."""
    from paca.graphs import GraphRecorder
    from paca.registry import get_backend

    backend = get_backend()
    trainer, data = _trainer(recipe, say)
    recorder = GraphRecorder(trainer.model, warm_up=WARM_UP)
    counted: list[int] = []
    with backend.compilations() as compiled, recorder.watching():
        trainer.add_callback(_marks(recorder, steps))
        if compiled is not None:
            trainer.add_callback(_counts(_settled(backend, compiled), counted))
        trainer.train()
    _say_ragged(trainer.args, data, say)
    return recorder, counted if compiled is not None else None


def _compile(recipe: Recipe, steps: int) -> tuple[list[int], list[str], list[int] | None]:
    """Train without the recorder; gives the graphs that torch.compile made in each step, breaks, the vendor's count."""
    import torch
    from torch._dynamo.utils import counters

    from paca.registry import get_backend

    backend = get_backend()
    trainer, _ = _trainer(recipe, lambda line: None)
    torch._dynamo.reset()  # what it met while operations were recorded, it has decided to skip
    counters.clear()
    made: list[int] = []
    counted: list[int] = []
    with backend.compilations() as compiled:
        trainer.add_callback(_counts(lambda: counters["stats"]["unique_graphs"], made))
        if compiled is not None:
            trainer.add_callback(_counts(_settled(backend, compiled), counted))
        trainer.train()
    return made, list(counters["graph_break"]), counted if compiled is not None else None


def _trainer(recipe: Recipe, say: Callable[[str], None]) -> tuple[Any, Any]:
    from transformers import set_seed

    from paca.pretrained import load_config, load_tokenizer
    from paca.training import adapted_model, load_data, make_trainer, sequence_length, training_arguments

    config, tokenizer = load_config(recipe.run), load_tokenizer(recipe.run)
    length = sequence_length(recipe, config, tokenizer)
    data = load_data(recipe, tokenizer, length)
    arguments = training_arguments(recipe, data)
    set_seed(arguments.seed)
    model = adapted_model(recipe, config, data, tokenizer, length, say)
    return make_trainer(recipe, arguments, model, tokenizer, data, length), data


def _settled(backend: Backend, compiled: Callable[[], int]) -> Callable[[], int]:
    """Read a count when the device is done: graphs are compiled while the host goes on."""

    def count() -> int:
        backend.synchronize()
        return compiled()

    return count


def _counts(total: Callable[[], int], steps: list[int]) -> Any:
    """A callback that notes by how much a total grows in each step."""
    from transformers import TrainerCallback

    class Counts(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append(total() - sum(steps))

    return Counts()


def _marks(recorder: Any, steps: int) -> Any:
    """A callback that cuts graphs where GaudiTrainer marks a step: after each backward and after the optimizer."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.cut()

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.cut()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            recorder.cut()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.end_step()
            if len(recorder.steps) == steps:
                recorder.pause()  # the Trainer reads the loss back at its end

    return Marks()


def _say_ragged(arguments: Any, data: Any, say: Callable[[str], None]) -> None:
    """Say that an epoch ends with a smaller batch, which a few steps may not reach."""
    rows, size = len(data.train.dataset), arguments.train_batch_size
    pads = type(arguments).__module__.startswith("paca_hpu")  # GaudiTrainer fills the last batch with further rows
    if rows % size and not arguments.dataloader_drop_last and not pads:
        say(
            f"an epoch of {rows} rows ends with a batch of {rows % size} instead of {size}, which is compiled again: "
            "set dataloader_drop_last: true"
        )
