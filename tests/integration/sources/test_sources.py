"""Ordered sources: data and offsets in one step, whatever comes between."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from phonon import LruCache, Process
from phonon.collection import Collection
from phonon.errors import (
    ConfigurationError,
    ConnectionLostError,
    ForeignKeyError,
    SourceLostError,
)
from support.counted import Count, Visits
from support.proxy import Proxy
from support.world import Make, Redis, wait_until


class Message(NamedTuple):
    offset: int
    key: int


def messages(first: int, last: int, keys: int = 50) -> list[Message]:
    return [Message(offset, offset * 7 % keys) for offset in range(first, last)]


def expected(some: list[Message]) -> Counter[Any]:
    return Counter(message.key for message in some)


def take(process: Process, source: Any, some: list[Message], cache: Any = None) -> None:
    with source.batch(some) as batch:
        for message in batch:
            if isinstance(cache, Collection):
                cache.add(message.key, 1)
                continue
            update = Count(process, message.key, doc={"n": 1})
            if cache is not None:
                cache.set(message.key, update)


def cache_of(process: Process, kind: str) -> Any:
    if kind == "model":
        return process.collect(Visits, 20)
    return LruCache(20) if kind == "cache" else None


@pytest.mark.parametrize("kind", ["", "cache", "model"])
def test_messages_that_come_again_are_passed_over(make: Make, kind: str) -> None:
    process = make()
    cache = cache_of(process, kind)
    source = process.source("orders/1")
    assert source.position() is None
    some = messages(100, 1000)
    take(process, source, some[:500], cache)
    assert source.position() >= 100  # type: ignore[operator]
    take(process, source, some[100:], cache)
    source.claim()
    take(process, source, some, cache)
    if cache is not None:
        cache.expire_all()
    process.stop()
    assert Count.executed == expected(some)


def test_a_source_goes_on_where_it_was_in_another_process(make: Make) -> None:
    some = messages(0, 300)
    first = make()
    take(first, first.source("s"), some[:200])
    first.stop()
    second = make()
    source = second.source("s")
    assert 0 <= source.position() <= 200  # type: ignore[operator]
    take(second, source, some[source.position() :])
    second.stop()
    assert Count.executed == expected(some)


def test_a_consumer_that_lost_the_source_stores_nothing(make: Make) -> None:
    first, second = make(), make()
    some = messages(0, 200)
    old = first.source("s")
    take(first, old, some[:100])
    new = second.source("s")
    with pytest.raises(SourceLostError, match="'s' was claimed by another consumer"):
        take(first, old, some[100:])
    with pytest.raises(SourceLostError, match="in doubt"):
        old.position()
    take(second, new, some)
    first.stop()
    second.stop()
    assert Count.executed == expected(some)


def test_a_batch_that_is_refused_late_drops_nothing_of_the_next(make: Make, server: Redis) -> None:
    """Its flow goes on without its caller, who has begun again and has filled the same records."""
    with contextlib.closing(Proxy(server.socket)) as proxy:
        process, other = make(url=proxy.url, retry_timeout=0.3), make()
        some = messages(0, 100)
        cache = process.collect(Visits, 100)
        source = process.source("s")
        outbox = process.engine.outbox
        is_ready, outbox.is_ready = outbox.is_ready, lambda _: False
        with proxy.away(), pytest.raises(ConnectionLostError):
            take(process, source, some, cache)
        other.source("s")  # so the first batch is refused
        source.claim()
        with source.batch(some) as batch:
            for message in batch:
                cache.add(message.key, 1)
            outbox.is_ready = is_ready
            outbox.wake()
            wait_until(lambda: not outbox.detached)
        cache.expire_all()
        process.stop()
    assert Count.executed == expected(some)


@pytest.mark.parametrize("kind", ["", "cache", "model"])
def test_a_block_that_raises_stores_nothing_of_it(make: Make, kind: str) -> None:
    process = make()
    cache = cache_of(process, kind)
    source = process.source("s")
    some = messages(0, 200)

    def break_off() -> Iterator[Message]:
        yield from some[:150]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        take(process, source, break_off(), cache)  # type: ignore[arg-type]
    take(process, source, some, cache)
    if cache is not None:
        cache.expire_all()
    process.stop()
    assert Count.executed == expected(some)


def test_a_session_that_another_thread_ends_ends_with_the_block(make: Make) -> None:
    process, other = make(), make()
    cache: LruCache[Count] = LruCache(20)
    source = process.source("s")
    some = messages(0, 100, keys=5)
    with pytest.raises(RuntimeError), source.batch(some) as batch:
        for message in batch:
            cache.set(message.key, Count(process, message.key, doc={"n": 1}))
            if message.offset == 50:
                thread = threading.Thread(target=cache.expire_all)
                thread.start()
                thread.join()
        raise RuntimeError
    take(other, other.source("s"), some)
    other.stop()
    process.stop()
    assert Count.executed == expected(some)


def test_a_batch_of_many_records_is_stored_in_pieces(make: Make, namespace: str) -> None:
    process = make(partitions=2)
    source = process.source("s")
    some = [Message(offset, offset % 3000) for offset in range(6000)]
    with pytest.raises(RuntimeError), source.batch(some) as batch:
        for message in batch:
            Count(process, message.key, doc={"n": 1})
            if message.offset == 5500:
                raise RuntimeError
    assert 0 < source.position() < 5500  # type: ignore[operator]
    take(process, source, some)
    process.stop()
    assert Count.executed == expected(some)


def test_partitions_that_nothing_comes_for_move_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make()
    source = process.source("s")
    with source.batch(messages(0, 10, keys=1)) as batch:
        for message in batch:
            Count(process, message.key, doc={"n": 1})
    assert source.position() == 0
    monkeypatch.setattr("phonon._core.sources.MOVE_ON_AFTER", 0.0)
    with source.batch(messages(10, 20, keys=1)) as batch:
        for message in batch:
            Count(process, message.key, doc={"n": 1})
    assert source.position() == 20
    source.claim()
    assert source.position() == 20
    source.claim(5)
    assert source.position() == 5
    source.forget()
    source.claim()
    assert source.position() is None


def test_a_source_that_falls_silent_is_settled(make: Make) -> None:
    process = make()
    source = process.source("s")
    some = messages(0, 10, keys=1)
    take(process, source, some)
    assert source.position() == 0
    source.settle()
    assert source.position() == 10
    with pytest.raises(RuntimeError), source.batch(messages(10, 20, keys=1)):
        raise RuntimeError
    source.settle()
    make().source("s")
    assert source.position() == 10
    take(process, make().source("s"), messages(10, 20, keys=1))
    with pytest.raises(SourceLostError):
        take(process, source, messages(10, 20, keys=1))


def test_of_two_batches_at_once_one_is_refused(make: Make) -> None:
    """Two threads were given the same messages: each of them counts once."""
    process = make()
    source = process.source("s")
    some = messages(0, 20, keys=5)
    read, stored = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def take_later() -> None:
        try:
            with source.batch(some) as batch:
                for message in batch:
                    Count(process, message.key, doc={"n": 1})
                read.set()
                assert stored.wait(30)
        except SourceLostError as error:
            errors.append(error)

    thread = threading.Thread(target=take_later)
    thread.start()
    assert read.wait(30)
    take(process, source, some[:10])
    stored.set()
    thread.join()
    assert len(errors) == 1
    source.claim()
    take(process, source, some)
    process.stop()
    assert Count.executed == expected(some)


def test_what_cannot_be_meant_is_refused(make: Make) -> None:
    process = make()
    source = process.source("s")
    with pytest.raises(ValueError, match="growing order"):
        take(process, source, [Message(1, 1), Message(1, 1)])
    with pytest.raises(ConfigurationError, match="belongs to no message"), source.batch([]):
        Count(process, 1, doc={"n": 1})
    with pytest.raises(TypeError, match="an offset is an int"):
        take(process, source, [Message("1", 1)])  # type: ignore[arg-type]
    for position in ("1", -1, True):
        with pytest.raises(ConfigurationError, match="position is an offset"):
            process.source("s", position)  # type: ignore[arg-type]
    process.stop()
    assert not Count.executed


def test_a_key_of_a_foreign_type_holds_nothing_up(make: Make, server: Redis) -> None:
    errors: list[Exception] = []
    process = make(on_error=errors.append)
    source = process.source("s")
    with server.client() as client:
        partition, name = process.engine.members.place("test.test.7")
        prefix = process.engine.identity.partitions.prefixes[partition]
        client.set(prefix + b"partials:" + name, "foreign")
        some = messages(0, 100, keys=10)
        take(process, source, some)
        assert [type(error) for error in errors] == [ForeignKeyError]
        client.delete(prefix + b"partials:" + name)
    (parked,) = process.parked()
    assert "holds a string" in parked.error
    process.replay(parked.resource, parked.token)
    process.stop()
    assert Count.executed == expected(some)
