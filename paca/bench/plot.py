"""Draws a raw result."""

from __future__ import annotations

from pathlib import Path

from paca.bench.methods import FLOOR
from paca.bench.result import Result
from paca.bench.statistics import kept_above_floor, peak_above_build, ratio
from paca.whole import replacing

OURS, PEERS, BOUNDS = "#0072b2", "#e69f00", "#999999"  # told apart by colour-blind readers too


def draw(result: Result, path: Path) -> None:
    """Write a picture: step time over the floor's, bytes kept above the floor, peak memory; those that were measured.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    methods = {name: method for name, method in result.methods.items() if name != FLOOR}
    floor = result.methods[FLOOR]
    panels = []
    if floor.samples and methods:
        panels.append(("step time / frozen floor, median and quartiles", "time"))
    if floor.kept and methods:
        panels.append(("kept for backward above the floor, bytes a token and layer", "kept"))
    if floor.peak and methods:
        panels.append(("peak memory above the built model, MB", "peak"))
    if not panels:
        raise ValueError("there is nothing to draw: only the floor was measured")

    figure = Figure(figsize=(5.5 * len(panels), 1.4 + 0.34 * len(methods)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = list(range(len(methods)))
    colours = [OURS if n.startswith("paca") else BOUNDS if n == "full" else PEERS for n in methods]
    for axis, (title, kind) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        if kind == "time":
            ratios = [ratio(method, floor, "step", result.clock) for method in methods.values()]
            errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
            axis.barh(places, [r.median - 1 for r in ratios], left=1.0, color=colours, xerr=errors, ecolor="black")
            axis.axvline(1.0, color="black", linewidth=1)
            axis.set_xlim(left=min(0.95, *(r.low for r in ratios)))
        elif kind == "kept":
            extra = [kept_above_floor(result, method) or 0.0 for method in methods.values()]
            bars = axis.barh(places, extra, color=colours)
            axis.bar_label(bars, [f"{value:,.0f}" for value in extra], padding=2, fontsize=8)
            axis.set_xscale("symlog", linthresh=100)
            axis.set_xlim(0, 10 * max(*extra, 100.0))
        else:
            axis.barh(places, [(peak_above_build(method) or 0) / 1e6 for method in methods.values()], color=colours)
            axis.axvline((peak_above_build(floor) or 0) / 1e6, color="black", linewidth=1, label="frozen floor")
            axis.legend(fontsize=8)
    axes[0].set_yticks(places, [method.label for method in methods.values()], fontsize=9)
    axes[0].invert_yaxis()
    shape = result.shape
    figure.suptitle(
        f"{shape.layers} Llama layers, hidden {shape.hidden}, {shape.batch} x {shape.tokens} tokens, "
        f"{result.settings['dtype']}, {result.machine['processor']}, {result.machine['threads']} thread(s)",
        fontsize=10,
    )
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
