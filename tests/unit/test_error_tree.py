"""The page of the errors is true: `phonon.errors` names those that there are, and no others."""

import re
from pathlib import Path

import phonon
from phonon import errors

SOURCES = Path(phonon.__file__).parent


def test_the_tree_shows_all_errors_and_their_bases() -> None:
    found = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PhononError)
    }
    shown = re.findall(r"^    ([│ ]*)(?:[├└]── )?(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert {name for _, name in shown} == set(found)
    parent = "PhononError"
    for indent, name in shown[1:]:
        parent = parent if indent else "PhononError"
        assert found[parent] in found[name].__bases__, name
        parent = parent if indent else name


def test_each_error_is_made_somewhere() -> None:
    text = "".join(path.read_text() for path in SOURCES.rglob("*.py") if path.name != "errors.py")
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.PhononError):
            assert re.search(rf"\b{name}\(|\braise {name}\b", text), name
