"""Sums up a folder of results: one table for all sizes and settings, and a picture."""

from __future__ import annotations

from pathlib import Path

from paca.bench import report, tables
from paca.bench.methods import FLOOR
from paca.bench.result import Result, read
from paca.bench.statistics import milliseconds, ratio
from paca.bench.tables import Table
from paca.whole import replacing

PACA = "paca-r8"
LORA = "lora-nocast-r8"  # the strongest LoRA


def results_in(folder: Path) -> dict[str, Result]:
    """Read every result of a folder, by file name.

    Raises:
        ValueError: if there is none.
    """
    found = {file.stem: read(file) for file in sorted(folder.glob("*.json"))}
    if not found:
        raise ValueError(f"there is no result (*.json) in {folder}")
    return found


def tables_of(results: dict[str, Result]) -> list[Table]:
    """Return step times over the floor's and over LoRA's, and what fits, for those runs that measured it."""
    timed = {name: result for name, result in results.items() if result.methods[FLOOR].samples}
    made = [
        _ratios(timed, FLOOR, "Step time / frozen floor, median of the rounds' ratios"),
        _ratios(timed, LORA, "Step time / LoRA r=8 with adapters in the weight's dtype"),
        _ratios(timed, "lora-r8", "Step time / LoRA r=8 as PEFT makes it"),
        _ratios(timed, "lora-r64", "Step time / LoRA r=64 as PEFT makes it"),
        _peaks(results, "lora-r64", "Highest memory, weights included / LoRA r=64 as PEFT makes it"),
        _peaks(results, LORA, "Highest memory, weights included / LoRA r=8 with adapters in the weight's dtype"),
        _ratios(timed, "paca-upstream-r8", "Step time / the way of PEFT 0.22's PaCA"),
    ]
    made += [_against_loras(results), _against_eager(timed)]
    made += [table for result in results.values() if (table := report.limits(result)) is not None]
    return [table for table in made if table.rows]


def _ratios(timed: dict[str, Result], over: str, title: str) -> Table:
    runs = {name: result for name, result in timed.items() if over in result.methods}
    methods = {name: method.label for result in runs.values() for name, method in result.methods.items()}
    rows = []
    for method, label in methods.items():
        cells = []
        for result in runs.values():
            mine, theirs = result.methods.get(method), result.methods[over]
            whole = mine is not None and len(mine.samples) == len(theirs.samples)
            cells.append(f"{ratio(mine, theirs, 'step', result.clock).median:.3f}" if mine and whole else "-")
        rows.append([label, *cells])
    return Table(title, ["method", *runs], rows if runs else [])


def _peaks(results: dict[str, Result], over: str, title: str) -> Table:
    runs = {name: result for name, result in results.items() if over in result.methods and result.methods[over].peak}
    methods = {name: method.label for result in runs.values() for name, method in result.methods.items()}
    rows = []
    for method, label in methods.items():
        cells = []
        for result in runs.values():
            mine, theirs = result.methods.get(method), result.methods[over].peak
            cells.append(f"{mine.peak.peak / theirs.peak:.3f}" if mine and mine.peak and theirs else "-")
        rows.append([label, *cells])
    return Table(title, ["method", *runs], rows if runs else [])


def _against_loras(results: dict[str, Result]) -> Table:
    """What PaCA keeps and what fits with it, over both LoRAs'."""
    rows = []
    for name, result in results.items():
        paca, others = result.methods.get(PACA), [result.methods.get(lora) for lora in ("lora-r8", LORA)]
        if paca is None or None in others:
            continue
        figures: list[tuple[str, list[float]]] = [
            ("bytes kept by a layer", [m.kept.layer if m and m.kept else 0 for m in (paca, *others)])
        ]
        for number, limit in enumerate(paca.limits):
            fits = [m.limits[number] if m and len(m.limits) > number else None for m in (paca, *others)]
            cap = f"in {limit.cap / 1e9:g} GB"
            figures.append((f"longest sequence {cap}", [fit.longest if fit else 0 for fit in fits]))
            figures.append((f"tokens a second {cap}", [fit.tokens_per_second if fit else 0 for fit in fits]))
        for what, (mine, *theirs) in figures:
            if mine:
                rows.append([name, what, *(f"{mine / its:.3f}" if its else "-" for its in theirs)])
    title = "PaCA r=8 / LoRA r=8: what is kept and what fits"
    return Table(title, ["run", "figure", "/ LoRA as PEFT makes it", "/ LoRA, weight's dtype"], rows)


def _against_eager(timed: dict[str, Result]) -> Table:
    """PaCA's step in any mode over LoRA's eager one of the same size, from two runs: a ratio of medians."""
    rows = []
    for name, result in timed.items():
        eager = timed.get(f"eager-{result.shape.batch}x{result.shape.tokens}")
        if eager is None or eager is result or PACA not in result.methods or result.shape != eager.shape:
            continue
        if result.settings.get("base", "none") != "none" or not result.methods[PACA].samples:
            continue
        mine = milliseconds(result.methods[PACA], "step", result.clock)
        loras = [eager.methods.get(lora) for lora in ("lora-r8", LORA)]
        cells = [f"{mine / milliseconds(m, 'step', eager.clock):.3f}" if m and m.samples else "-" for m in loras]
        rows.append([name, *cells])
    title = "PaCA r=8 in this run / LoRA r=8 in the eager run of the same size, medians"
    return Table(title, ["run", "/ LoRA as PEFT makes it", "/ LoRA, weight's dtype"], rows)


def show(folder: Path, *, markdown: bool, plot: Path | None) -> int:
    """Print the summary of a folder, and draw it if a file for the picture is given."""
    results = results_in(folder)
    notes = [f"{name}: {line}" for name, result in results.items() for line in report.conditions(result)[1:4]]
    if markdown:
        print(tables.as_markdown(tables_of(results), notes), end="")
    else:
        tables.show(tables_of(results), notes)
    if plot is not None:
        draw(results, plot)
    return 0


def draw(results: dict[str, Result], path: Path) -> None:
    """Write a picture: each method's step time over the floor's, a group of bars for each run.

    Raises:
        ValueError: if no run was timed.
    """
    from matplotlib.figure import Figure

    timed = {name: result for name, result in results.items() if result.methods[FLOOR].samples}
    if not timed:
        raise ValueError("there is nothing to draw: no run of the folder was timed")
    methods = {n: m.label for result in timed.values() for n, m in result.methods.items() if n != FLOOR}
    figure = Figure(figsize=(2.5 + 0.16 * len(timed) * len(methods), 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(methods)
    for place, (name, label) in enumerate(methods.items()):
        bars = [
            (number + place * width, ratio(result.methods[name], result.methods[FLOOR], "step", result.clock).median)
            for number, result in enumerate(timed.values())
            if name in result.methods and result.methods[name].samples
        ]
        axis.bar([x for x, _ in bars], [y - 1 for _, y in bars], width, bottom=1.0, label=label)
    axis.axhline(1.0, color="black", linewidth=1)
    axis.set_xticks([number + 0.4 for number in range(len(timed))], list(timed), rotation=45, ha="right", fontsize=8)
    axis.set_ylabel("step time / frozen floor")
    axis.legend(fontsize=7)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
