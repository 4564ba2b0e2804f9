"""Programs of users, started as they start them."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from support.world import Redis, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLE = "CREATE TABLE {name} ({key} TEXT PRIMARY KEY, n INTEGER, token INTEGER)"


class Program:
    """A program in a process group of its own, which is killed with all of its children.

    Args:
        command: The command.
        folder: Its working directory.
        environment: Variables to add to the environment.
        log: The file that gets its output.
    """

    def __init__(
        self, command: list[str], folder: Path, environment: dict[str, str], log: Path
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> int:
        """Have it end as its users do."""
        self.popen.send_signal(sign)
        try:
            return self.popen.wait(30)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not stop:\n{self.said()}") from None

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def children(self) -> list[int]:
        """Return the numbers of its child processes."""
        path = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children")
        with contextlib.suppress(OSError):
            return [int(number) for number in path.read_text().split()]
        return []

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


@contextlib.contextmanager
def program(
    module: str,
    *arguments: str,
    server: Redis,
    tmp_path: Path,
    folder: Path = EXAMPLES,
    **environment: str,
) -> Iterator[Program]:
    """Start a module of the interpreter's, or a program beside it."""
    first = (
        [sys.executable, module]
        if module.endswith(".py")
        else [str(Path(sys.executable).parent / module)]
    )
    started = Program(
        [*first, *arguments],
        folder,
        {"PHONON_URL": server.url, "BROKER_URL": broker_url(server)} | environment,
        tmp_path / f"{Path(module).stem}-{time.monotonic_ns()}.log",
    )
    try:
        yield started
    except BaseException:
        sys.stderr.write(started.said())
        raise
    finally:
        started.close()


def broker_url(server: Redis) -> str:
    """Return the server's URL as Celery writes it; its queues are in a database of their own."""
    return f"redis+socket://{server.socket}?virtual_host=2"


def new_table(path: Path, name: str, key: str) -> str:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(TABLE.format(name=name, key=key))
    return str(path)


def rows(path: str | Path, table: str) -> dict[str, int]:
    """Return the rows of a table."""
    with closing(sqlite3.connect(path, timeout=30)) as database:
        return {row[0]: row[1] for row in database.execute(f"SELECT * FROM {table}")}  # noqa: S608 - ours


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for_line(path: Path, count: int = 1) -> None:
    wait_until(lambda: len(lines_of(path)) >= count, 30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def is_up(port: int) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return True
        except OSError:
            return False

    return ask


def ask_until_all_have_answered(port: int, path: str, workers: int) -> int:
    """Return how many requests it took until so many workers have answered."""
    seen: set[str] = set()
    asked = 0
    while len(seen) < workers:
        seen.add(get(port, path))
        asked += 1
        assert asked < 2000
    return asked
