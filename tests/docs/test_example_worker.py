"""``examples/worker.py`` is told to stop: it leaves in good order, whatever it is doing."""

import collections
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.proxy import Proxy
from support.world import Redis, key_of, wait_until

WORKER = Path(__file__).parents[2] / "examples" / "worker.py"
TIMEOUT = 60
SIGNALS = [signal.SIGTERM, signal.SIGINT]
LINES = [f"user{i % 90},/page{i % 7}\n" for i in range(5_000)]


class Example:
    """The example in a process of its own."""

    def __init__(self, url: str, database: Path) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-W", "error", str(WORKER), str(database)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PHONON_URL": url},
        )

    def feed(self, lines: list[str]) -> None:
        assert self.popen.stdin is not None
        # It may have stopped to read.
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write("".join(lines))
            self.popen.stdin.flush()

    def end(self, *, close: bool = True) -> tuple[int, str]:
        """Wait for its end. Returns the messages acknowledged and what it has said."""
        if close:
            _, said = self.popen.communicate(timeout=TIMEOUT)
        else:
            self.popen.wait(TIMEOUT)
            assert self.popen.stderr is not None
            said = self.popen.stderr.read()
            with contextlib.suppress(BrokenPipeError):
                self.popen.communicate()
        assert self.popen.returncode == 0, said
        assert "Traceback" not in said
        return int(said.splitlines()[-1].split()[0]), said


@pytest.fixture
def proxy(own_server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(own_server.socket)
    yield proxy
    proxy.close()


@pytest.fixture
def start(proxy: Proxy, tmp_path: Path) -> Iterator[Callable[[], Example]]:
    with contextlib.ExitStack() as stack:

        def begin() -> Example:
            example = Example(proxy.url, tmp_path / "views.db")
            stack.enter_context(example.popen)
            stack.callback(example.popen.kill)
            return example

        yield begin


def views(database: Path) -> dict[tuple[str, str], int]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT user, page, count FROM views").fetchall()
    return {(user, page): count for user, page, count in rows}


def counted(lines: list[str]) -> dict[tuple[str, str], int]:
    pairs = (line.strip().split(",") for line in lines)
    return dict(collections.Counter((user, page) for user, page in pairs))


def left_behind(server: Redis) -> list[bytes]:
    """Keys of all kinds, but for the number of partitions, and for tokens that expire."""
    with server.client() as client:
        found = [key for key in client.scan_iter(count=1000) if key != b"{phonon}:partitions"]
        return [key for key in found if not (key.endswith(b":token") and client.pttl(key) > 0)]


def is_there(server: Redis) -> bool:
    with server.client() as client:
        return bool(client.exists("{phonon}:processes"))


def partials(server: Redis) -> int:
    """Lists of messages that are stored, by the key that all of them have."""
    with server.client() as client:
        return int(client.llen(key_of("phonon", "partials", "test.test.user0")))


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_message(
    own_server: Redis, start: Callable[[], Example], tmp_path: Path, number: signal.Signals
) -> None:
    example = start()
    wait_until(lambda: is_there(own_server))
    example.popen.send_signal(number)
    acknowledged, said = example.end(close=False)
    assert acknowledged == 0
    assert "stopped: all sessions are ended" in said
    assert views(tmp_path / "views.db") == {}
    assert left_behind(own_server) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_waits_with_sessions_open(
    own_server: Redis, start: Callable[[], Example], tmp_path: Path, number: signal.Signals
) -> None:
    example = start()
    example.feed(LINES[:1_100])  # two lists, and the beginning of another
    wait_until(lambda: partials(own_server) == 2)
    example.popen.send_signal(number)
    acknowledged, _ = example.end(close=False)
    assert acknowledged == 1_000
    assert views(tmp_path / "views.db") == counted(LINES[:1_000])
    assert left_behind(own_server) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [0, 7, 15, 16, 40])
def test_in_the_middle_of_a_batch(
    own_server: Redis,
    proxy: Proxy,
    start: Callable[[], Example],
    tmp_path: Path,
    number: signal.Signals,
    at: int,
) -> None:
    """Each list of 500 messages is 16 calls. The signal comes with the answer to one of them."""
    example = start()
    appends = 0

    def signal_at(step: str) -> None:
        nonlocal appends
        if step == "append":
            if appends == at:
                example.popen.send_signal(number)
            appends += 1

    proxy.on_reply = signal_at
    example.feed(LINES)
    acknowledged, said = example.end(close=False)
    # The list in hand was finished.
    assert acknowledged in {500 * (at // 16 + 1), 500 * (at // 16 + 2)}
    assert "stopped: all sessions are ended" in said
    assert views(tmp_path / "views.db") == counted(LINES[:acknowledged])
    assert left_behind(own_server) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", ["leave", "complete", "unlist"])
def test_while_it_ends_its_sessions(
    own_server: Redis,
    proxy: Proxy,
    start: Callable[[], Example],
    tmp_path: Path,
    number: signal.Signals,
    step: str,
) -> None:
    example = start()
    seen: list[str] = []

    def signal_at(called: str) -> None:
        seen.append(called)
        if called == step:
            example.popen.send_signal(number)  # every time: more than one must not matter either

    proxy.on_reply = signal_at
    example.feed(LINES)
    acknowledged, _ = example.end()
    assert step in seen
    assert acknowledged == len(LINES)
    assert views(tmp_path / "views.db") == counted(LINES)
    assert left_behind(own_server) == []


def test_the_others_go_on(own_server: Redis, start: Callable[[], Example], tmp_path: Path) -> None:
    one, two = start(), start()
    one.feed(LINES[:1_000])
    two.feed(LINES[1_000:2_000])
    wait_until(lambda: partials(own_server) == 4)
    one.popen.send_signal(signal.SIGTERM)
    acknowledged, _ = one.end(close=False)
    assert acknowledged == 1_000
    # Its sessions have not ended: the other one holds them too, and answers for all of it.
    assert views(tmp_path / "views.db") == {}
    two.feed(LINES[2_000:])
    assert two.end()[0] == len(LINES) - 1_000
    assert views(tmp_path / "views.db") == counted(LINES)
    assert left_behind(own_server) == []
