"""The examples of README.md and docs/ are run, and print the output that stands there."""

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from support.world import Redis

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")

BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_example_prints_what_it_says(code: str, own_server: Redis, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", code]
    if "\ndef test_" in code:
        (tmp_path / "test_example.py").write_text(code, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    expected = [line.partition("#> ")[2] for line in code.splitlines() if "#> " in line]
    ran = subprocess.run(
        command,
        env=os.environ | {"PHONON_URL": own_server.url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    if "pytest" not in command:
        assert ran.stdout.splitlines() == expected


def test_there_is_an_example_for_each_job() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for job in ("**Guard.**", "**Count.**", "**Join.**", "**Aggregate.**"):
        after = readme.partition(job)[2]
        assert BLOCK.search(after.partition("\n**")[0] or after), f"{job} has no example"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_worker_example_writes_exact_totals(own_server: Redis, tmp_path: Path) -> None:
    database = tmp_path / "views.db"
    lines = [f"user{i % 7},/page{i % 3}" for i in range(1000)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(ROOT / "examples" / "worker.py"), str(database)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PHONON_URL": own_server.url},
            text=True,
        )
        for _ in range(2)
    ]
    for number, worker in enumerate(workers):
        assert worker.stdin
        worker.stdin.write("\n".join(lines[number::2]) + "\n")
    errors = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT user, page, count FROM views").fetchall()
    expected: dict[tuple[str, str], int] = {}
    for line in lines:
        user, page = line.split(",")
        expected[user, page] = expected.get((user, page), 0) + 1
    assert {(user, page): count for user, page, count in rows} == expected
