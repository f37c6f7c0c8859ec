"""Tables of a result: for a terminal, as plain text, or as the Markdown that the documentation shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text; the first column is text, the others are numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def as_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Return tables and notes as Markdown."""
    parts = []
    for table in tables:
        ruler = ["---", *("---:" for _ in table.head[1:])]
        rows = [table.head, ruler, *table.rows]
        parts.append(f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes)]) + "\n"


def as_text(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Return tables and notes as aligned plain text."""
    parts = []
    for table in tables:
        widths = [max(len(row[i]) for row in [table.head, *table.rows]) for i in range(len(table.head))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in [table.head, ["-" * width for width in widths], *table.rows]
        ]
        parts.append("\n".join([table.title, *lines]))
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def show(tables: Sequence[Table], notes: Sequence[str]) -> None:
    """Print everything to the terminal, with rich where it is installed and the output is a terminal."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(as_text(tables, notes))
        return
    console = Console()
    if not console.is_terminal:
        print(as_text(tables, notes))
        return
    for table in tables:
        rich_table = RichTable(title=table.title, title_justify="left")
        for i, name in enumerate(table.head):
            rich_table.add_column(name, justify="right" if i else "left")
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)
    console.print("\n".join(notes), markup=False, highlight=False)
