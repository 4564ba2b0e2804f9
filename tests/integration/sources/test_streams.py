"""Streams with consumer groups: entries that are delivered again count once."""

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import redis

from phonon import ConflictFreeUpdate, LruCache, Process, RetryPolicy
from phonon.errors import BacklogFullError, ConfigurationError, InvalidMessageError
from phonon.sources.streams import StreamEntry, StreamSource
from support import consumers
from support.counted import Count, Visits
from support.world import Make, Redis, wait_until


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


def test_a_message_that_its_model_refuses_is_poison(make: Make, namespace: str) -> None:
    process, stream = make(), f"{namespace}.stream"
    expected = fill(process, stream, 0, 10)
    process.client.xadd(stream, {"key": "a"})
    expected += fill(process, stream, 10, 20)
    visits = process.collect(Visits)
    poison: list[Exception] = []
    source = StreamSource(
        process, stream, "group", poll_timeout=0.02, sessions=visits,
        on_poison=lambda _, error: poison.append(error),
    )  # fmt: skip

    def handle(entry: StreamEntry) -> None:
        key = entry.fields[b"key"]
        visits.add(int(key) if key.isdigit() else key, n=1)  # type: ignore[arg-type]  # on purpose

    thread = threading.Thread(target=source.run, args=[handle])
    thread.start()
    wait_until(lambda: not thread.is_alive() or (poison and unread(process, stream) == 0))
    source.stop()
    thread.join(20)
    assert [type(error) for error in poison] == [InvalidMessageError]
    assert Count.executed == expected


class OfThree(Consumer):
    """Makes three updates of an entry, which mostly are in three partitions."""

    def handle(self, entry: StreamEntry) -> None:
        for key in range(3):
            self.count(100 * key + int(entry.fields[b"key"]))


def test_no_message_is_to_blame_for_a_full_server(
    own_server: Redis, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It refuses each partition, so the batch raises a group of errors."""
    stream, poison = f"{namespace}.stream", Counter[Any]()
    with Process(own_server.url, namespace=namespace) as process, own_server.client() as client:
        expected = fill(process, stream, 0, 60)
        client.xgroup_create(stream, "group", "0")
        client.config_set("maxmemory", 1)
        consumer = OfThree(process, stream, on_poison=lambda entry, _: poison.update([entry.id]))
        wait_until(lambda: consumer.error or poison or "raise its maxmemory" in caplog.text)
        client.config_set("maxmemory", 0)
        wait_until(lambda: consumer.error or unread(process, stream) == 0)
        consumer.stop()
        assert consumer.error is None
        assert not poison
    assert Count.executed == Counter(
        {100 * group + key: n for group in range(3) for key, n in expected.items()}
    )


def demoted(client: "redis.Redis", _stream: str, at: threading.Event) -> None:
    client.replicaof("127.0.0.1", "1")
    at.wait(20)
    client.replicaof("NO", "ONE")


def cut_as_it_makes_the_group(client: "redis.Redis", stream: str, at: threading.Event) -> None:
    client.xgroup_destroy(stream, "group")
    at.wait(20)


@pytest.mark.parametrize("happens", [demoted, cut_as_it_makes_the_group])
def test_the_loop_outlives(
    own_server: Redis,
    namespace: str,
    happens: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.WARNING, "phonon")
    stream, warned = f"{namespace}.stream", threading.Event()
    with Process(own_server.url, namespace=namespace) as process, own_server.client() as client:
        fill(process, stream, 0, 10)
        consumer = Consumer(process, stream)
        wait_until(lambda: client.xinfo_groups(stream) and unread(process, stream) == 0)
        make_group, cuts = process.client.xgroup_create, [redis.ConnectionError("cut")]

        def create(*arguments: Any, **options: Any) -> Any:
            if cuts:
                raise cuts.pop()
            return make_group(*arguments, **options)

        monkeypatch.setattr(process.client, "xgroup_create", create)
        happening = threading.Thread(target=happens, args=[client, stream, warned])
        happening.start()
        wait_until(lambda: consumer.error or "streams: " in caplog.text)
        warned.set()
        happening.join()
        fill(process, stream, 0, 10)
        wait_until(lambda: consumer.error or consumer.source.handled >= 20)
        consumer.stop()
        assert consumer.error is None
    assert set(Count.executed) == set(range(10))


def test_a_full_backlog_holds_the_source_up(make: Make, namespace: str) -> None:
    process, stream = make(), f"{namespace}.stream"
    expected = fill(process, stream, 0, 10)
    full = [BacklogFullError("full")]

    class Hasty(Consumer):
        def handle(self, entry: StreamEntry) -> None:
            if full:
                raise full.pop()
            super().handle(entry)

    consumer = Hasty(process, stream, on_poison=print)
    wait_until(lambda: consumer.error or consumer.source.handled > 10)
    wait_until(lambda: consumer.error or unread(process, stream) == 0)
    consumer.stop()
    assert consumer.error is None
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
