"""What docs/parity.md says was compared is what the committed reports say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from paca.parity.formats import name_of
from paca.parity.record import REFERENCE, read

DOCS = Path(__file__).parents[2] / "docs"
REPORTS = sorted((DOCS / "parity-result").glob("*.json"))


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_the_page_gives_the_counts_of_the_report(file):
    report = json.loads(file.read_text(encoding="utf-8"))
    findings = [finding for finding in report["findings"] if finding["backend"] == file.stem]
    counts = Counter(finding["status"] for finding in findings)
    dtypes = ", ".join(dict.fromkeys(finding["dtype"] for finding in findings))
    line = f"{file.stem}, {dtypes}, compared with the record of cpu"
    page = (DOCS / "parity.md").read_text(encoding="utf-8").splitlines()
    [found] = [text for text in page if text.startswith(line)]
    assert found.endswith(f": {counts['identical']} identical, {counts['within bound']} within bound")
    assert sum(counts.values()) == counts["identical"] + counts["within bound"]
    assert report["passed"]


def test_there_are_reports():
    assert {file.stem for file in REPORTS} >= {"cpu", "hpu-rehearsal", "cuda-interpreted"}


def test_the_page_gives_the_tolerances_of_the_shipped_record():
    tolerances = read(REFERENCE).tolerances
    allowed = {name_of(dtype): f"{tolerance.deltas:.2g}" for dtype, tolerance in tolerances.items()}
    line = f"deltas may differ by {allowed['float32']} of their size in float32, by {allowed['bfloat16']} in bfloat16"
    assert line in (DOCS / "parity.md").read_text(encoding="utf-8")
