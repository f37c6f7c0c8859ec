"""The command line of `paca bench`: reads options, runs what they ask for, writes and shows the result."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from paca.bench.base import BASES, FAMILIES
from paca.bench.environment import MALLOC_SETTINGS, start_again_unless_set, wanted_environment
from paca.bench.methods import FORMS, Method, parse_methods
from paca.bench.setting import GRAPHS, PLAIN, Setting
from paca.bench.shapes import SHAPES, Shape

DTYPES = ("float32", "bfloat16", "float16")
MEASURES = ("time", "bytes", "peak", "limits", "profile")
CLOCKS = ("auto", "cpu", "wall", "device")

EXAMPLES = """examples:
  paca bench                                        a first look in about two minutes
  paca bench --suite cpu --out cpu.json             the numbers of docs/benchmarks.md
  paca bench --methods paca-r16,lora-r16 --rounds 30
  paca bench --shape llama-3-8b --dtype bfloat16 --measure bytes --methods paca-r8,lora-r8,full
  paca bench --measure time,profile                 and which operations take the time
  paca bench --base nf4 --methods paca-r64,lora-r64 --dtype bfloat16
                                                    QPaCA against QLoRA
  paca bench --suite gpu --out gpu                  everything about GPUs in docs/benchmarks.md; --dry-run lists it
  paca bench --suite gpu --out gpu --minutes 9      as much of it as fits; the same command goes on where it stopped
  paca bench --suite switch                         what a switch of adapters costs
  paca bench --report cpu.json --markdown           its tables again, for a document

methods (the floor is always measured):
"""


@dataclass(frozen=True)
class Suite:
    """Values for the options that are not given."""

    shape: str
    methods: str
    rounds: int
    warmup: int
    about: str
    switches: bool = False  # measures switches of adapters instead of training steps
    planned: bool = False  # is a plan of many runs


SUITES = {
    "quick": Suite(
        shape="small",
        methods="floor,paca-r8,paca-r64,lora-r8,lora-r64,dora-r8,full",
        rounds=5,
        warmup=1,
        about="a small stack, few rounds",
    ),
    "cpu": Suite(
        shape="stack",
        methods="floor,paca-r8,paca-r64,paca-unshared-r8,paca-unshared-r64,lora-r8,lora-r64,lora-match-r8,lora-match-r64,"
        "lora-nocast-r8,lora-nocast-r64,lora-match-nocast-r8,lora-match-nocast-r64,dora-r8,full",
        rounds=15,
        warmup=2,
        about="four layers of a 1B-model's width, every method",
    ),
    "switch": Suite(
        shape="decode",
        methods="",
        rounds=15,
        warmup=2,
        about="switching adapters, against fusing and hot-swapping LoRA; --methods and --measure do not apply",
        switches=True,
    ),
    "gpu": Suite(
        shape="llama-3-8b-train",
        methods="",
        rounds=20,
        warmup=3,
        about="layers of Llama-3-8B in bfloat16 on a GPU: many runs, one file each in the folder --out; "
        "what is there already is not run again",
        planned=True,
    ),
}


@dataclass(frozen=True)
class Options:
    """The options in force, checked."""

    methods: tuple[Method, ...]
    shape: Shape
    dtype: str
    measure: tuple[str, ...]
    rounds: int
    warmup: int
    threads: int
    malloc: str
    clock: str
    seed: int
    backend: str | None
    out: Path
    plot: Path | None
    switches: bool = False
    setting: Setting = PLAIN
    caps: tuple[float, ...] = ()
    keep_going: bool = False

    def recorded(self) -> dict[str, Any]:
        """Return what the result file should say of them."""
        return {
            "methods": [method.name for method in self.methods],
            "measure": list(self.measure),
            **asdict(self.setting),
            **{
                name: getattr(self, name)
                for name in ("dtype", "rounds", "warmup", "threads", "malloc", "clock", "seed")
            },
        }


def main(argv: list[str] | None = None) -> int:
    """Run `paca bench`; to measure, it replaces this process by one with a prepared environment.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if given.report is not None:
            return _report(given)
        if SUITES[given.suite].planned:
            return _run_plan(given, arguments)
        options = _options(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    start_again_unless_set(arguments, wanted_environment(options.malloc, options.threads))
    return _measure(options, shlex.join(["paca", "bench", *arguments]))


def _parser() -> argparse.ArgumentParser:
    forms = "\n".join(f"  {form:<22}{about}" for form, about in FORMS.items())
    suites = ", ".join(f"{name} ({suite.about}, {suite.rounds} rounds)" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="paca bench",
        description="Compare in one interleaved run what training costs: step time, bytes kept for backward, memory.",
        epilog=EXAMPLES + forms,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--suite", choices=SUITES, default="quick", help=f"{suites}; default quick")
    what.add_argument("--methods", metavar="A,B,…", help="methods to compare, see below; default: the suite's")
    what.add_argument(
        "--measure",
        metavar="A,B,…",
        default="time,bytes,peak",
        help="any of time,bytes,peak,limits,profile (which operations take the time); default the first three",
    )
    what.add_argument("--shape", choices=SHAPES, help="sizes of the stack; default: the suite's")
    for size in fields(Shape):
        what.add_argument(
            f"--{size.name.replace('_', '-')}", type=int, metavar="N", help=f"another number for {size.name}"
        )
    what.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations; default float32")
    what.add_argument(
        "--base",
        choices=BASES,
        default="none",
        help="format of the frozen weights, floor's too, so that lora is QLoRA and paca QPaCA; default none",
    )
    what.add_argument("--checkpointing", action="store_true", help="recompute each decoder layer in backward")
    what.add_argument("--liger", action="store_true", help="Liger's fused norms, rotary embeddings and SwiGLU")
    what.add_argument(
        "--graph",
        choices=GRAPHS,
        default="eager",
        help="eager (default); compile: each decoder layer by torch.compile; whole: the model in the backend's mode",
    )
    what.add_argument(
        "--caps", metavar="GB,…", default="24,48,80", help="for limits: memory to fit in; default 24,48,80"
    )
    what.add_argument("--dry-run", action="store_true", help="with --suite gpu: list the runs and do none")
    what.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="with --suite gpu: stop after so long; the same command goes on later",
    )
    what.add_argument("--only", metavar="A,B,…", help="with --suite gpu: runs whose names contain one of these words")
    how = parser.add_argument_group("how")
    how.add_argument("--strategies", metavar="KIND=NAME,…", default="", help="of the backend, e.g. graph=cuda_graph")
    how.add_argument("--rounds", type=int, metavar="N", help="steps of each method that count; default: the suite's")
    how.add_argument("--warmup", type=int, metavar="N", help="steps of each method before them; default: the suite's")
    how.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; default 1")
    how.add_argument("--backend", metavar="NAME", help="paca's backend; default: PACA_BACKEND or the best here")
    how.add_argument(
        "--malloc",
        choices=MALLOC_SETTINGS,
        default="tuned",
        help="tuned (default): start again with glibc settings that keep freed memory; default: leave them",
    )
    how.add_argument(
        "--clock",
        choices=CLOCKS,
        default="auto",
        help="of the tables; both are recorded. auto: process CPU time for one thread on a CPU, wall time otherwise",
    )
    how.add_argument(
        "--keep-going", action="store_true", help="leave out a method that fails, and name it in the result"
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batch and order; default 0")
    where = parser.add_argument_group("where to")
    where.add_argument("--out", type=Path, metavar="FILE", help="raw result; default paca-bench-SUITE.json")
    where.add_argument("--plot", type=Path, metavar="FILE", help="picture (.png, .svg, .pdf); default: beside --out")
    where.add_argument("--no-plot", action="store_true", help="draw nothing")
    again = parser.add_argument_group("instead of measuring")
    again.add_argument("--report", type=Path, metavar="FILE", help="show a raw result again; with --plot draw it too")
    again.add_argument("--markdown", action="store_true", help="with --report: as Markdown")
    return parser


def _options(given: argparse.Namespace) -> Options:
    """Check the arguments and fill in the suite's values.

    Raises:
        ValueError: naming the option, what was found and what it can be.
    """
    if given.markdown:
        raise ValueError("--markdown goes with --report FILE; a measurement prints its table and writes JSON")
    suite = SUITES[given.suite]
    if suite.switches and given.methods is not None:
        raise ValueError(f"--suite {given.suite} has its own methods; leave --methods out")
    sizes = {size.name: getattr(given, size.name) for size in fields(Shape)}
    shape = replace(SHAPES[given.shape or suite.shape], **{name: n for name, n in sizes.items() if n is not None})
    shape.check()
    measure = tuple(dict.fromkeys(part.strip() for part in given.measure.split(",") if part.strip()))
    if unknown := [part for part in measure if part not in MEASURES]:
        raise ValueError(f"--measure: {unknown[0]!r} is unknown; it takes {','.join(MEASURES)}")
    if not measure:
        raise ValueError(f"--measure is empty; it takes {','.join(MEASURES)}")
    rounds = suite.rounds if given.rounds is None else given.rounds
    warmup = suite.warmup if given.warmup is None else given.warmup
    for option, found, least in (("--rounds", rounds, 1), ("--warmup", warmup, 1), ("--threads", given.threads, 1)):
        if found < least:
            raise ValueError(f"{option} must be at least {least}, found {found}")
    methods = parse_methods(given.methods if given.methods is not None else suite.methods)
    if given.base != "none":
        if suite.switches:
            raise ValueError(f"--suite {given.suite} takes no --base")
        unfit = [method.name for method in methods if method.family not in FAMILIES]
        if unfit and given.methods is not None:
            raise ValueError(f"--base {given.base} leaves nothing for {unfit[0]} to train; take {', '.join(FAMILIES)}")
        methods = tuple(method for method in methods if method.name not in unfit)
    narrowest = min(narrow for narrow, _ in shape.linears)
    for method in methods:
        if method.rank > narrowest:
            raise ValueError(f"--methods: {method.name} has a rank above the stack's narrowest input, {narrowest}")
    out = given.out or Path(f"paca-bench-{given.suite}.json")
    _check_output("--out", out, (".json",))
    drawn = given.plot is not None or not {"limits", "profile"}.issuperset(measure)  # of these there is no picture
    plot = None if given.no_plot or suite.switches or not drawn else given.plot or out.with_suffix(".png")
    if plot is not None:
        _check_output("--plot", plot, (".png", ".svg", ".pdf"))
    setting = Setting(given.checkpointing, given.liger, given.graph, _strategies(given.strategies), given.base)
    setting.check()
    return Options(
        setting=setting,
        caps=_caps(given.caps),
        keep_going=given.keep_going,
        methods=methods,
        shape=shape,
        dtype=given.dtype,
        measure=measure,
        rounds=rounds,
        warmup=warmup,
        threads=given.threads,
        malloc=given.malloc,
        clock=given.clock,
        seed=given.seed,
        backend=given.backend,
        out=out,
        plot=plot,
        switches=suite.switches,
    )


def _caps(text: str) -> tuple[float, ...]:
    try:
        caps = tuple(float(part) for part in text.split(","))
    except ValueError:
        caps = ()
    if not caps or min(caps) <= 0:
        raise ValueError(f"--caps takes positive numbers of GB, e.g. 24,48,80; found {text!r}")
    return caps


def _strategies(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not name for _, _, name in pairs):
        raise ValueError(f"--strategies takes kind=name pairs, e.g. gather=triton,graph=eager; found {text!r}")
    return {kind.strip(): name.strip() for kind, _, name in pairs}


def _check_output(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes:
        raise ValueError(f"{option} must end in {' or '.join(suffixes)}, found {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}; create it first")


def _run_plan(given: argparse.Namespace, arguments: list[str]) -> int:
    """Do the runs of a suite that is a plan, each in a process of its own."""
    from paca.bench import plan

    for option, found in (("--methods", given.methods), ("--base", None if given.base == "none" else given.base)):
        if found is not None:
            raise ValueError(f"--suite {given.suite} has its own {option[2:]}; leave {option} out")
    if given.minutes is not None and not given.minutes > 0:
        raise ValueError(f"--minutes takes a positive number, found {given.minutes}")
    _caps(given.caps)
    folder = given.out or Path(f"paca-bench-{given.suite}")
    sizes = {size.name: getattr(given, size.name) for size in fields(Shape) if getattr(given, size.name) is not None}
    runs = plan.gpu(
        shape=given.shape or SUITES[given.suite].shape,
        sizes=sizes,
        rounds=given.rounds or SUITES[given.suite].rounds,
        warmup=given.warmup or SUITES[given.suite].warmup,
        caps=given.caps,
        backend=given.backend or "cuda",
        only=given.only.split(",") if given.only else [],
    )
    seconds = None if given.minutes is None else 60 * given.minutes
    return plan.run(runs, folder, dry=given.dry_run, seconds=seconds)


def _report(given: argparse.Namespace) -> int:
    """Show a raw result again, or the summary of a folder of them."""
    if given.report.is_dir():
        from paca.bench import summary

        return summary.show(given.report, markdown=given.markdown, plot=given.plot)
    from paca.bench import report, switching, tables
    from paca.bench.result import read

    if given.plot is not None:
        _check_output("--plot", given.plot, (".png", ".svg", ".pdf"))
    if switching.is_switch_result(given.report):
        if given.plot is not None:
            raise ValueError(f"{given.report} is a result of --suite switch, of which there is no plot")
        switches = switching.read(given.report)
        if given.clock != "auto":
            switches.clock = given.clock
        shown = switching.tables(switches), report.conditions(switches)
        if given.markdown:
            print(tables.as_markdown(*shown), end="")
        else:
            tables.show(*shown)
        return 0
    result = read(given.report)
    if given.clock != "auto":
        result.clock = given.clock
    if given.markdown:
        print(report.as_markdown(result), end="")
    else:
        report.show(result)
    if given.plot is not None:
        from paca.bench.plot import draw

        draw(result, given.plot)
    return 0


def _measure(options: Options, command: str) -> int:
    """Measure, write the raw result and the plot, and show the tables."""
    from paca.bench import report, switching, tables
    from paca.bench.measure import clock_of, measure
    from paca.bench.plot import draw

    if options.switches:
        backend = switching.backend_of(options)
        switches = switching.measure(options, command, clock_of(options, backend), backend)
        switches.write(options.out)
        tables.show(switching.tables(switches), report.conditions(switches))
        print(f"raw result: {options.out}")
        return 0
    result = measure(options, command, save=lambda so_far: so_far.write(options.out))
    report.show(result)
    print(f"raw result: {options.out}")
    if options.plot is not None:
        try:
            draw(result, options.plot)
            print(f"plot: {options.plot}")
        except ImportError as error:
            print(f"no plot: {error}; pip install 'paca-torch[train]' has what it needs", file=sys.stderr)
    return 0
