"""Rows of training data, one at a time, each knowing the file and line it came from."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DIGESTED = 64 * 2**20  # bytes


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the line."""


@dataclass(frozen=True)
class Row:
    """One record and its place, such as `train.jsonl:17`."""

    values: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Rows:
    """Rows that can be read again and again, without ever holding all of them.

    Args:
        name: what to call the source in messages.
        version: changes when the content does; the key under which prepared data is kept.
        read: starts reading from the first row.
        renamed: our column name → the source's.
        limit: how many rows to use, or None for all.
    """

    name: str
    version: str
    read: Callable[[], Iterator[Row]]
    renamed: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.read()):
            if number == self.limit:
                return
            yield self._rename(row) if self.renamed else row

    def _rename(self, row: Row) -> Row:
        values = dict(row.values)
        for ours, theirs in self.renamed.items():
            if theirs not in values:
                raise DataError(
                    f"{row.where}: there is no {theirs!r}, which `columns` takes for {ours!r}; found {_names(values)}"
                )
            values[ours] = values.pop(theirs)
        return Row(values, row.where)


def open_files(paths: Sequence[str], sample_by: str, renamed: Mapping[str, str] | None, limit: int | None) -> Rows:
    """Rows of local files, one after the other.

    Args:
        paths: files ending in .jsonl, .json, .csv, .tsv, .parquet or .txt; `quickstart:` names are resolved.
        sample_by: what one example of a .txt file is: a "line", a "paragraph" (blank lines between) or the "document".
        renamed: our column name → the files'.
        limit: how many rows to use in all.

    Raises:
        DataError: if a file is missing, empty or of an unknown kind; on reading, for the first row that is not valid.
    """
    files = [_existing(path) for path in paths]

    def read() -> Iterator[Row]:
        for file in files:
            rows = _read_text(file, sample_by) if file.suffix == ".txt" else _READERS[file.suffix](file)
            empty = True
            for row in rows:
                empty = False
                yield row
            if empty:
                raise DataError(f"{file} holds no rows")

    version = json.dumps([*(_version(file) for file in files), sample_by])
    return Rows(", ".join(str(file) for file in files), version, read, renamed or {}, limit)


def open_hub(
    name: str, config: str | None, split: str, renamed: Mapping[str, str] | None, limit: int | None, trust: bool = False
) -> Rows:
    """Rows of a data set on the hub, or of a folder that `datasets.load_dataset` understands.

    Raises:
        DataError: if the hub cannot be reached or has no such data set, configuration or split.
    """
    import datasets  # type: ignore[import-untyped]

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"dataset_name {name!r} (split {split!r}) cannot be loaded: {why_no_hub()}{error}") from error

    def read() -> Iterator[Row]:
        for number, values in enumerate(loaded):
            yield Row(values, f"{name}, split {split}, row {number}")

    return Rows(
        f"{name}, split {split}", json.dumps([name, config, split, str(loaded.cache_files)]), read, renamed or {}, limit
    )


def why_no_hub() -> str:
    """Say that the hub is switched off, where it is, as the start of a sentence; else nothing."""
    from huggingface_hub import constants

    return "the hub is switched off by HF_HUB_OFFLINE=1; " if constants.HF_HUB_OFFLINE else ""


def _existing(path: str) -> Path:
    from paca.pretrained import local_path

    file = local_path(path)
    if not file.is_file():
        what = "is a folder" if file.exists() else f"does not exist (looked for {file.absolute()})"
        raise DataError(f"data file {path} {what}")
    if file.suffix not in _READERS and file.suffix != ".txt":
        raise DataError(
            f"data file {path}: {file.suffix or 'no ending'} is not one of {', '.join([*_READERS, '.txt'])}"
        )
    return file


def _version(file: Path) -> list[str | int]:
    """What changes with a file's content: a digest, or, where reading it twice would take long, size and time."""
    facts = file.stat()
    if facts.st_size > _DIGESTED:
        return [str(file.resolve()), facts.st_size, facts.st_mtime_ns]
    return [str(file.resolve()), hashlib.sha256(file.read_bytes()).hexdigest()]


def _read_json(file: Path) -> Iterator[Row]:
    """One object a line, or one array of objects."""
    with file.open("rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from _read_json_array(file)
        return
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            values = json.loads(line.strip())
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            ) from error
        yield _object(values, where)


def _read_json_array(file: Path) -> Iterator[Row]:
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}: not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from error
    for number, values in enumerate(items, start=1):
        yield _object(values, f"{file}, item {number}")


def _object(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f'{where}: expected an object such as {{"text": …}}; found {show(values)}')
    return Row(values, where)


def _read_csv(file: Path) -> Iterator[Row]:
    """The first line names the columns; every value is text."""
    csv.field_size_limit(sys.maxsize)  # the default refuses cells over 128 kB
    reader = csv.reader(
        (line for _, line in _lines(file)), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True
    )
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} cells in a table of {len(header)} columns ({', '.join(header)})"
                )
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{file}:{start}: not valid CSV: {error}") from error


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file}, row {number}")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}, after row {number}: not valid Parquet: {error}") from error


def _read_text(file: Path, sample_by: str) -> Iterator[Row]:
    if sample_by == "document":
        yield Row({"text": "".join(line for _, line in _lines(file))}, f"{file}:1")
        return
    held: list[str] = []
    first = 1
    for number, line in _lines(file):
        if line.strip():
            if not held:
                first = number
            held.append(line)
        if held and (sample_by == "line" or not line.strip()):
            yield Row({"text": "".join(held).rstrip("\r\n")}, f"{file}:{first}")
            held = []
    if held:
        yield Row({"text": "".join(held).rstrip("\r\n")}, f"{file}:{first}")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. Decoded one by one, so that a wrong byte is named by its line."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}:{number}: not UTF-8 text: {error.reason} at byte {error.start} of the line"
                ) from error


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def show(value: Any) -> str:
    """A value for a message, cut to a readable length, with its type."""
    text = repr(value)
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({'null' if value is None else type(value).__name__})"


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, values)) or "no columns"
