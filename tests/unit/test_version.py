"""The version is in one place, and the demo has the same."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import phonon

ROOT = Path(__file__).parents[2]


def test_the_version_is_that_of_the_distribution() -> None:
    assert phonon.__version__ == version("phonon")


def test_the_demo_has_the_same_version_and_needs_it() -> None:
    project = tomllib.loads((ROOT / "demo" / "pyproject.toml").read_text())["project"]
    assert project["version"] == phonon.__version__
    assert project["dependencies"][0] == f"phonon[embedded,cli,sql]>={phonon.__version__}"
