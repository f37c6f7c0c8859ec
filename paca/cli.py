"""The `paca` command. Everything heavy is imported by the command that needs it, so that help comes at once."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paca.recipe import Recipe

_TRAIN = """\
Fine-tune a model as a recipe says.

RECIPE.yaml is a flat mapping. Its keys are those of transformers' TrainingArguments, of paca.PacaConfig, and a few more
for model and data (docs/training.md lists them). Any key can be given on the command line and wins over the file:
--key value, --key=value, --key a b (a list), --key (true).
"""
_TRAIN_EXAMPLES = """\
examples:
  paca train recipes/quickstart.yaml
  paca train recipes/quickstart.yaml --learning_rate 1e-3 --r 16 --output_dir runs/r16
  paca train my.yaml --dry-run                        the resolved recipe, parameter counts, memory; nothing is run
  paca train my.yaml --resume_from_checkpoint auto    go on from the newest complete checkpoint
  paca train --model_name_or_path gpt2 --train_file notes.txt --packing --output_dir runs/notes
"""
_EVALUATE_EXAMPLES = """\
examples:
  paca evaluate runs/quickstart                       on the held-out data of its recipe
  paca evaluate runs/quickstart --base                the same data, without the adapter
  paca evaluate runs/quickstart/checkpoint-20 --eval_file other.jsonl
  paca evaluate my.yaml --json scores.json            the adapter in the recipe's output_dir
"""
_GENERATE_EXAMPLES = """\
examples:
  paca generate runs/quickstart --prompt "To be, or"
  paca generate runs/chat --chat --prompt "Who are you?" --prompt "And you?" --temperature 0.7
"""
_MERGE_EXAMPLES = """\
examples:
  paca merge runs/quickstart --out merged             a plain transformers model, with the adapter in its weights
  paca merge runs/quickstart --out merged --dtype bfloat16 --max-shard-size 2GB
"""
_EXPORT_EXAMPLES = """\
examples:
  paca export runs/quickstart --to lora --out lora    a LoRA adapter for stock PEFT; nothing is lost
  paca export runs/quickstart --to vllm --out served  with one rank and one scale, as LoRA servers want it
  paca export runs/quickstart --to llama.cpp --out gguf    the same, for convert_lora_to_gguf.py
  paca export runs/prefix --to prefix --r 2 --out small    the first columns of an adapter trained by prefixes
"""
_IMPORT_EXAMPLES = """\
examples:
  paca import lora --out adapter                      a LoRA adapter whose A is one-hot; nothing is lost
  paca import upstream --base gpt2 --out adapter      an adapter of PEFT's own PaCA, with the widths of its layers noted
"""
_COMPRESS_EXAMPLES = """\
examples:
  paca compress runs/quickstart --bits 8 --out small            8 bits for each delta, and a scale for each column
  paca compress runs/quickstart --bits 1 --out tiny --evaluate  also measure what it costs on the recipe's held-out data
"""
_ADAPTERS_EXAMPLES = """\
examples:
  paca adapters runs/quickstart                       what it changes, by kind of module
  paca adapters runs/quickstart --layers              and by layer
  paca adapters law poems --plot both.png             two adapters: also which columns they share
  paca adapters law poems --json both.json            everything, with the column numbers
"""


_ESTIMATE = """\
Predict the memory of a training step with LoRA, QLoRA, PaCA and QPaCA, and what fits on a device.

MODEL is a folder, a config.json, a name on the hub (only its configuration is fetched), or one of
llama-2-7b, llama-2-13b, llama-3-8b, llama-3.1-8b, llama-3.1-70b. A recipe serves, too. Keys of a recipe win: --r,
--max_length, --per_device_train_batch_size (1 unless a recipe is given), --gradient_checkpointing, --dtype, ...
Nothing is loaded or allocated: a step is run on shapes alone.
"""
_ESTIMATE_EXAMPLES = """\
examples:
  paca estimate llama-3.1-70b --r 64 --max_length 2048 --gpu 80GB,141GB
  paca estimate models/mine/config.json --dtype bfloat16 --per_device_train_batch_size 4 --gradient_checkpointing
  paca estimate my.yaml --gpu 24GB --methods paca,qpaca --json estimate.json
"""


_DOCTOR_EXAMPLES = """\
examples:
  paca doctor --graphs my.yaml                        graphs, compilations and host syncs, with file and line of each
  paca doctor --graphs my.yaml --steps 20 --gradient_checkpointing
Without a Gaudi its operations run on the CPU. Exit status 2 if something has to be put right.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `paca`; the process's own by default.

    Returns:
        0, or 2 for what the user can put right (it was printed), or 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:
        from paca.bench import main as bench

        return int(bench(words[1:]) or 0)
    if words[:1] == ["parity"]:
        from paca.parity.command import main as parity

        return parity(words[1:])
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if options.run is None:
        parser.print_help()
        return 2
    if rest and not options.takes_keys:
        parser.error(f"paca {options.command} does not know {' '.join(rest)}; see paca {options.command} --help")
    try:
        with warnings.catch_warnings(), _plain_warnings():
            # PEFT 0.21 asks a model by the name that transformers 5 renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            options.run(options, rest)
    except KeyboardInterrupt:
        hint = "; --resume_from_checkpoint auto goes on from the newest complete checkpoint"
        print(f"\ninterrupted{hint if options.command == 'train' else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, _users_errors()):
            raise
        print(f"paca {options.command}: {_message(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings without the line of code that gave them, which tells who runs a command nothing."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **line: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _parser() -> argparse.ArgumentParser:
    from paca._version import __version__

    parser = argparse.ArgumentParser(
        prog="paca", description="Fine-tune large PyTorch models by Partial Connection Adaptation.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"paca {__version__}")
    parser.set_defaults(run=None, takes_keys=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[..., None] | None, about: str, **more: Any) -> argparse.ArgumentParser:
        keys = bool(more.pop("keys", False))
        more.setdefault("description", about)
        made = commands.add_parser(
            name, help=about, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more
        )
        made.set_defaults(run=run, takes_keys=keys)
        return made

    keys = "[--key value ...]"
    train = command(
        "train", _train, "fine-tune a model as a recipe says", keys=True, description=_TRAIN, epilog=_TRAIN_EXAMPLES,
        usage=f"paca train [RECIPE.yaml] {keys} [--dry-run]",
    )  # fmt: skip
    train.add_argument("--dry-run", "--dry_run", action="store_true", help="print what would be run, and stop")

    evaluate = command(
        "evaluate", _evaluate, "measure loss and perplexity on held-out data", keys=True, epilog=_EVALUATE_EXAMPLES,
        usage=f"paca evaluate ADAPTER|RECIPE.yaml [--base] [--json FILE] {keys}",
    )  # fmt: skip
    evaluate.add_argument("--base", action="store_true", help="measure the model without the adapter")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics there")

    generate = command(
        "generate", _generate, "let an adapted model continue prompts", keys=True, epilog=_GENERATE_EXAMPLES,
        usage=f"paca generate ADAPTER --prompt TEXT [--prompt TEXT ...] [options] {keys}",
    )  # fmt: skip
    generate.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="text to continue")
    generate.add_argument("--chat", action="store_true", help="put prompts through the tokenizer's chat template")
    generate.add_argument("--base", action="store_true", help="generate without the adapter")
    generate.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=64, metavar="N", help="default 64")
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the default, takes the likeliest token each time",
    )
    generate.add_argument("--seed", type=int, default=0, help="of the drawing at temperatures above 0")

    merge = command(
        "merge", _merge, "write the base model with the adapter in its weights", keys=True, epilog=_MERGE_EXAMPLES,
        usage=f"paca merge ADAPTER --out DIR [--max-shard-size SIZE] [--requantize] {keys}",
    )  # fmt: skip
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    merge.add_argument(
        "--max-shard-size", "--max_shard_size", metavar="SIZE", help="size of a weight file, such as 2GB"
    )
    merge.add_argument(
        "--requantize", action="store_true",
        help="keep a quantised base quantised; moves the trained columns, and says how far (default: 16 bits, exact)",
    )  # fmt: skip

    export = command("export", _export, "turn an adapter into another kind, without loss", epilog=_EXPORT_EXAMPLES)
    export.add_argument("adapter", type=Path, metavar="ADAPTER", help="a saved PaCA adapter")
    export.add_argument(
        "--to",
        choices=["lora", "vllm", "llama.cpp", "prefix"],
        required=True,
        help="the kind to write, or who shall read it; prefix: a smaller PaCA adapter",
    )
    export.add_argument("--r", type=int, metavar="N", help="with --to prefix: columns of each layer to keep")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")

    bring = command(
        "import", _import, "turn an adapter of another tool into PaCA, without loss", epilog=_IMPORT_EXAMPLES
    )
    bring.add_argument("adapter", type=Path, metavar="ADAPTER", help="a saved LoRA with one-hot A, or PEFT's own PaCA")
    bring.add_argument("--base", metavar="MODEL", help="its base model, if its config does not name it")
    bring.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")

    compress = command(
        "compress", _compress, "store an adapter in 8, 4 or 1 bits", keys=True, epilog=_COMPRESS_EXAMPLES,
        usage=f"paca compress ADAPTER --bits 8|4|1 --out DIR [--evaluate] [--json FILE] {keys}",
    )  # fmt: skip
    compress.add_argument("--bits", type=int, choices=(8, 4, 1), required=True, help="of each delta")
    compress.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    compress.add_argument("--evaluate", action="store_true", help="measure base, adapter and copy on the held-out data")
    compress.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")

    adapters = command(
        "adapters", _adapters, "print what adapters change, and where they meet", epilog=_ADAPTERS_EXAMPLES
    )
    adapters.add_argument("folders", type=Path, nargs="+", metavar="ADAPTER", help="saved PaCA adapters")
    adapters.add_argument("--layers", action="store_true", help="a line for every layer")
    adapters.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the size of the updates by block and module"
    )
    adapters.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")

    predict = command(
        "estimate", _estimate, "predict memory, and what fits on a device", keys=True, description=_ESTIMATE,
        epilog=_ESTIMATE_EXAMPLES,
        usage=f"paca estimate MODEL|RECIPE.yaml [--gpu SIZE,...] [--methods NAME,...] [--json FILE] {keys}",
    )  # fmt: skip
    predict.add_argument("--gpu", default="", metavar="SIZE,...", help="say what fits on devices, e.g. 24GB,80GB")
    predict.add_argument(
        "--methods", metavar="NAME,...", help="of lora, lora-nocast, paca, qlora, qlora-nocast, qpaca; default all"
    )
    predict.add_argument("--json", type=Path, metavar="FILE", help="also write the raw result there")

    doctor = command(
        "doctor", _doctor, "say what a device that compiles graphs would stumble over", keys=True,
        usage=f"paca doctor --graphs RECIPE.yaml [--steps N] {keys}", epilog=_DOCTOR_EXAMPLES,
    )  # fmt: skip
    doctor.add_argument(
        "--graphs", type=Path, required=True, metavar="RECIPE.yaml", help="record the graphs of its first steps"
    )
    doctor.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps to record, 5 by default")

    command("bench", None, "compare speed and memory with LoRA and full fine-tuning", add_help=False)
    command("parity", None, "prove that this machine's devices compute what another's did", add_help=False)
    command("env", _env, "print versions, backends and devices for a bug report")
    return parser


def _train(options: argparse.Namespace, words: list[str]) -> None:
    from paca.recipe import read_recipe

    recipe = read_recipe(_first_word(words), words)
    if options.dry_run:
        _dry_run(recipe)
        return
    from paca.training import train

    train(recipe, say=lambda line: print(line, flush=True))


def _dry_run(recipe: Recipe) -> None:
    from paca.estimate.prediction import estimate
    from paca.pretrained import load_config, load_tokenizer
    from paca.recipe import RecipeError
    from paca.registry import get_backend
    from paca.training import check_adapter_fits, class_names, open_rows, sequence_length

    rows, _ = open_rows(recipe)
    if rows is None:
        raise RecipeError("there is nothing to train on: give train_file or dataset_name")
    config = load_config(recipe.run)
    length = sequence_length(recipe, config, load_tokenizer(recipe.run))
    check_adapter_fits(recipe, config)
    try:
        lines = estimate(recipe, config, length, len(class_names(recipe, rows))).lines()
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    print(recipe.to_yaml())
    print(f"backend {get_backend().name}: {get_backend().describe()}")
    print("\n".join(lines))


def _evaluate(options: argparse.Namespace, words: list[str]) -> None:
    import json

    from paca.recipe import RecipeError, read_recipe, read_words
    from paca.training import evaluate, of_adapter
    from paca.whole import write_text

    _refuse_unwritable(options.json)
    target = _first_word(words)
    if target is None:
        raise RecipeError("say what to evaluate: a folder with an adapter, or a recipe")
    if not target.exists():
        raise RecipeError(f"there is no adapter folder or recipe {target} (looked for {target.absolute()})")
    if target.is_dir():
        adapter, recipe = target, of_adapter(target, read_words(words))
    else:
        recipe = read_recipe(target, words)
        adapter = recipe.output_dir
        if not options.base and not (adapter / "adapter_config.json").is_file():
            raise RecipeError(f"{adapter}, the recipe's output_dir, holds no adapter yet: train it, or add --base")
    metrics = evaluate(recipe, None if options.base else adapter)
    for name, value in metrics.items():
        print(f"{name:<28}{value:>14.4f}" if isinstance(value, float) else f"{name:<28}{value!s:>14}")
    if options.json:
        write_text(options.json, json.dumps(metrics, indent=2))


def _generate(options: argparse.Namespace, words: list[str]) -> None:
    from paca.generation import generate
    from paca.recipe import RecipeError

    model, tokenizer = _adapted(words, with_adapter=not options.base)
    if not model.can_generate():
        raise RecipeError("this adapter is for a model that generates no text; paca evaluate measures it")
    how = {key: getattr(options, key) for key in ("chat", "max_new_tokens", "temperature", "seed")}
    try:
        answers = generate(model, tokenizer, options.prompt, **how)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    for prompt, answer in zip(options.prompt, answers, strict=True):
        print(f"{prompt}\n{answer}\n" if options.chat else f"{prompt}{answer}\n")


def _merge(options: argparse.Namespace, words: list[str]) -> None:
    from paca.merging import merge
    from paca.recipe import RecipeError

    target = options.out
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder; choose a new one")
    if options.max_shard_size and not re.fullmatch(r"\d+(\.\d+)?[KMGT]?B", options.max_shard_size):
        raise RecipeError(f"--max-shard-size must be a size such as 500MB or 2GB; found {options.max_shard_size!r}")
    model, tokenizer = _adapted(words)
    try:
        merge(model, tokenizer, target, options.max_shard_size, options.requantize)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(f"merged into {target}; transformers loads it without paca")


def _estimate(options: argparse.Namespace, words: list[str]) -> None:
    from paca.estimate.command import run

    _refuse_unwritable(options.json)
    run(options, words)


def _export(options: argparse.Namespace, words: list[str]) -> None:
    from paca.convert import export_lora, export_prefix
    from paca.errors import AdapterError

    if (options.r is not None) != (options.to == "prefix"):
        raise AdapterError("--to prefix and --r go together: how many columns of each layer to keep")
    if options.to == "prefix":
        out = export_prefix(options.adapter, options.out, options.r)
        print(f"exported the first {options.r} columns of each layer to {out}; PEFT loads it after `import paca`")
        return
    out = export_lora(options.adapter, options.out, for_server=options.to != "lora")
    print(f"exported to {out}; {_serving(options.to, out)}")


def _serving(reader: str, out: Path) -> str:
    """Say what to do with an exported adapter."""
    import json
    from shlex import quote

    if reader == "lora":
        return "PEFT loads it as LoRA, without paca"
    settings = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    base, folder = quote(settings["base_model_name_or_path"] or "BASE"), quote(str(out))
    if reader == "llama.cpp":
        return f"convert it with: python convert_lora_to_gguf.py --base {base} {folder}"
    fits = next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= settings["r"]), settings["r"])
    return f"serve it with: vllm serve {base} --enable-lora --max-lora-rank {fits} --lora-modules NAME={folder}"


def _import(options: argparse.Namespace, words: list[str]) -> None:
    from paca.importing import import_adapter

    kind = import_adapter(options.adapter, options.out, options.base)
    print(f"imported {kind} to {options.out}; PEFT loads it after `import paca`")


def _compress(options: argparse.Namespace, words: list[str]) -> None:
    import json
    from dataclasses import asdict

    from paca.compressing import compress
    from paca.pretrained import load_config
    from paca.recipe import RecipeError, read_words
    from paca.training import evaluate, of_adapter
    from paca.whole import write_text

    _refuse_unwritable(options.json)
    adapter = _first_word(words)
    if adapter is None:
        raise RecipeError("say which adapter to compress: a folder")
    if words and not options.evaluate:
        raise RecipeError(f"{words[0]} is for --evaluate, which was not asked for")
    recipe = of_adapter(adapter, read_words(words)) if options.evaluate else None
    if recipe is not None:
        load_config(recipe.run)  # a base model that is gone is said before anything is written
    report = compress(adapter, options.out, options.bits)
    print("\n".join(report.lines()))
    print(f"compressed to {options.out}; PEFT loads it after `import paca`")
    written = asdict(report)
    if recipe is not None:
        parts = {"base": None, "adapter": adapter, "compressed": options.out}
        metrics = {name: evaluate(recipe, folder) for name, folder in parts.items()}
        shown = [key for key in ("eval_loss", "eval_perplexity", "eval_accuracy") if key in metrics["base"]]
        print(f"{'held out':<20}" + "".join(f"{name:>14}" for name in parts))
        for key in shown:
            print(f"{key.removeprefix('eval_'):<20}" + "".join(f"{metrics[name][key]:>14.4f}" for name in parts))
        written["held_out"] = {name: {key: metrics[name][key] for key in shown} for name in parts}
    if options.json:
        write_text(options.json, json.dumps(written, indent=1))


def _adapters(options: argparse.Namespace, words: list[str]) -> None:
    import json

    from paca.errors import AdapterError
    from paca.inspecting import as_data, draw, read_all, summary
    from paca.whole import write_text

    if options.plot is not None and options.plot.suffix != ".png":
        raise AdapterError(f"--plot must end in .png, found {options.plot}")
    _refuse_unwritable(options.plot, options.json)
    adapters = read_all(options.folders)
    print("\n".join(summary(adapters, options.layers)))
    if options.json:
        write_text(options.json, json.dumps(as_data(adapters), indent=1))
    if options.plot:
        draw(adapters, options.plot)
        print(f"plot: {options.plot}")


def _doctor(options: argparse.Namespace, words: list[str]) -> None:
    from paca.doctor import WARM_UP, graphs
    from paca.recipe import RecipeError

    if options.steps <= WARM_UP:
        raise RecipeError(
            f"--steps must be more than {WARM_UP}, as the first {WARM_UP} may compile graphs; found {options.steps}"
        )
    if not graphs(options.graphs, words, options.steps, say=lambda line: print(line, flush=True)):
        raise RecipeError("the run would stop or compile again; what to put right is listed above (docs/gaudi.md)")
    print("nothing to put right")


def _env(options: argparse.Namespace, words: list[str]) -> None:
    from paca.report import report

    print(report())


def _adapted(words: list[str], with_adapter: bool = True) -> tuple[Any, Any]:
    """The model of the adapter that the first word names, on its device, and its tokenizer."""
    from paca.pretrained import to_device
    from paca.recipe import RecipeError, read_words
    from paca.registry import get_backend
    from paca.training import adapter_model, of_adapter

    adapter = _first_word(words)
    if adapter is None or not adapter.is_dir():
        raise RecipeError(f"{adapter or 'nothing'} is not a folder with an adapter")
    model, tokenizer = adapter_model(of_adapter(adapter, read_words(words)), adapter if with_adapter else None)
    return to_device(model, get_backend().device()).eval(), tokenizer


def _first_word(words: list[str]) -> Path | None:
    """Take the path that stands before the keys, if one does."""
    return Path(words.pop(0)).expanduser() if words and not words[0].startswith("--") else None


def _refuse_unwritable(*files: Path | None) -> None:
    """Say before work starts that a file cannot be written."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"{file} cannot be written: there is no folder {file.parent}")
        if file is not None and file.is_dir():
            raise IsADirectoryError(f"{file} cannot be written: it is a folder; name a file")


def _users_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all that the user needs."""
    from paca.checkpoint import CheckpointError
    from paca.errors import AdapterError, BackendUnavailableError, BaseMismatchError, OptimizerError

    known: list[type[Exception]] = [CheckpointError, BackendUnavailableError, BaseMismatchError, ModuleNotFoundError]
    known += [OSError, AdapterError, OptimizerError]  # a disk that is full, a folder that cannot be written
    try:
        from paca.recipe import RecipeError
        from paca.rows import DataError
    except ModuleNotFoundError:
        return tuple(known)
    return (*known, RecipeError, DataError)


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: the commands need more than the library; pip install 'paca-torch[train]'"
    return str(error)
