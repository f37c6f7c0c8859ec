"""Turns a raw result into tables, and the lines that must stand beside its numbers."""

from __future__ import annotations

from collections.abc import Iterable

from paca.bench import tables as render
from paca.bench.methods import FLOOR
from paca.bench.result import Operation, Result
from paca.bench.statistics import kept_above_floor, lora_of_rank, milliseconds, peak_above_build, ratio
from paca.bench.switching import SwitchResult
from paca.bench.tables import Table

MB = 1e6
PROFILED = 8  # operations of a method that a table shows


def tables(result: Result) -> list[Table]:
    """Return the tables for which there is data."""
    timed = bool(result.methods[FLOOR].samples)
    made = [_steps(result), _phases(result)] if timed else []
    if result.methods[FLOOR].kept or result.methods[FLOOR].peak:
        made.append(_memory(result))
    if (fits := limits(result)) is not None:
        made.append(fits)
    return made + profiles(result)


def limits(result: Result) -> Table | None:
    """Return what fits in how much memory, if it was measured."""
    rows = [
        [
            method.label,
            f"{fits.cap / 1e9:g}",
            f"{fits.longest:,}",
            f"{fits.largest:,}",
            f"{fits.tokens_per_second:,.0f}",
        ]
        for method in result.methods.values()
        for fits in method.limits
    ]
    head = ["method", "GB", "longest sequence", f"largest batch x {result.shape.tokens}", "tokens/s with it"]
    return Table("What fits in a memory", head, rows) if rows else None


def profiles(result: Result) -> list[Table]:
    """Return, for each method that was profiled, the operations whose time differs most from the floor's."""
    floor = {operation.name: operation for operation in result.methods[FLOOR].profile}
    made = []
    for name, method in result.methods.items():
        if name == FLOOR or not method.profile or not floor:
            continue
        own = {operation.name: operation for operation in method.profile}
        none = Operation("", 0.0, 0.0)
        pairs = [(key, own.get(key, none), floor.get(key, none)) for key in {**own, **floor}]
        pairs.sort(key=lambda pair: -abs(pair[1].seconds - pair[2].seconds))
        shown = [(_shortened(key), mine, its) for key, mine, its in pairs[:PROFILED]]
        rest = pairs[PROFILED:]
        shown.append((f"{len(rest)} others", _sum(m for _, m, _ in rest), _sum(f for _, _, f in rest)))
        shown.append(("all", _sum(own.values()), _sum(floor.values())))
        rows = [
            [
                label,
                f"{mine.calls:,.0f}",
                f"{its.calls:,.0f}",
                f"{1000 * mine.seconds:,.2f}",
                f"{1000 * its.seconds:,.2f}",
                f"{1000 * (mine.seconds - its.seconds):+,.2f}",
            ]
            for label, mine, its in shown
        ]
        head = ["operation", "times a step", "floor's", "ms a step", "floor's", "difference"]
        made.append(Table(f"What {method.label} runs beside the frozen floor's, by the profiler", head, rows))
    return made


def _shortened(name: str) -> str:
    """Leave of a kernel's name what tells it from others, in 64 characters."""
    bare = name.removeprefix("void ").replace("at::native::", "").replace("|", "/")
    return bare if len(bare) <= 64 else f"{bare[:40]}…{bare[-23:]}"


def _sum(operations: Iterable[Operation]) -> Operation:
    listed = list(operations)
    return Operation("", sum(each.calls for each in listed), sum(each.seconds for each in listed))


def conditions(result: Result | SwitchResult) -> list[str]:
    """Return the lines that must stand beside the numbers."""
    optimizer = ", AdamW" if isinstance(result, Result) else ""
    machine, shape = result.machine, result.shape
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    settings = result.settings
    extras = [name for name in ("checkpointing", "liger") if settings.get(name)]
    extras += [settings["graph"]] if settings.get("graph", "eager") != "eager" else []
    if settings.get("base", "none") != "none":
        extras.insert(0, f"frozen weights {settings['base']}")
    lines = [
        f"{shape.layers} Llama layers, hidden {shape.hidden}, ffn {shape.ffn}, heads {shape.heads}/{shape.kv_heads}, "
        f"batch {shape.batch} x {shape.tokens} tokens, {', '.join([settings['dtype'], *extras])}{optimizer}",
        f"{machine['processor']}, {machine['cores']} cores; device: {machine['device']}; threads: {machine['threads']}",
        f"{packages}, Python {machine['python']}; commit {machine['revision'] or 'unknown'}; {machine['date']}",
        f"command: {result.command}",
    ]
    if result.load:
        clock = {"cpu": "process CPU time", "wall": "wall time", "device": "events of the device"}[result.clock]
        lines.append(
            f"{len(result.load)} rounds, interleaved in random order; {clock}; malloc: {machine['malloc']}; "
            f"load average {min(result.load):.1f} to {max(result.load):.1f}"
        )
    return lines


def as_markdown(result: Result) -> str:
    """Return everything as Markdown."""
    return render.as_markdown(tables(result), conditions(result))


def as_text(result: Result) -> str:
    """Return everything as aligned plain text."""
    return render.as_text(tables(result), conditions(result))


def show(result: Result) -> None:
    """Print everything to the terminal, with rich where it is installed and the output is a terminal."""
    render.show(tables(result), conditions(result))


def _steps(result: Result) -> Table:
    floor = result.methods[FLOOR]
    rows = []
    for method in result.methods.values():
        over = ratio(method, floor, "step", result.clock)
        lora = lora_of_rank(result, method)
        versus = ratio(method, lora, "step", result.clock) if lora else None
        rows.append(
            [
                method.label,
                f"{method.trained:,}",
                f"{milliseconds(method, 'step', result.clock):,.1f}",
                f"{over.median:.3f}",
                f"{over.low:.3f} to {over.high:.3f}",
                f"{over.quietest:.3f}",
                f"{versus.median:.3f}" if versus else "-",
                f"{versus.low:.3f} to {versus.high:.3f}" if versus else "-",
                f"{versus.quietest:.3f}" if versus else "-",
            ]
        )
    head = ["method", "trained", "step ms", "x floor", "quartiles", "min/min", "x LoRA", "quartiles", "min/min"]
    title = "Training step (forward, backward, optimizer, write); x LoRA is PEFT's LoRA of the same rank"
    return Table(title, head, rows)


def _phases(result: Result) -> Table:
    floor = result.methods[FLOOR]
    step = milliseconds(floor, "step", result.clock)
    rows = []
    for method in result.methods.values():
        lora = lora_of_rank(result, method)
        row = [method.label]
        for phase in ("forward", "backward"):
            row += [
                f"{milliseconds(method, phase, result.clock):,.1f}",
                f"{ratio(method, floor, phase, result.clock).median:.3f}",
                f"{ratio(method, lora, phase, result.clock).median:.3f}" if lora else "-",
            ]
        optimizer = milliseconds(method, "optimizer", result.clock)
        versus = f"{ratio(method, lora, 'optimizer', result.clock).median:.2f}" if lora else "-"
        rows.append([*row, f"{optimizer:.2f}", f"{100 * optimizer / step:.2f}", versus])
    head = ["method", "forward ms", "x floor", "x LoRA", "backward ms", "x floor", "x LoRA"]
    head += ["optimizer + write ms", "% of floor's step", "x LoRA"]
    return Table("Where the time goes", head, rows)


def _memory(result: Result) -> Table:
    floor = result.methods[FLOOR]
    tokens = result.shape.tokens_per_step
    head = ["method"]
    rows = [[method.label] for method in result.methods.values()]
    if floor.kept:
        head += ["kept for backward MB", "x floor", "bytes a token, last layer", "above the floor a token and layer"]
        for row, method in zip(rows, result.methods.values(), strict=True):
            above = kept_above_floor(result, method)
            if method.kept is None or above is None:
                raise ValueError(f"{method.label} has no bytes kept though the floor has")
            row += [
                f"{method.kept.total / MB:,.2f}",
                f"{method.kept.total / floor.kept.total:.4f}",
                f"{method.kept.layer / tokens:,.1f}",
                f"{above:,.1f}",
            ]
    if floor.peak:
        head += ["peak above built model MB", "above the floor's MB"]
        least = peak_above_build(floor)
        for row, method in zip(rows, result.methods.values(), strict=True):
            peak = peak_above_build(method)
            if peak is None or least is None:  # a stopped run lacks the last ones
                row += ["-", "-"]
            else:
                row += [f"{peak / MB:,.0f}", f"{(peak - least) / MB:+,.0f}"]
    return Table("Memory", head, rows)
