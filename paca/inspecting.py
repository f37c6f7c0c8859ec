"""Shows saved adapters: tables of what they change and where they meet, and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paca.errors import AdapterError
from paca.overlap import LayerChange, changes, overlap, overlaps
from paca.saved import SavedAdapter, read_adapter
from paca.whole import replacing


def read_all(folders: list[Path]) -> dict[str, SavedAdapter]:
    """Read adapters, named by the shortest ends of their paths that tell them apart.

    Raises:
        FileNotFoundError, AdapterError: for a folder that holds no PaCA adapter, or is named twice.
    """
    paths = [folder.expanduser().resolve() for folder in folders]
    if len(set(paths)) != len(paths):
        raise AdapterError("the same folder is named twice")
    deepest = max(len(path.parts) for path in paths)
    names = next(
        names
        for depth in range(1, deepest + 1)
        if len(set(names := ["/".join(path.parts[-depth:]) for path in paths])) == len(paths)
    )
    return {name: read_adapter(path) for name, path in zip(names, paths, strict=True)}


def summary(adapters: Mapping[str, SavedAdapter], layers: bool = False) -> list[str]:
    """Return the lines to print.

    Args:
        adapters: by name.
        layers: show every layer; otherwise one line for each kind of module.
    """
    lines = []
    for name, adapter in adapters.items():
        made, unit = changes(adapter), _unit(adapter)
        total = sum(change.parameters for change in made)
        norm = sum(change.norm**2 for change in made) ** 0.5
        lines += [
            f"{name}: {len(made)} layers, {sum(change.columns for change in made):,} {unit}, {total:,} parameters, "
            f"‖update‖ {norm:.4g}",
            *(f"  also {key}" for key in adapter.others),
        ]
        if layers:
            lines.append(f"  {'layer':<44}{unit:>16}{'‖update‖':>12}{'largest':>9}{'idle':>6}")
            lines += [
                f"  {change.name:<44}{_of([change]):>16}{change.norm:>12.4g}{change.largest:>9}{change.idle:>6}"
                for change in made
            ]
        else:
            kinds: dict[str, list[LayerChange]] = defaultdict(list)
            for change in made:
                kinds[change.name.rpartition(".")[2]].append(change)
            lines.append(f"  {'module':<20}{'layers':>8}{unit:>16}{'‖update‖ mean':>16}{'largest':>10}{'idle':>6}")
            for kind, group in kinds.items():
                norms = [change.norm for change in group]
                lines.append(
                    f"  {kind:<20}{len(group):>8}{_of(group):>16}{sum(norms) / len(norms):>16.4g}"
                    f"{max(norms):>10.4g}{sum(change.idle for change in group):>6}"
                )
        lines.append("")
    if len(adapters) > 1:
        unit = _unit(next(iter(adapters.values())))
        lines.append(f"{'where they meet':<44}{f'shared {unit}':>18}{'by chance':>12}{'cosine':>10}")
        for (one, two), met in overlaps(adapters).items():
            share = f"{met.shared:,} of {min(met.first, met.second):,}"
            chance = "-" if met.by_chance is None else f"{met.by_chance:,.1f}"
            lines.append(f"{f'{one} and {two}':<44}{share:>18}{chance:>12}{met.cosine:>10.4f}")
    return lines


def as_data(adapters: Mapping[str, SavedAdapter]) -> dict[str, Any]:
    """Return all of it as plain data for a JSON file, with the column numbers."""
    described = {
        name: {
            "layers": [
                {**asdict(change), "index": adapter.layers[change.name].index.tolist()} for change in changes(adapter)
            ],
            "others": list(adapter.others),
        }
        for name, adapter in adapters.items()
    }
    names = list(adapters)
    pairs = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    return {
        "adapters": described,
        "overlaps": [
            {"first": a, "second": b, "layers": [asdict(entry) for entry in overlap(adapters[a], adapters[b])]}
            for a, b in pairs
        ],
    }


def draw(adapters: Mapping[str, SavedAdapter], path: Path) -> None:
    """Draw each adapter's update by block and module: how large it is, as a colour.

    Args:
        adapters: by name.
        path: a PNG file; it replaces what is there when it is whole.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(adapters), 5), layout="constrained")
    for axes, (name, adapter) in zip(
        figure.subplots(1, len(adapters), squeeze=False)[0], adapters.items(), strict=True
    ):
        made = changes(adapter)
        blocks = list(dict.fromkeys(_block(change.name) for change in made))
        kinds = list(dict.fromkeys(change.name.rpartition(".")[2] for change in made))
        grid = [[float("nan")] * len(kinds) for _ in blocks]
        for change in made:
            grid[blocks.index(_block(change.name))][kinds.index(change.name.rpartition(".")[2])] = change.norm
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
        axes.set_title(name, fontsize=10)
        figure.colorbar(image, ax=axes, label="norm of the update")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")


def _unit(adapter: SavedAdapter) -> str:
    """What an adapter trains."""
    return "entries" if adapter.config.masked else "columns"


def _of(layers: list[LayerChange]) -> str:
    """How many columns layers train, and of how many if all files say: 8/576, or 21…43/1536 where they differ."""
    widths = [layer.width for layer in layers if layer.width is not None]
    trained = _span([layer.columns for layer in layers])
    return f"{trained}/{_span(widths)}" if len(widths) == len(layers) else trained


def _span(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least}…{most}"


def _block(name: str) -> str:
    """The part of a module's name up to its last number: the block it belongs to."""
    parts = name.split(".")
    last = max((number for number, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1]) or name.rpartition(".")[0] or name
