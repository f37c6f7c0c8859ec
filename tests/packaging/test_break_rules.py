"""The defects that are planted to test the tests still fit the code."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_planted_defect_fits_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    import break_rules

    assert len(break_rules.BREAKS) > 15
    assert break_rules.unfit() == []
    sys.modules.pop("break_rules")
