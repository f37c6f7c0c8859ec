"""Times every strategy of a backend against the others of its kind, interleaved; the defaults rest on this.

    python benchmarks/strategies.py --out benchmarks/results/strategies/cpu.json
    python benchmarks/strategies.py --report benchmarks/results/strategies/cpu.json      the table again, as Markdown
    python benchmarks/strategies.py --only quantised                                     where the two forms cross

Sizes are those of one linear layer, 1024 inputs and 2816 outputs, fed 1024 tokens, unless others are given. Each round
runs all strategies once, in a new random order; a ratio is the median over rounds of a strategy's time to that of the
first in the same round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

import paca
from paca.backend import Backend, Ops
from paca.strategies import ColumnWrite, Form
from paca.whole import write_text

LAYERS = 4  # whose columns are written in one call
FEW_TOKENS = (1, 16, 64, 256)  # fed to a quantised layer too, whose two forms cross somewhere
KINDS = ("gather", "grad_columns", "write", "quantised")
Call = Callable[[], object]


class Sizes(NamedTuple):
    """Of the layer and what it is fed."""

    tokens: int = 1024
    inputs: int = 1024
    outputs: int = 2816


def tensor_steps(backend: Backend, r: int, dtype: torch.dtype, sizes: Sizes) -> dict[str, dict[str, Call]]:
    """Return a call for each strategy of each kind, by kind and name."""
    device, (tokens, inputs, outputs) = backend.device(), sizes
    torch.manual_seed(0)

    def random_tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=of, device=device)

    x, gy = random_tensor(tokens, inputs), random_tensor(tokens, outputs)
    index = torch.randperm(inputs)[:r].sort().values.to(device)
    xs = x[:, index].contiguous()
    base, delta = random_tensor(outputs, r), random_tensor(outputs, r, of=torch.float32)
    writes = [ColumnWrite(random_tensor(outputs, inputs), index, base, delta, 2.0) for _ in range(LAYERS)]
    run: dict[str, Callable[[Ops], Call]] = {
        "gather": lambda ops: lambda: ops.gather(x, index),
        "grad_columns": lambda ops: lambda: ops.grad_columns(gy, xs, 2.0),
        "write": lambda ops: lambda: ops.write_columns(writes),
    }
    cls = type(backend)
    return {
        kind: {name: call(cls(**{kind: name}).ops) for name in cls.choices[kind]}
        for kind, call in run.items()
        if kind in cls.choices
    }


def quantised_steps(
    backend: Backend, weight_format: str, r: int, dtype: torch.dtype, sizes: Sizes
) -> dict[str, dict[str, Call]]:
    """Return a call for both forms of a product with an NF4 or int8 weight, in training and without gradients."""
    import peft
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    tokens, inputs, outputs = sizes

    def layer(form: Form) -> torch.nn.Module:
        torch.manual_seed(0)
        quantised: torch.nn.Module = (
            Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compute_dtype=dtype)
            if weight_format == "nf4"
            else Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        ).to(backend.device())
        with paca.use_backend(backend.name, quantised=form.value):
            model = peft.get_peft_model(
                torch.nn.Sequential(quantised), paca.PacaConfig(r=r, paca_alpha=r, target_modules=["0"])
            )
        return model.get_submodule("base_model.model.0")

    x = torch.randn(tokens, inputs).to(backend.device(), dtype)
    layers = {form.value: layer(form) for form in Form}

    def train(one: torch.nn.Module) -> Call:
        given = x.clone().requires_grad_()
        return lambda: one(given).sum().backward()

    def infer(one: torch.nn.Module) -> Call:
        return torch.no_grad()(lambda: one(x))

    return {
        f"{weight_format}, training, {tokens} tokens": {name: train(one.train()) for name, one in layers.items()},
        f"{weight_format}, without gradients, {tokens} tokens": {
            name: infer(one.eval()) for name, one in layers.items()
        },
    }


PRODUCTS_AHEAD = 10  # that a device works on for a millisecond or two


def clock_of(backend: Backend) -> str:
    """The device's clock where it has one; else the process's own, where one thread does all the work, or the wall's.

    The process's leaves out the work of others.
    """
    if backend.event() is not None:
        return "device"
    alone = backend.device().type == "cpu" and torch.get_num_threads() == 1
    return "process_time" if alone else "perf_counter"


def stopwatch(backend: Backend) -> Callable[[Call], float]:
    """Return a function that runs a call and returns its seconds.

    With a device's clock the host's time is left out: the device has other work until all of the call is in its queue.
    """
    if clock_of(backend) != "device":
        clock: Callable[[], float] = getattr(time, clock_of(backend))

        def on_host(call: Call) -> float:
            backend.synchronize()
            start = clock()
            call()
            backend.synchronize()
            return clock() - start

        return on_host

    other = torch.zeros(4096, 4096, dtype=torch.bfloat16, device=backend.device())

    def on_device(call: Call) -> float:
        start, end = backend.event(), backend.event()
        assert start is not None
        assert end is not None
        for _ in range(PRODUCTS_AHEAD):
            other @ other
        start.record()
        call()
        end.record()
        backend.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return on_device


def measure(backend: Backend, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; a round is one timed call of each, after an untimed one."""
    order, times = list(calls), {name: list[float]() for name in calls}
    seconds = stopwatch(backend)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            calls[name]()
            times[name].append(seconds(calls[name]))
    return times


def record(backend: Backend, rounds: int, sizes: Sizes, only: Collection[str] = KINDS) -> dict[str, Any]:
    """Time every strategy of the kinds asked for and return the raw result."""
    random.seed(0)
    results = []
    has_library = importlib.util.find_spec("bitsandbytes") is not None
    if "quantised" in only and not has_library:
        print("bitsandbytes is not installed: products with quantised weights are left out", file=sys.stderr)
    for dtype in (torch.float32, torch.bfloat16):
        for r in (8, 64):
            kinds = {kind: calls for kind, calls in tensor_steps(backend, r, dtype, sizes).items() if kind in only}
            if "quantised" in only and r == 64 and dtype is torch.float32 and has_library:
                for weight_format, tokens in product(("nf4", "int8"), (*FEW_TOKENS, sizes.tokens)):
                    kinds |= quantised_steps(backend, weight_format, r, dtype, sizes._replace(tokens=tokens))
            for kind, calls in kinds.items():
                results.append(
                    {"kind": kind, "r": r, "dtype": str(dtype)[6:], "seconds": measure(backend, calls, rounds)}
                )
    return {
        "backend": backend.name,
        "device": backend.describe(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "paca": paca.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": rounds,
        "clock": clock_of(backend),
        "sizes": sizes._asdict(),
        "defaults": backend.strategies,
        "results": results,
    }


def table(recorded: dict[str, Any]) -> str:
    """Return the ratios to each kind's first strategy as a Markdown table."""
    lines = ["| kind | dtype | r | strategy | µs | x first |", "| --- | --- | ---: | --- | ---: | ---: |"]
    for row in recorded["results"]:
        first = next(iter(row["seconds"].values()))
        for name, times in row["seconds"].items():
            ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
            middle = statistics.median(times) * 1e6
            lines.append(f"| {row['kind']} | {row['dtype']} | {row['r']} | {name} | {middle:,.0f} | {ratio:.2f} |")
    where = (
        f"{recorded['device']}, {recorded['threads']} threads, torch {recorded['torch']}, {recorded['date']}, "
        f"{recorded['rounds']} rounds, load average {recorded['load_average']:.1f}"
    )
    return "\n".join([*lines, "", where, ""])


def main() -> None:
    """Measure, or show a result again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default=None, help="default: PACA_BACKEND or the best here")
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind; again for more; default: all")
    for name, size in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the layer; default {size}")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the raw result there")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="show a raw result, and measure nothing")
    given = parser.parse_args()
    if given.report is not None:
        print(table(json.loads(given.report.read_text(encoding="utf-8"))))
        return
    backend = paca.set_backend(given.backend) if given.backend else paca.get_backend()
    recorded = record(backend, given.rounds, Sizes(given.tokens, given.inputs, given.outputs), given.only or KINDS)
    if given.out is not None:
        write_text(given.out, json.dumps(recorded, indent=1))
    print(table(recorded))


if __name__ == "__main__":
    main()
