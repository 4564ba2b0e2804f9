"""Batches of several threads, or none, that have an entry of one cache in common."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from phonon import ConflictFreeUpdate, LruCache, Process
from phonon.batch import MANY
from support.world import Make


class Count(ConflictFreeUpdate):
    totals: ClassVar[Counter[Any]] = Counter()

    def execute(self) -> None:
        self.totals[self._id] += self.doc["n"]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.totals.clear()


def stored(process: Process) -> int:
    """How much another process would find if this one died now."""
    identity = process.engine.identity
    found = 0
    for prefix in identity.partitions.prefixes:
        for name in process.client.scan_iter(match=prefix.decode() + "partials:*"):
            resource = name.decode().partition("partials:")[2]
            for partial in process.client.lrange(name, 0, -1):
                found += process.engine.codec.decode(resource, partial, "key").doc["n"]
    return found


def in_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_the_end_of_a_block_says_that_its_own_messages_are_stored(make: Make) -> None:
    """Though another thread's block is storing the same entry, and has not come to its end."""
    process, cache = make(), LruCache[Count]()
    cache.set("k", Count(process, "k", doc={"n": 1}, init_cache=False))

    def other() -> None:
        with process.batch():
            for _ in range(3):
                cache.set("k", Count(process, "k", doc={"n": 100}))
        assert stored(process) == 300
        with process.batch():
            cache.set("k", Count(process, "k", doc={"n": 100}, init_cache=False))
        assert stored(process) == 400

    with process.batch():
        cache.set("k", Count(process, "k", doc={"n": 10}))
        in_thread(other)
        cache.set("k", Count(process, "k", doc={"n": 10}))
    assert stored(process) == 421
    cache.expire_all()
    assert Count.totals == {"k": 421}


def test_an_update_from_before_the_block_is_stored_by_it(make: Make) -> None:
    process, cache = make(), LruCache[Count]()
    for _ in range(2):
        early = Count(process, "k", doc={"n": 1}, init_cache=False)
        with process.batch():
            cache.set("k", early)
        assert not early.has_unsent()
    assert stored(process) == 2


def test_a_block_that_stores_nothing_keeps_what_it_was_told_to(make: Make) -> None:
    process, cache = make(), LruCache[Count]()
    with process.batch(durable=False):
        cache.set("k", Count(process, "k", doc={"n": 1}, init_cache=False))
        cache.set("l", Count(process, "l", doc={"n": 5}, init_cache=False))
        cache.set("k", Count(process, "k", doc={"n": 10}))
        cache.set("k", Count(process, "k", doc={"n": 100}, init_cache=False))
    assert stored(process) == 111
    cache.expire_all()
    assert Count.totals == {"k": 111, "l": 5}


def test_many_messages_without_a_cache_are_merged_on_the_way(make: Make) -> None:
    process = make()
    kept = Count(process, "kept", doc={"n": 0}, init_cache=False)
    with process.batch() as batch:
        for n in range(10 * MANY):
            update = Count(process, n % 7, doc={"n": 1})
            if n == MANY // 2:
                kept = update
        assert len(batch.fresh) <= MANY + 8
        kept.doc["n"] += 1_000_000
    assert stored(process) == 10 * MANY + 1_000_000
    process.stop()
    assert sum(Count.totals.values()) == 10 * MANY + 1_000_000


def test_a_merge_that_fails_in_a_block_stores_nothing(make: Make) -> None:
    """Unless the error is caught inside: the block goes on without that message."""
    process, cache = make(), LruCache[Count]()
    with pytest.raises(TypeError, match="do not add up"), process.batch():
        cache.set("k", Count(process, "k", doc={"n": 1}))
        cache.set("k", Count(process, "k", doc={"n": "x"}))
    prefix = process.engine.identity.partitions.prefixes
    place, name = process.engine.members.place("test.test.k")
    assert process.client.llen(prefix[place] + b"partials:" + name) == 0
    with process.batch():
        cache.set("k", Count(process, "k", doc={"n": 1}))
        with pytest.raises(TypeError, match="do not add up"):
            cache.set("k", Count(process, "k", doc={"n": "x"}))
    assert process.client.llen(prefix[place] + b"partials:" + name) == 2
    process.client.flushdb()


def test_an_ended_entry_and_its_successor_in_one_block(make: Make) -> None:
    process, cache = make(), LruCache[Count](1)
    with process.batch():
        for n in range(6):
            cache.set(n % 2, Count(process, n % 2, doc={"n": 1}))
    cache.expire_all()
    assert Count.totals == {0: 3, 1: 3}
    assert process.get_registry() == []


def test_a_stop_inside_a_block_ends_it(make: Make) -> None:
    process, cache = make(), LruCache[Count]()
    with process.batch():
        cache.set("k", Count(process, "k", doc={"n": 1}))
        process.stop()
    assert Count.totals == {"k": 1}
