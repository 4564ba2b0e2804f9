"""Type checkers know models: the constructor, ``add``, and the fields in ``on_complete``."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: What has to be reported is marked: WRONG.
PROGRAM = """\
from datetime import datetime
from typing import assert_type

from phonon import Model, Process
from phonon.aio import AsyncProcess
from phonon.fields import ID, Count, Counter, Latest, Mean, SetAppend, Stats, Sum, Summary, Window


class PageViews(Model, name="typed_page_views"):
    user: ID[str]
    views: Sum[int]
    pages: Counter[str] = Counter()
    seen: Latest[datetime] = Latest()
    recent: Window[str] = Window(2)
    kinds: SetAppend[str] = SetAppend()
    ratio: Mean[float] = Mean()
    times: Stats[float] = Stats()
    hits: Count = Count()

    def on_complete(self) -> None:
        assert_type(self.user, str)
        assert_type(self.views, int)
        assert_type(self.pages, dict[str, int])
        assert_type(self.seen, datetime | None)
        assert_type(self.recent, list[str])
        assert_type(self.kinds, set[str])
        assert_type(self.ratio, float | None)
        assert_type(self.times, Summary)
        assert_type(self.token, int | None)
        self.views + "1"  # WRONG
        self.vews  # WRONG


def use(process: Process, now: datetime) -> None:
    PageViews("ada", 1)
    PageViews(user="ada", views=1, pages={"/": 1}, seen=now, recent=(1, "/"), kinds={"a"})
    PageViews()  # WRONG
    PageViews("ada")  # WRONG
    PageViews(1, 1)  # WRONG
    PageViews("ada", views="1")  # WRONG
    PageViews("ada", 1, vews=1)  # WRONG
    PageViews("ada", 1, pages={1: 1})  # WRONG

    views = process.collect(PageViews, idle=30)
    views.add("ada", views=1, pages={"/": 1}, seen=now, ratio=0.5, times=1)
    views.add("ada", 1)
    views.add(views=1)  # WRONG
    views.add("ada")  # WRONG
    views.add("ada", views=None)  # WRONG
    views.add("ada", views=1, seen="now")  # WRONG
    views.add("ada", views=1, vews=1)  # WRONG
    record = views.get("ada")
    assert_type(record, PageViews | None)
    record.views  # WRONG
    process.collect(dict[str, int], idel=30)  # WRONG


async def use_tasks(process: AsyncProcess) -> None:
    views = process.collect(PageViews)
    await views.add("ada", views=1)
    await views.add("ada", views="1")  # WRONG
    assert_type(await views.read("ada"), PageViews | None)
"""


def lines_by_mypy(file: Path) -> set[int]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", ""]
    command += ["--cache-dir", os.devnull, "--no-error-summary", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parent)
    assert ran.returncode in {0, 1}, ran.stderr
    found = [line.split(":") for line in ran.stdout.splitlines() if ": error:" in line]
    assert {Path(name).name for name, *_ in found} <= {file.name}, ran.stdout
    return {int(line) for _, line, *_ in found}


def lines_by_pyright(file: Path) -> set[int]:
    (file.parent / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    ran = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, check=False, cwd=file.parent
    )
    assert ran.returncode in {0, 1}, ran.stderr
    found = json.loads(ran.stdout)["generalDiagnostics"]
    return {each["range"]["start"]["line"] + 1 for each in found if each["severity"] == "error"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "checker",
    [
        "mypy",
        pytest.param(
            "pyright",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("pyright") is None
                and "PHONON_TEST_SITE" not in os.environ,
                reason="needs phonon[docs]; `make docs` does not let it pass",
            ),
        ),
    ],
)
def test_a_checker_reports_what_is_wrong_and_nothing_else(checker: str, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    lines = PROGRAM.splitlines()
    reported = {"mypy": lines_by_mypy, "pyright": lines_by_pyright}[checker](file)
    marked = {number for number, line in enumerate(lines, 1) if "# WRONG" in line}
    assert {lines[number - 1] for number in reported ^ marked} == set()
