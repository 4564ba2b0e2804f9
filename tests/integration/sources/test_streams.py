"""Streams with consumer groups: entries that are delivered again count once."""

import contextlib
from collections import Counter
from typing import Any, ClassVar

import pytest

from phonon import ConflictFreeUpdate, LruCache, Process, RetryPolicy
from phonon.errors import ConfigurationError
from phonon.sources.streams import StreamEntry, StreamSource
from support import consumers
from support.counted import Count
from support.world import Make, wait_until


class Consumer(consumers.Consumer):
    """A loop in a thread."""

    def __init__(self, process: Process, stream: str, **options: Any) -> None:
        options.setdefault("poll_timeout", 0.02)
        super().__init__(process, StreamSource, stream, "group", **options)

    def handle(self, entry: StreamEntry) -> None:
        self.count(int(entry.fields[b"key"]))


def fill(process: Process, stream: str, first: int, last: int) -> Counter[Any]:
    for n in range(first, last):
        process.client.xadd(stream, {"key": n % 30})
    return Counter(n % 30 for n in range(first, last))


def unread(process: Process, stream: str) -> int:
    """Return how many entries are not acknowledged. The group is made by the first consumer."""
    groups: Any = process.client.xinfo_groups(stream)
    if not groups:
        return int(process.client.xlen(stream))
    return int(groups[0]["pending"]) + int(groups[0]["lag"] or 0)


def test_entries_are_shared_and_those_of_a_dead_consumer_taken_over(
    make: Make, namespace: str
) -> None:
    process, stream = make(), f"{namespace}.stream"
    client = process.client
    expected = fill(process, stream, 0, 300)
    client.xgroup_create(stream, "group", "0")
    # One that has stored what it was given, and died before it could acknowledge.
    dead = make()
    found: Any = client.xreadgroup("group", "dead", {stream: ">"}, count=100)
    ((_, entries),) = found.items() if isinstance(found, dict) else found
    scope = f"stream/group/{stream}"
    with dead.batch(entries[:60], dedupe=scope) as batch:
        for _, fields in batch:
            Count(dead, int(fields[b"key"]), doc={"n": 1})
    both = [Consumer(make(), stream, claim_idle=0.2) for _ in range(2)]
    expected += fill(process, stream, 300, 500)
    wait_until(lambda: unread(process, stream) == 0)
    listed = both[0].process.engine.sources.listed
    wait_until(lambda: listed() == [(scope, "ids", "", 0)])
    for consumer in both:
        consumer.stop()
        assert consumer.error is None
        consumer.process.stop()
    dead.stop()
    assert Count.executed == expected
    # On a busy machine they take over each other's, too.
    assert sum(consumer.source.received for consumer in both) >= 500
    left: Any = client.xinfo_consumers(stream, "group")
    assert [consumer["name"] for consumer in left] in ([], [b"dead"])


def test_poison_entries_go_to_a_stream_of_their_own(make: Make, namespace: str) -> None:
    process, stream = make(), f"{namespace}.stream"
    expected = fill(process, stream, 0, 50)
    for key in ("a", "b"):
        process.client.xadd(stream, {"key": key})
    expected += fill(process, stream, 50, 100)
    consumer = Consumer(make(), stream, dead_letters=f"{stream}.dead")
    wait_until(lambda: process.client.xlen(f"{stream}.dead") == 2)
    wait_until(lambda: consumer.source.handled >= 100)
    consumer.stop()
    assert consumer.error is None
    dead: Any = process.client.xrange(f"{stream}.dead")
    assert [fields[b"key"] for _, fields in dead] == [b"a", b"b"]
    assert b"ValueError: invalid literal" in dead[0][1][b"phonon-error"]
    assert Count.executed == expected


def test_a_poison_entry_that_nobody_wants_stops_the_loop(make: Make, namespace: str) -> None:
    process, stream = make(), f"{namespace}.stream"
    expected = fill(process, stream, 0, 10)
    process.client.xadd(stream, {"key": "a"})
    consumer = Consumer(process, stream)
    consumer.thread.join(20)
    assert isinstance(consumer.error, ValueError)
    assert "give it an on_poison" in consumer.error.__notes__[0]
    consumer.cache.expire_all()
    assert Count.executed == expected


def test_what_cannot_be_meant_is_refused(make: Make) -> None:
    process = make()
    with pytest.raises(ConfigurationError, match="window must be longer"):
        StreamSource(process, "s", "g", window=30)
    with pytest.raises(ConfigurationError, match="not both"):
        StreamSource(process, "s", "g", dead_letters="d", on_poison=print)
    with pytest.raises(ConfigurationError, match="streams is a name"):
        StreamSource(process, [], "g")


class Refused(ConflictFreeUpdate):
    """A record whose database is away at first."""

    attempts: ClassVar[Counter[Any]] = Counter()
    written: ClassVar[Counter[Any]] = Counter()

    def execute(self) -> None:
        self.attempts[self._id] += 1
        if self.attempts[self._id] < 3:
            raise OSError("the database is away")
        self.written[self._id] += self.doc["n"]


def test_no_message_is_to_blame_when_the_database_is_away(make: Make, namespace: str) -> None:
    """Sessions that make room for others end with the batch, and their data is stored by then."""
    process = make(retry=RetryPolicy(attempts=100, first_delay=0.01, longest_delay=0.02))
    stream = f"{namespace}.stream"
    expected = fill(process, stream, 0, 60)
    poison: list[Any] = []

    class Small(Consumer):
        def __init__(self) -> None:
            self.small: LruCache[Refused] = LruCache(2)
            super().__init__(process, stream, on_poison=lambda *told: poison.append(told))

        def handle(self, entry: StreamEntry) -> None:
            key = int(entry.fields[b"key"])
            self.small.set(key, Refused(process, key, doc={"n": 1}))

    consumer = Small()
    wait_until(lambda: unread(process, stream) == 0 and Refused.attempts)
    consumer.stop()
    assert consumer.error is None
    with contextlib.suppress(OSError, ExceptionGroup):
        consumer.small.expire_all()
    wait_until(lambda: Refused.written == expected)
    assert poison == []
