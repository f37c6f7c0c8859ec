"""From rows to token ids and labels: the forms of an example, its loss mask, truncation, packing and padding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paca._version import __version__
from paca.rows import DataError, Row, Rows, show
from paca.whole import replacing, write_text

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]
    from torch import Tensor

IGNORED = -100  # the label that torch's cross entropy leaves out of the loss
_BATCH = 1000  # rows tokenised in one call
_FLUSH = 4096  # sequences written to disk at once


@dataclass(frozen=True)
class Encoding:
    """How examples are cut and masked.

    Args:
        max_length: tokens of one sequence at most.
        completion_only: whether the loss is on the completion, or the last assistant turn, alone; None: as the form is.
        packing: whether documents are joined and cut to sequences of exactly `max_length`.
        classes: the class names of a classification, in the order of their ids.
    """

    max_length: int
    completion_only: bool | None = None
    packing: bool = False
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """One document: its token ids and as many labels (one for classification), and its place, for messages."""

    input_ids: list[int]
    labels: list[int]
    where: str
    cut: bool = False


@dataclass(frozen=True)
class Prepared:
    """Data ready for the Trainer.

    Args:
        dataset: rows of `input_ids` and `labels`.
        form: the columns it was made from, such as `prompt/completion`.
        documents: how many rows were read.
        cut: how many of them were longer than `max_length` and lost their end.
        tokens: tokens in all sequences.
        targets: how many of them the loss is taken on (classification: rows).
        largest_id: the largest token id.
    """

    dataset: Dataset
    form: str
    documents: int
    cut: int
    tokens: int
    targets: int
    largest_id: int

    def summary(self) -> str:
        """One line for people."""
        cut = f", {self.cut:,} cut to max_length" if self.cut else ""
        counts = f"{len(self.dataset):,} sequences, {self.tokens:,} tokens, loss on {self.targets:,}"
        return f"{self.documents:,} rows of {self.form}{cut}, {counts}"


def form_of(rows: Rows, task: str) -> str:
    """Tell the form of data by its first row: `messages`, `prompt/completion`, `text` or `text/label`.

    Raises:
        DataError: if no form fits; the message lists the forms.
    """
    forms = _FORMS[task]
    row = next(iter(rows), None)
    if row is None:
        raise DataError(f"{rows.name} holds no rows")
    for form in forms:
        if all(column in row.values for column in form.split("/")):
            return form
    known = "; or ".join(" and ".join(f"`{column}`" for column in form.split("/")) for form in forms)
    found = ", ".join(f"`{column}`" for column in row.values) or "no columns"
    raise DataError(
        f"{row.where}: {task} needs the columns {known}; found {found}. `columns: {{text: NAME}}` takes text from NAME"
    )


def label_names(rows: Rows) -> tuple[str, ...]:
    """The classes of a classification, in the order of their ids: sorted text, or 0, 1, 2, … up to the largest.

    Raises:
        DataError: for a row whose label is missing or not a class.
    """
    found: dict[int | str, str] = {}
    for row in rows:
        found.setdefault(_label(row), row.where)
    numbers = [label for label in found if isinstance(label, int)]
    if numbers and len(numbers) < len(found):
        text, where = next((label, where) for label, where in found.items() if isinstance(label, str))
        raise DataError(f"{where}: label {text!r} is text, but other labels are integers")
    return tuple(map(str, range(max(numbers) + 1))) if numbers else tuple(sorted(map(str, found)))


def prepare(
    rows: Rows, tokenizer: Any, task: str, encoding: Encoding, keep: Callable[[int], bool] | None = None, part: str = ""
) -> Prepared:
    """Turn rows into a data set of token ids and labels.

    It is kept in the cache of `datasets` until the source or an option changes.

    Args:
        rows: the source.
        tokenizer: a transformers tokenizer.
        task: "causal_lm" or "sequence_classification".
        encoding: cutting, masking and packing.
        keep: tells which row numbers to use; None uses all.
        part: names the choice that `keep` makes.

    Raises:
        DataError: for the first row that cannot be trained on, by file and line.
    """
    import datasets

    form = form_of(rows, task)
    if form == "messages" and not tokenizer.chat_template:
        raise DataError(
            f"{rows.name} holds `messages`, but the tokenizer has no chat template: take a chat model, "
            "or give prompt and completion"
        )
    options = [
        __version__,
        rows.version,
        dict(rows.renamed),
        rows.limit,
        task,
        form,
        asdict(encoding),
        part,
        _state(tokenizer),
    ]
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "paca"
    table, counts = folder / f"{digest}.arrow", folder / f"{digest}.json"
    if not (table.exists() and counts.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        tally = _Tally()
        sequences = _documents(rows, tokenizer, _FORMS[task][form], encoding, keep, tally)
        if encoding.packing:
            sequences = packed(sequences, encoding.max_length, _end_of_text(tokenizer))
        _write(table, sequences, tally, per_token=task == "causal_lm")
        write_text(counts, json.dumps(asdict(tally)))
    dataset = datasets.Dataset.from_file(str(table))
    if len(dataset) == 0:
        raise DataError(f"{rows.name}: no row is left to use")
    return Prepared(dataset, form, **json.loads(counts.read_text()))


def count(rows: Rows) -> int:
    """How many rows there are; reads all of them."""
    return sum(1 for _ in rows)


def packed(documents: Iterable[Example], length: int, end_of_text: int) -> Iterator[Example]:
    """Join documents, each closed by the end-of-text token, and cut the stream into sequences of `length` tokens.

    The last sequence holds what remains; the collator fills it up, so that every batch has the same shape. Only
    sequences without any label are dropped. Tokens see the documents before theirs in the same sequence.
    """
    ids: list[int] = []
    labels: list[int] = []
    where = ""
    for document in documents:
        where = document.where
        # A chat template may have closed the document itself, perhaps with a line break behind it.
        closing = [] if end_of_text in document.input_ids[-2:] else [end_of_text]
        ids += document.input_ids + closing
        labels += document.labels + closing
        while len(ids) >= length:
            if _has_target(labels[:length]):
                yield Example(ids[:length], labels[:length], where)
            ids, labels = ids[length:], labels[length:]
    if _has_target(labels):
        yield Example(ids, labels, where)


class Collator:
    """Joins examples to a batch, padded at the end.

    Args:
        padding: the padding token's id.
        length: pad to this many tokens always, or to the longest of the batch where it is None.
    """

    def __init__(self, padding: int, length: int | None = None) -> None:
        self.padding, self.length = padding, length

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `labels`: int64, (batch, tokens); classes are (batch,)."""
        import torch

        length = self.length or max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), length)
        ids, mask, labels = (
            torch.full(shape, self.padding),
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, IGNORED),
        )
        for row, example in enumerate(examples):
            tokens = len(example["input_ids"])
            ids[row, :tokens] = torch.as_tensor(example["input_ids"])
            mask[row, :tokens] = 1
            if "labels" in example:
                labels[row, :tokens] = torch.as_tensor(example["labels"])
        if "label" in examples[0]:
            labels = torch.as_tensor([example["label"] for example in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class _Tally:
    """Counts taken while examples stream by."""

    documents: int = 0
    cut: int = 0
    tokens: int = 0
    targets: int = 0
    largest_id: int = 0


def _documents(
    rows: Rows, tokenizer: Any, encode: _Encoder, encoding: Encoding, keep: Callable[[int], bool] | None, tally: _Tally
) -> Iterator[Example]:
    """Encode the rows in batches, because a tokenizer is many times faster on a batch than on one text."""
    kept = (row for number, row in enumerate(rows) if keep is None or keep(number))
    while batch := list(islice(kept, _BATCH)):
        for example in encode(tokenizer, batch, encoding):
            tally.documents += 1
            tally.cut += example.cut
            yield example


def _encode_text(tokenizer: Any, rows: Sequence[Row], encoding: Encoding) -> list[Example]:
    """`text`: the loss is on every token."""
    ids = tokenizer([_text(row, "text") for row in rows])["input_ids"]
    return [_example(row, _closed(tokenizer, i), 0, encoding) for row, i in zip(rows, ids, strict=True)]


def _encode_prompt_completion(tokenizer: Any, rows: Sequence[Row], encoding: Encoding) -> list[Example]:
    """`prompt` and `completion`, texts or lists of chat messages: the loss is on the completion by default."""
    if isinstance(rows[0].values["prompt"], list):
        prompts = [_messages(row, "prompt") for row in rows]
        turns = [prompt + _messages(row, "completion") for prompt, row in zip(prompts, rows, strict=True)]
        return _encode_chat(
            tokenizer, rows, prompts, turns, encoding, completion_only=encoding.completion_only is not False
        )
    prompts_ = [_text(row, "prompt", may_be_empty=True) for row in rows]
    texts = [prompt + _text(row, "completion") for prompt, row in zip(prompts_, rows, strict=True)]
    before, whole = tokenizer(prompts_)["input_ids"], tokenizer(texts)["input_ids"]
    return [
        _example(row, _closed(tokenizer, w), 0 if encoding.completion_only is False else _common_prefix(b, w), encoding)
        for row, b, w in zip(rows, before, whole, strict=True)
    ]


def _encode_messages(tokenizer: Any, rows: Sequence[Row], encoding: Encoding) -> list[Example]:
    """`messages` through the chat template: the loss is on every token, or on the last assistant turn alone."""
    turns = [_messages(row, "messages") for row in rows]
    if encoding.completion_only:
        for row, turn in zip(rows, turns, strict=True):
            if turn[-1]["role"] != "assistant":
                raise DataError(
                    f"{row.where}: the last turn is {turn[-1]['role']}'s; completion_only_loss wants the assistant's"
                )
    return _encode_chat(
        tokenizer, rows, [t[:-1] for t in turns], turns, encoding, completion_only=bool(encoding.completion_only)
    )


def _encode_chat(
    tokenizer: Any,
    rows: Sequence[Row],
    prompts: Sequence[list[dict[str, Any]]],
    turns: Sequence[list[dict[str, Any]]],
    encoding: Encoding,
    completion_only: bool,
) -> list[Example]:
    # The template writes the special tokens itself.
    whole = tokenizer(
        [_rendered(tokenizer, row, t) for row, t in zip(rows, turns, strict=True)], add_special_tokens=False
    )["input_ids"]
    if not completion_only:
        return [_example(row, ids, 0, encoding) for row, ids in zip(rows, whole, strict=True)]
    asked = [_rendered(tokenizer, row, p, ask=True) if p else "" for row, p in zip(rows, prompts, strict=True)]
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    return [_example(row, w, _common_prefix(b, w), encoding) for row, b, w in zip(rows, before, whole, strict=True)]


def _encode_classes(tokenizer: Any, rows: Sequence[Row], encoding: Encoding) -> list[Example]:
    """`text` and `label`."""
    ids = {name: number for number, name in enumerate(encoding.classes)}
    texts = [_text(row, "text") for row in rows]
    whole = tokenizer(texts)["input_ids"]
    # The tokenizer cuts, so that the closing special token stays.
    fitting = tokenizer(texts, truncation=True, max_length=encoding.max_length)["input_ids"]
    examples = []
    for row, tokens, all_tokens in zip(rows, fitting, whole, strict=True):
        label = str(_label(row))
        if label not in ids:
            raise DataError(
                f"{row.where}: label {label!r} is no class of the training data: {', '.join(encoding.classes)}"
            )
        examples.append(Example(tokens, [ids[label]], row.where, cut=len(tokens) < len(all_tokens)))
    return examples


_Encoder = Callable[[Any, Sequence[Row], Encoding], list[Example]]

# The forms of each task, the most specific first; a form's name is its columns.
_FORMS: Mapping[str, Mapping[str, _Encoder]] = {
    "causal_lm": {"messages": _encode_messages, "prompt/completion": _encode_prompt_completion, "text": _encode_text},
    "sequence_classification": {"text/label": _encode_classes},
}


def _example(row: Row, ids: list[int], start: int, encoding: Encoding) -> Example:
    """Cut to the maximal length and leave out the labels before `start`, and the first: nothing precedes it."""
    labels = [IGNORED] * max(start, 1) + ids[max(start, 1) :]
    if encoding.packing:
        return Example(ids, labels, row.where)
    kept = Example(
        ids[: encoding.max_length], labels[: encoding.max_length], row.where, cut=len(ids) > encoding.max_length
    )
    if not _has_target(kept.labels):
        long = start >= encoding.max_length
        raise DataError(
            f"{row.where}: nothing to learn is left: the prompt alone has {start} tokens, max_length is "
            f"{encoding.max_length}; raise max_length or remove the row"
            if long
            else f"{row.where}: nothing to learn: the row has {len(ids)} token(s), and none is to be told from another"
        )
    return kept


def _has_target(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens agree: where a merge crosses the border, the merged token belongs to the completion."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


def _closed(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids with the end-of-text token, so that the model learns where to stop."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "packing closes documents by the end-of-text token, which this tokenizer does not have: set packing: false"
        )
    return int(tokenizer.eos_token_id)


def _rendered(tokenizer: Any, row: Row, messages: list[dict[str, Any]], ask: bool = False) -> str:
    """The messages as the chat template writes them, with the assistant's opening where an answer is asked for."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # templates raise what their authors chose, e.g. on roles that do not alternate
        raise DataError(f"{row.where}: the chat template refuses the messages: {error}") from error


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: `{column}` must be text; found {show(value)}")
    if not value.strip() and not (may_be_empty and not value):
        raise DataError(f"{row.where}: `{column}` is empty")
    return value


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    value = _value(row, column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: `{column}` must be a list of messages; found {show(value)}")
    for position, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(
                f"{row.where}: message {position} of `{column}` must have `role` and `content`; found {show(message)}"
            )
    # Tables give every message every key, null where it had none; templates ask whether a key is there.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _label(row: Row) -> int | str:
    """A class: text, or a whole number of 0 or more, which a text file holds as digits."""
    value = _value(row, "label")
    if isinstance(value, str) and value.strip():
        return int(value) if value.isdecimal() else value
    if isinstance(value, int) and value >= 0:
        return int(value)
    raise DataError(f"{row.where}: `label` must be text or an integer from 0; found {show(value)}")


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise DataError(
            f"{row.where}: there is no `{column}`; found {', '.join(map(repr, row.values)) or 'no columns'}"
        )
    return row.values[column]


def _write(path: Path, sequences: Iterable[Example], tally: _Tally, per_token: bool) -> None:
    """Write the sequences as an Arrow file, a batch at a time, and move it into place when it is whole."""
    import pyarrow  # type: ignore[import-untyped]

    integers = pyarrow.list_(pyarrow.int32())
    labels = pyarrow.field("labels", integers) if per_token else pyarrow.field("label", pyarrow.int32())
    schema = pyarrow.schema([pyarrow.field("input_ids", integers), labels])
    stream = iter(sequences)
    with (
        replacing(path) as unfinished,
        pyarrow.OSFile(str(unfinished), "wb") as file,
        pyarrow.ipc.new_stream(file, schema) as writer,
    ):
        while batch := list(islice(stream, _FLUSH)):
            for example in batch:
                tally.tokens += len(example.input_ids)
                tally.targets += sum(label != IGNORED for label in example.labels[1:]) if per_token else 1
                tally.largest_id = max(tally.largest_id, *example.input_ids)
            targets = [[IGNORED, *example.labels[1:]] if per_token else example.labels[0] for example in batch]
            columns = [[example.input_ids for example in batch], targets]
            writer.write_batch(
                pyarrow.record_batch([pyarrow.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)
            )


def _state(tokenizer: Any) -> list[str]:
    """What the ids depend on besides the rows."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    inside = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return [type(tokenizer).__name__, inside, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
