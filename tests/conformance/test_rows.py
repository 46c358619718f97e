"""Every row has a test that is named after it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

#: How many rows each part has.
ROWS = {"H": 25, "R": 10, "P": 36, "X": 6, "F": 13}


def _named() -> set[str]:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    return {row for name in re.findall(r"def test_(\w+)\(", source) for row in re.findall(r"[HRPXF]\d\d", name)}


@pytest.mark.parametrize("part", ROWS)
def test_every_row_has_a_test(part: str) -> None:
    assert {f"{part}{number:02}" for number in range(1, ROWS[part] + 1)} - _named() == set()
