"""docs/guarantees.md names a test for every cell of its crash matrix: they must be there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guarantees.md"


def test_every_test_that_is_named_is_there() -> None:
    files: dict[str, str] = {}  # two folders may have a file of one name
    for path in ROOT.glob("tests/**/*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 10
    missing = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in files.get(file, "")
    ]
    assert not missing


def test_every_row_of_the_matrix_names_a_test() -> None:
    text = PAGE.read_text(encoding="utf-8")
    matrix = text.partition("## Every moment")[2].partition("\n## ")[0]
    rows = [row for row in matrix.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 10
    assert not [row for row in rows if "::" not in row]
