"""The page of errors quotes what the library says, and names its classes."""

import re
from pathlib import Path

import pytest

from phonon import errors

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(.+?)` \| (.+?) \| .+ \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))


def said() -> str:
    """Return all text of the library, with literals that are continued on the next line joined."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


SAID = said()


@pytest.mark.parametrize(("message", "kind"), ROWS)
def test_it_quotes_what_is_said(message: str, kind: str) -> None:
    assert message in SAID
    if kind.startswith("`"):
        assert issubclass(getattr(errors, kind.strip("`")), errors.PhononError)


def test_it_has_rows() -> None:
    assert len(ROWS) > 20
