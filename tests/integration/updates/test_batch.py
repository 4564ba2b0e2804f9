"""Batches: nothing before the block ends, everything after it, in one exchange."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from phonon import ConflictFreeUpdate, LruCache, Process
from phonon.errors import ConnectionLostError
from support.proxy import Proxy
from support.samples import fresh
from support.world import Make, Redis, wait_until


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.executed.clear()


class Count(ConflictFreeUpdate):
    executed: ClassVar[list[Any]] = []

    def execute(self) -> None:
        self.executed.append((self._id, self.doc["n"]))


def stored(process: Process, server: Redis) -> int:
    with server.client() as client:
        names = client.scan_iter(match=f"{{{process.namespace}/*}}:partials:*", count=1000)
        return sum(client.llen(name) for name in names)


def test_a_block_stores_at_its_end_one_partial_a_key(make: Make, server: Redis) -> None:
    process = make()
    cache: LruCache[Count] = LruCache()
    with process.batch():
        reference = process.create_reference("x")
        for i in range(1000):
            cache.set(i % 600, Count(process, i % 600, doc={"n": 1}))
        assert (stored(process, server), reference.count()) == (0, 0)
        with process.batch():
            cache.set("inner", Count(process, "inner", doc={"n": 1}, init_cache=False))
        assert stored(process, server) == 0
    assert (stored(process, server), reference.count()) == (601, 1)
    cache.expire_all()
    expected = [(i, 1 + (i < 400)) for i in range(600)]
    assert sorted(row for row in Count.executed if row[0] != "inner") == expected


def test_sessions_that_end_inside_end_with_the_block(make: Make) -> None:
    process = make()
    cache: LruCache[Count] = LruCache(max_entries=1)
    with process.batch():
        for key in "abc":
            cache.set(key, Count(process, key, doc={"n": 1}))
        assert Count.executed == []
    assert Count.executed == [("a", 1), ("b", 1)]


def test_a_reference_may_come_and_go_within_a_block(make: Make) -> None:
    process = make()
    with process.batch():
        assert process.create_reference("x").dereference()
    assert process.get_registry() == []


def test_a_batch_is_its_threads_own(make: Make, server: Redis) -> None:
    process = make()
    with process.batch():
        Count(process, 1, doc={"n": 1})
        thread = threading.Thread(target=Count, args=(process, 2), kwargs={"doc": {"n": 1}})
        thread.start()
        thread.join()
        assert stored(process, server) == 1
    assert stored(process, server) == 2


def test_a_block_that_stores_nothing_joins_together(make: Make, server: Redis) -> None:
    process, other = make(), make()
    cache: LruCache[Count] = LruCache()
    with process.batch(durable=False):
        for i in range(100):
            cache.set(i % 10, Count(process, i % 10, doc={"n": 1}, init_cache=False))
        Count(process, "kept", doc={"n": 5})
        assert other.create_reference("test.test.3").count() == 1
    assert stored(process, server) == 1
    assert other.create_reference("test.test.3").count() == 2
    cache.expire_all()
    other.create_reference("test.test.3").dereference()
    assert sorted(Count.executed) == [(i, 10) for i in range(10)]


def test_a_durable_block_inside_makes_the_outer_one_so(make: Make, server: Redis) -> None:
    process = make()
    with process.batch(durable=False), process.batch():
        Count(process, "a", doc={"n": 1}, init_cache=False)
    assert stored(process, server) == 1


def test_a_flush_whose_caller_has_gone_does_not_wait_for_itself(make: Make, server: Redis) -> None:
    kind = fresh()
    with contextlib.closing(Proxy(server.socket)) as proxy:
        process = make(url=proxy.url, retry_timeout=0.5)
        outbox = process.engine.outbox
        outbox.unsent.append(kind(process, "record", doc={"n": 1}, init_cache=False))
        with proxy.away(), pytest.raises(ConnectionLostError):
            process.flush()
        proxy.ignored = frozenset()
        proxy.plan()
        outbox.wake()
        wait_until(lambda: not outbox.detached)
        assert proxy.steps.count("processes") < 10
        process.stop()
    assert kind.docs() == {"record": {"n": 1}}
