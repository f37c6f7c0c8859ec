"""Data: the forms, the loss masks, packing, padding, and the bad row by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from paca.data import IGNORED, Collator, Encoding, Example, form_of, label_names, packed, prepare
from paca.rows import DataError, Rows, open_files

EOS = 257


def rows_of(path: Path, **options: Any) -> Rows:
    return open_files(
        [str(path)], options.pop("sample_by", "line"), options.pop("columns", None), options.pop("limit", None)
    )


def prepared(
    path: Path, tokenizer: Any, task: str = "causal_lm", length: int = 64, **options: Any
) -> list[dict[str, Any]]:
    return list(prepare(rows_of(path), tokenizer, task, Encoding(length, **options)).dataset)


def spoken(tokenizer: Any, row: dict[str, Any]) -> str:
    """The text that the loss is taken on."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


# ---------------------------------------------------------------- forms and masks


def test_text_is_learnt_whole_but_for_its_first_token(tmp_path: Path, tokenizer: Any) -> None:
    [row] = prepared(write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}]), tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "abc</s>"
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_of_prompt_and_completion_the_completion_is_learnt(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "ask: ", "completion": "answer"}, {"prompt": "", "completion": "free"}]
    )
    rows = prepared(file, tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["ask: answer</s>", "free</s>"]
    assert [spoken(tokenizer, row) for row in rows] == ["answer</s>", "ree</s>"]
    assert spoken(tokenizer, prepared(file, tokenizer, completion_only=False)[0]) == "sk: answer</s>"


TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


def test_messages_go_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    [row] = prepared(file, tokenizer, length=256)
    whole = "<user>one?</s><assistant>1</s><user>two?</s><assistant>2</s>"
    assert tokenizer.decode(row["input_ids"]) == whole
    assert spoken(tokenizer, row) == whole[1:]


def test_completion_only_learns_the_last_assistant_turn(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    [row] = prepared(file, tokenizer, length=256, completion_only=True)
    assert spoken(tokenizer, row) == "2</s>"


def test_prompts_and_completions_may_be_conversations(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": TURNS[:3], "completion": TURNS[3:]}])
    [row] = prepared(file, tokenizer, length=256)
    assert spoken(tokenizer, row) == "2</s>"


def test_a_token_across_the_border_belongs_to_the_completion(tmp_path: Path) -> None:
    """A tokenizer that merges "ab": the prompt "a" alone has a token that the whole text has not."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "ab": 3, "<e>": 4}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", pad_token="<e>")
    [row] = prepared(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "xa", "completion": "bx"}]), merging)
    assert row["input_ids"] == [0, 3, 0, 4]
    assert row["labels"] == [IGNORED, 3, 0, 4]


def test_classes_are_numbered_by_sorted_text_or_by_number(tmp_path: Path, tokenizer: Any) -> None:
    words = write_jsonl(tmp_path / "w.jsonl", [{"text": "x", "label": w} for w in ("pos", "neg", "pos")])
    numbers = write_jsonl(tmp_path / "n.jsonl", [{"text": "x", "label": n} for n in (2, 0)])
    assert label_names(rows_of(words)) == ("neg", "pos")
    assert label_names(rows_of(numbers)) == ("0", "1", "2")
    rows = prepared(words, tokenizer, "sequence_classification", classes=("neg", "pos"))
    assert [row["label"] for row in rows] == [1, 0, 1]


def test_classification_keeps_the_closing_token_when_it_cuts(tmp_path: Path) -> None:
    from tokenizers import processors

    closing = make_tokenizer(tmp_path / "t")
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", EOS)])
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdefgh", "label": "l"}])
    found = prepare(rows_of(file), closing, "sequence_classification", Encoding(4, classes=("l", "m")))
    assert closing.decode(found.dataset[0]["input_ids"]) == "abc</s>"
    assert found.cut == 1


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    table = [
        {"prompt": 'say, "a\nb"', "completion": "007", "other": "NA"},
        {"prompt": "q", "completion": "é", "other": "x"},
    ]
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(file, table)
    elif kind == "json":
        file.write_text(json.dumps(table, indent=1))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
    else:
        import csv

        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, table[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    assert [dict(row.values) for row in rows_of(file)] == table
    assert [spoken(tokenizer, row) for row in prepared(file, tokenizer)] == ["007</s>", "é</s>"]


def test_a_text_file_is_read_by_line_paragraph_or_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\n\nthree\r\n")
    assert [(row.values["text"], row.where) for row in rows_of(file)] == [
        ("one", f"{file}:1"),
        ("two", f"{file}:2"),
        ("three", f"{file}:5"),
    ]
    assert [row.values["text"] for row in rows_of(file, sample_by="paragraph")] == ["one\ntwo", "three"]
    assert [row.values["text"] for row in rows_of(file, sample_by="document")] == ["one\ntwo\n\n\nthree\r\n"]


def test_columns_are_renamed_and_rows_limited(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"instruction": str(n), "output": "b"} for n in range(5)])
    rows = rows_of(file, columns={"prompt": "instruction", "completion": "output"}, limit=2)
    assert form_of(rows, "causal_lm") == "prompt/completion"
    assert [row.values["prompt"] for row in rows] == ["0", "1"]


def test_prepared_data_is_kept_until_the_file_changes(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    first = prepare(rows_of(file), tokenizer, "causal_lm", Encoding(64))
    again = prepare(rows_of(file), tokenizer, "causal_lm", Encoding(64))
    assert first.dataset.cache_files == again.dataset.cache_files
    write_jsonl(file, [{"text": "abcd"}])
    other = prepare(rows_of(file), tokenizer, "causal_lm", Encoding(64))
    assert other.dataset.cache_files != first.dataset.cache_files
    assert other.tokens == 5


# ---------------------------------------------------------------- bad rows

GOOD = {"text": "fine"}
PAIR = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([json.dumps(GOOD), "", '{"text": "a'], ":3: not valid JSON: Unterminated string starting at column 10"),
        ([json.dumps(GOOD), "[1]"], ':2: expected an object such as {"text": …}; found [1] (list)'),
        ([json.dumps(GOOD), '{"txet": "a"}'], ":2: there is no `text`; found 'txet'"),
        ([json.dumps(GOOD), '{"text": 5}'], ":2: `text` must be text; found 5 (int)"),
        ([json.dumps(GOOD), '{"text": null}'], ":2: `text` must be text; found None (null)"),
        ([json.dumps(GOOD), '{"text": "  "}'], ":2: `text` is empty"),
        ([json.dumps(PAIR), '{"prompt": "p", "completion": ""}'], ":2: `completion` is empty"),
        ([json.dumps(PAIR), '{"prompt": "p"}'], ":2: there is no `completion`; found 'prompt'"),
        ([json.dumps(PAIR), json.dumps({"prompt": "p" * 70, "completion": "c"})],
         ":2: nothing to learn is left: the prompt alone has 70 tokens, max_length is 64"),
        ([json.dumps({"messages": TURNS}), '{"messages": []}'], ":2: `messages` must be a list of messages; found []"),
        ([json.dumps({"messages": TURNS}), '{"messages": [{"content": "x"}]}'],
         ":2: message 1 of `messages` must have `role` and `content`"),
        (['{"words": "a"}'],
         ":1: causal_lm needs the columns `messages`; or `prompt` and `completion`; or `text`; found `words`"),
        (["\xff"], ":1: not valid JSON"),
    ],
)  # fmt: skip
def test_the_bad_row_is_named_by_file_and_line(tmp_path: Path, tokenizer: Any, lines: list[str], expected: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as error:
        prepared(file, tokenizer, length=64)
    assert f"{file}{expected}" in str(error.value)


def test_a_wrong_byte_is_named_by_its_line(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8 text: invalid start byte at byte 10"):
        prepared(file, tokenizer)


def test_a_torn_csv_row_is_named_by_its_first_line(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,completion\n"two\nlines",fine\nonly one\n')
    with pytest.raises(DataError, match=r"a\.csv:4: 1 cells in a table of 2 columns \(prompt, completion\)"):
        prepared(file, tokenizer)


def test_a_truncated_parquet_file_is_named(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 50), file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet, after row 0: not valid Parquet"):
        prepared(file, tokenizer)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a", "label": 0.5}], ":1: `label` must be text or an integer from 0; found 0.5 (float)"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": -1}],
            ":2: `label` must be text or an integer from 0; found -1",
        ),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": "good"}],
            ":2: label 'good' is text, but other labels are integers",
        ),
    ],
)
def test_a_bad_label_is_named(tmp_path: Path, rows: list[Any], expected: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        label_names(rows_of(file))
    assert f"{file}{expected}" in str(error.value)


def test_an_unknown_class_in_the_held_out_data_is_named(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "neutral"}])
    with pytest.raises(DataError, match=r":1: label 'neutral' is no class of the training data: neg, pos"):
        prepared(file, tokenizer, "sequence_classification", classes=("neg", "pos"))


def test_missing_files_kinds_and_empty_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        rows_of(tmp_path / "none.jsonl")
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataError, match=r"a\.xlsx: \.xlsx is not one of \.jsonl, \.json"):
        rows_of(tmp_path / "a.xlsx")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"a\.jsonl holds no rows"):
        prepared(tmp_path / "a.jsonl", tokenizer)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    plain = make_tokenizer(tmp_path / "t", chat=False)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        prepared(write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}]), plain)


def test_a_template_that_refuses_names_the_row(tmp_path: Path) -> None:
    strict = make_tokenizer(tmp_path / "t")
    strict.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": TURNS[1:]}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template refuses the messages: user first"):
        prepared(file, strict)


def test_an_unreachable_hub_is_said(tmp_path: Path) -> None:
    from paca.rows import open_hub

    with pytest.raises(DataError, match=r"dataset_name 'no/such' .* the hub is switched off by HF_HUB_OFFLINE=1"):
        open_hub("no/such", None, "train", None, None)


# ---------------------------------------------------------------- packing and padding

documents = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=20)


@settings(deadline=None, max_examples=80)
@given(documents=documents, length=st.integers(2, 17))
def test_packing_keeps_every_token_once_in_order_and_fills_every_sequence(
    documents: list[list[int]], length: int
) -> None:
    sequences = list(packed([Example(ids, ids, "") for ids in documents], length, EOS))
    joined = [token for ids in documents for token in [*ids, EOS]]
    assert all(len(sequence.input_ids) == length for sequence in sequences[:-1])
    found = [token for sequence in sequences for token in sequence.input_ids]
    # A single token that remains has no target, and nothing but such a remainder is left out.
    assert found == joined or (found == joined[:-1] and len(joined) % length == 1)


def test_packing_keeps_masks_and_drops_sequences_without_a_label() -> None:
    prompt_only = Example([1] * 8, [IGNORED] * 8, "")
    answered = Example([2, 3, 4], [IGNORED, 3, 4], "")
    sequences = list(packed([prompt_only, answered], 4, EOS))
    assert [s.input_ids for s in sequences] == [[EOS, 2, 3, 4]]
    assert [s.labels for s in sequences] == [[EOS, IGNORED, 3, 4]]


def test_packed_batches_all_have_the_same_shape(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * n} for n in (3, 30, 50, 1)])
    rows = prepared(file, tokenizer, length=16, packing=True)
    batches = [Collator(tokenizer.pad_token_id, 16)([row]) for row in rows]
    assert len(batches) == 6
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(1, 16)}
    assert [int(batch["attention_mask"].sum()) for batch in batches] == [16, 16, 16, 16, 16, 8]
    assert all(row["labels"][0] == IGNORED for row in rows)


def test_packing_needs_an_end_of_text_token(tmp_path: Path) -> None:
    endless = make_tokenizer(tmp_path / "t")
    endless.eos_token = None
    with pytest.raises(DataError, match="packing closes documents by the end-of-text token"):
        prepared(write_jsonl(tmp_path / "a.jsonl", [GOOD]), endless, packing=True)


def test_padding_is_seen_by_neither_attention_nor_loss() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [IGNORED]}]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED] * 3]
    assert Collator(9, 5)(rows)["labels"].shape == (2, 5)
