"""Rules that every file of the project keeps."""

import re

import pytest
from project import ROOT, files

TEXT = {
    ".cfg",
    ".ini",
    ".json",
    ".jsonl",
    ".md",
    ".py",
    ".sh",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    ".Dockerfile",
    ".in",
    "",
}
LARGEST = 1_000_000  # bytes; weights and data come from their packages
LARGER = {"paca/parity/reference/parity.safetensors"}  # by its own test below 4 MB
# Cut in two, so that this file does not hold what it looks for.
UNWANTED = {
    "a path of one machine": r"(?<![\w.~)}<>$-])/(?:wo"
    + r"rk|tm"
    + r"p|ro"
    + r"ot|ho"
    + r"me|opt/(?:pyp"
    + r"i|whe"
    + r"els))\b",
    "something left for later": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
    "a merge left half done": r"^(?:<{7}|>{7}) ",
}
VAGUE = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}


def names(found):
    return sorted(str(file.relative_to(ROOT)) for file in found)


def test_the_project_has_files():
    assert {"pyproject.toml", "paca/__init__.py", "tests/packaging/test_files.py"} <= set(names(files()))


@pytest.mark.parametrize("what", UNWANTED)
def test_no_file_holds(what):
    pattern = re.compile(UNWANTED[what], re.MULTILINE)
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in files()
        if file.suffix in TEXT
        for match in pattern.finditer(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a path of one machine", "see /wo" + "rk/main/x"),
        ("a path of one machine", '"/tm' + 'p/run"'),
        ("a path of one machine", "(/ro" + "ot)"),
        ("something left for later", "# TO" + "DO: later"),
        ("a merge left half done", "<" * 7 + " HEAD"),
    ],
)
def test_the_patterns_find_what_they_are_for(what, text):
    assert re.search(UNWANTED[what], text, re.MULTILINE)


@pytest.mark.parametrize("text", ["docs/work", "../tmp", "the_root", "https://x.org/home", "a/b/tmp", "$HOME/work"])
def test_a_path_that_is_nobodys_is_allowed(text):
    assert not re.search(UNWANTED["a path of one machine"], text)


def test_no_file_is_a_symbolic_link():  # a checkout on Windows has none
    assert names(file for file in files() if file.is_symlink()) == []


def test_no_file_is_large():
    assert set(names(file for file in files() if file.stat().st_size > LARGEST)) == LARGER


def test_no_module_has_a_name_that_says_nothing():
    assert names(file for file in files() if file.name in VAGUE) == []


def test_every_package_of_the_library_says_what_it_is():
    modules = [
        file for file in files() if file.suffix == ".py" and file.relative_to(ROOT).parts[0] in ("paca", "backends")
    ]
    assert len(modules) > 10
    assert names(file for file in modules if not file.read_text(encoding="utf-8").startswith(('"""', 'r"""'))) == []


def test_the_guide_to_the_tests_names_every_folder_of_tests():
    guide = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    folders = {file.relative_to(ROOT).parts[1] for file in files() if file.relative_to(ROOT).parts[0] == "tests"}
    folders = {folder for folder in folders if (ROOT / "tests" / folder).is_dir()}
    assert "packaging" in folders
    assert {folder for folder in folders if f"| `{folder}/` |" not in guide} == set()
