"""A test that leaves something behind fails itself, and not the tests after it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CULPRITS = """
from phonon import Process

def test_leaves_a_process_running(server):
    test_leaves_a_process_running.process = Process(url=server.url, namespace="left")

def test_after_that(server):
    pass

def test_leaves_the_server_full(server):
    with server.client() as client:
        client.config_set("maxmemory", 1)

def test_leaves_the_server_paused(server):
    server.pause()

def test_leaves_the_server_dead(server):
    server.kill()

def test_after_all(server, process):
    assert process.create_reference("r").dereference()
"""


@pytest.mark.slow
def test_culprits_are_named_and_others_are_spared(tmp_path: Path) -> None:
    (tmp_path / "test_culprits.py").write_text(CULPRITS)
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options,
            "-rE",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    named = re.findall(r"^ERROR \S+::test_(\w+)", ran.stdout, re.MULTILINE)
    assert named == [
        "leaves_a_process_running",
        "leaves_the_server_full",
        "leaves_the_server_paused",
        "leaves_the_server_dead",
    ], ran.stdout + ran.stderr
    assert "6 passed, 4 errors" in ran.stdout
    assert "1 shared connections open: stop its processes" in ran.stdout
    for trouble in ("with a limit of its memory", "without an answer"):
        assert f"the test left the common server {trouble}" in ran.stdout
