"""The worker that `phonon init` writes is a whole program, exact when one of them is killed."""

import subprocess
import sys
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from phonon import embedded
from phonon.cli.app import phonon
from support.world import wait_until

MESSAGES = 5000


def test_it_leaves_a_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "worker.py"
    path.write_text("mine")
    ran = CliRunner().invoke(phonon, ["init", str(path)])
    assert ran.exit_code == 1
    assert "is there already: name another file" in ran.output
    assert path.read_text() == "mine"


def test_it_says_what_cannot_be_written(tmp_path: Path) -> None:
    ran = CliRunner().invoke(phonon, ["init", str(tmp_path / "none" / "worker.py")])
    assert (ran.exit_code, ran.output.count("\n")) == (1, 1)


@pytest.mark.slow
def test_the_table_is_exact_when_a_worker_is_killed(tmp_path: Path) -> None:
    ran = CliRunner().invoke(phonon, ["init", str(tmp_path / "worker.py")])
    assert ran.exit_code == 0, ran.output

    def start(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-W", "error", "worker.py", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE if arguments == ("show",) else None,
            text=True,
        )

    with embedded.start(tmp_path / "server") as server:
        assert start("produce", str(MESSAGES)).wait() == 0
        workers = [start(), start()]
        with redis.Redis(unix_socket_path=server.socket_path) as client:

            def is_acknowledged() -> bool:
                (group,) = client.xinfo_groups("messages")
                return bool(group["entries-read"] == MESSAGES and group["pending"] == 0)

            wait_until(lambda: client.xinfo_groups("messages"))
            wait_until(is_acknowledged)
            workers[0].kill()  # it may hold open sessions
            workers[0].wait()

            def total() -> int:
                shown, _ = start("show").communicate()
                return sum(int(line.split()[1]) for line in shown.splitlines())

            wait_until(lambda: (tmp_path / "counts.db").exists() and total() == MESSAGES)
            workers[1].terminate()
            assert workers[1].wait() == 0
        shown, _ = start("show").communicate()
    rows = dict(line.split() for line in shown.splitlines())
    assert rows == {f"key-{i:02}": str(MESSAGES // 100) for i in range(100)}
