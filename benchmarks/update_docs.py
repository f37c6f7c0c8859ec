"""Writes the tables and pictures of docs/benchmarks.md again from the raw results: `python benchmarks/update_docs.py`.

A block of the page starts with a comment that holds the command, `<!-- paca bench --report FILE --markdown … -->`, and
ends with `<!-- end -->`; what is between them is what the command prints. Run it from the top of the checkout.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from paca.bench import main
from paca.whole import write_text

PAGE = Path("docs/benchmarks.md")
_BLOCK = re.compile(r"<!-- paca bench (?P<arguments>--report .*?) -->\n.*?<!-- end -->", re.DOTALL)


def output_of(arguments: list[str]) -> str:
    """Return what `paca bench` prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        main(arguments)
    return printed.getvalue()


def filled(page: str, run: Callable[[list[str]], str] = output_of) -> str:
    """Return the page with every block filled by its command."""

    def fill(block: re.Match[str]) -> str:
        arguments = block["arguments"]
        return f"<!-- paca bench {arguments} -->\n\n{run(shlex.split(arguments))}\n<!-- end -->"

    return _BLOCK.sub(fill, page)


if __name__ == "__main__":
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
