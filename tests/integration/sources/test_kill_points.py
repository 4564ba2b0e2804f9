"""A reader that is killed at any point of a batch: what it has stored is passed over, no more."""

import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from phonon import ConflictFreeUpdate, Process
from phonon._transport import sync_io
from phonon.errors import AlreadyStoredError
from support.world import Redis, wait_until

#: A busy machine takes its time to start so many, or to form a group.
pytestmark = pytest.mark.timeout(180)

#: Which of the calls after the first batch is the last one, and how much of it is sent.
POINTS = [(call, part) for call in range(3) for part in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
MESSAGES = [(n, n * 7 % 40) for n in range(200)]


class Count(ConflictFreeUpdate, name="kill_points"):
    executed: ClassVar[dict[str, Counter[Any]]] = defaultdict(Counter)

    def execute(self) -> None:
        self.executed[self.process().namespace][self._id] += self.doc["n"]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.executed.clear()


def make(url: str, namespace: str) -> Process:
    return Process(url=url, namespace=namespace, partitions=8, heartbeat_interval=0.1)


def handle(process: Process, batch: Any) -> None:
    with batch as messages:
        for _, key in messages:
            Count(process, key, doc={"n": 1})


def read(process: Process, kind: str, first: int = 0) -> None:
    """Read all messages, from where the source stands."""
    source = process.source("s") if kind == "offsets" else None
    if source is not None:
        first = source.position() or 0
    for at in range(first, len(MESSAGES), 50):
        some = MESSAGES[at : at + 50]
        if source is not None:
            handle(process, source.batch(some))
            continue
        try:
            handle(process, process.batch(some, dedupe="q"))
        except AlreadyStoredError:
            handle(process, process.batch(some, dedupe="q"))


def die_at(url: str, namespace: str, kind: str, call: int, part: float) -> None:
    """Read until that call is sent, as far as that, and die."""
    process = make(url, namespace)
    source = process.source("s") if kind == "offsets" else None

    def batch(some: Any) -> Any:
        return source.batch(some) if source else process.batch(some, dedupe="q")

    handle(process, batch(MESSAGES[:50]))
    process.engine.heartbeat.stopping = True  # or its calls would count as well
    if process.engine.heartbeat.signal is not None:
        process.engine.heartbeat.signal.set()
    sent = [0]
    plain = sync_io.Connection.send

    def send(self: Any, data: bytes, deadline: float) -> None:
        if sent[0] == call:
            plain(self, data[: int(len(data) * part)], deadline)
            os.kill(os.getpid(), signal.SIGKILL)
        sent[0] += 1
        plain(self, data, deadline)

    sync_io.Connection.send = send  # type: ignore[method-assign]
    for at in range(50, len(MESSAGES), 50):
        handle(process, batch(MESSAGES[at : at + 50]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["offsets", "ids"])
def test_killed_at_any_point_of_a_batch(server: Redis, namespace: str, kind: str) -> None:
    children = {}
    for call, part in POINTS:
        name = f"{namespace}-{call}-{part}"
        pid = os.fork()
        if pid == 0:
            try:
                die_at(server.url, name, kind, call, part)
            finally:
                os._exit(1)
        children[pid] = name
    for pid in children:
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
    survivors = [make(server.url, name) for name in children.values()]
    try:
        for survivor in survivors:
            read(survivor, kind)
        for survivor in survivors:
            client, key = survivor.client, survivor.heartbeat_hash_name
            wait_until(lambda client=client, key=key: client.zcard(key) == 1)  # type: ignore[misc]
    finally:
        for survivor in survivors:
            survivor.stop()
    expected = Counter(key for _, key in MESSAGES)
    assert {name: Count.executed[name] for name in children.values()} == dict.fromkeys(
        children.values(), expected
    )
