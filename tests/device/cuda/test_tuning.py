"""The fastest way is found once, kept beyond the process, and no failure of the file or of a candidate matters."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paca_cuda.tuning import Tuner, bucket, cache_folder, power_of_two

TIMES = {"slow": 3.0, "fast": 1.0, "middle": 2.0}


def make_tuner():
    measured = []

    def time(run):
        measured.append(run())
        return TIMES[measured[-1]]

    return Tuner("Test GPU (80GB)", time), measured


def candidates(*names):
    return {name: lambda name=name: name for name in names}


def test_the_fastest_is_chosen_and_not_measured_again():
    tuner, measured = make_tuner()
    assert tuner.choose("problem", candidates(*TIMES)) == "fast"
    assert sorted(measured) == sorted(TIMES)
    assert tuner.choose("problem", candidates(*TIMES)) == "fast"
    assert len(measured) == 3
    assert tuner.known("problem") == "fast"
    assert tuner.known("other") is None


def test_another_process_finds_the_choice():
    make_tuner()[0].choose("problem", candidates(*TIMES))
    tuner, measured = make_tuner()
    assert tuner.choose("problem", candidates(*TIMES)) == "fast"
    assert measured == []
    (file,) = cache_folder().iterdir()
    assert file.name == "tuned-Test-GPU-80GB-.json"


def test_a_choice_that_is_no_candidate_any_more_is_measured_anew():
    make_tuner()[0].choose("problem", candidates(*TIMES))
    tuner, _ = make_tuner()
    assert tuner.choose("problem", candidates("slow", "middle")) == "middle"


def test_two_processes_keep_each_others_choices():
    first, second = make_tuner()[0], make_tuner()[0]
    first.choose("a", candidates(*TIMES))
    second.choose("b", candidates(*TIMES))
    third = make_tuner()[0]
    assert third.known("a") == third.known("b") == "fast"


def fails():
    raise RuntimeError("out of resource: shared memory")


def test_a_candidate_that_fails_is_out():
    tuner, _ = make_tuner()
    assert tuner.choose("problem", {"fast": fails, **candidates("slow", "middle")}) == "middle"
    with pytest.raises(RuntimeError, match="no way to run other works") as error:
        tuner.choose("other", {"fast": fails})
    assert "shared memory" in str(error.value.__cause__)


def test_a_lack_of_memory_is_no_failure_of_a_candidate():
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    tuner, _ = make_tuner()
    with pytest.raises(torch.OutOfMemoryError):
        tuner.choose("problem", {"fast": no_memory, **candidates("slow")})
    assert tuner.known("problem") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', "\xff", '{"format": 1, "chosen": 3}'])
def test_a_broken_file_is_written_anew(content, caplog):
    make_tuner()[0].choose("problem", candidates(*TIMES))
    (file,) = cache_folder().iterdir()
    file.write_text(content, encoding="latin-1")
    with caplog.at_level(logging.WARNING, logger="paca"):
        tuner, measured = make_tuner()
    assert "is unreadable" in caplog.text
    assert tuner.choose("problem", candidates(*TIMES)) == "fast"
    assert len(measured) == 3
    assert json.loads(file.read_text())["chosen"] == {"problem": "fast"}


def test_a_file_of_another_format_is_ignored():
    make_tuner()[0].choose("problem", candidates(*TIMES))
    (file,) = cache_folder().iterdir()
    file.write_text(json.dumps({"format": 0, "chosen": {"problem": "slow"}}))
    assert make_tuner()[0].known("problem") is None


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PACA_CACHE", str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING, logger="paca"):
        assert make_tuner()[0].choose("problem", candidates(*TIMES)) == "fast"
    assert "set PACA_CACHE" in caplog.text


def test_the_folder_is_named_by_the_environment(monkeypatch):
    monkeypatch.delenv("PACA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/paca"
    monkeypatch.setenv("PACA_CACHE", "/elsewhere")
    assert str(cache_folder()) == "/elsewhere"


@given(st.integers(1, 10**7))
def test_tokens_share_a_choice_up_to_the_next_power_of_two(tokens):
    size = power_of_two(tokens)
    assert size & (size - 1) == 0
    assert size // 2 < tokens <= size
    assert bucket(tokens) == size
