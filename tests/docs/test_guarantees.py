"""Pages with a crash matrix name a test for every cell of it: they must be there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: The pages, and the headings of their matrices.
PAGES = {"guarantees.md": "## Every moment", "exactly-once.md": "## What each crash does"}


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_is_there(page: str) -> None:
    files: dict[str, str] = {}  # two folders may have a file of one name
    for path in ROOT.glob("tests/**/*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text_of(page))
    assert len(named) > 9
    missing = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in files.get(file, "")
    ]
    assert not missing


@pytest.mark.parametrize(("page", "heading"), PAGES.items())
def test_every_row_of_the_matrix_names_a_test(page: str, heading: str) -> None:
    matrix = text_of(page).partition(heading)[2].partition("\n## ")[0]
    rows = [row for row in matrix.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 9
    assert not [row for row in rows if "::" not in row and not row.endswith("| the same |")]
