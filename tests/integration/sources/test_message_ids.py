"""Unordered sources: an id that was stored is not stored again, for as long as the window lasts."""

from collections import Counter
from typing import Any

import pytest

from phonon import LruCache, Process
from phonon.collection import Collection
from phonon.errors import AlreadyStoredError, ConfigurationError
from support.counted import Count, Visits
from support.world import Make, Redis, wait_until

Message = tuple[str, int]


def messages(first: int, last: int, keys: int = 20) -> list[Message]:
    return [(f"id-{n}", n * 7 % keys) for n in range(first, last)]


def expected(some: list[Message]) -> Counter[Any]:
    return Counter(key for _, key in some)


def take(process: Process, some: list[Message], cache: Any = None, window: float = 3600) -> None:
    with process.batch(some, dedupe="queue", window=window) as batch:
        for _, key in batch:
            if isinstance(cache, Collection):
                cache.add_many([{"key": key, "n": 1}])
                continue
            update = Count(process, key, doc={"n": 1})
            if cache is not None:
                cache.set(key, update)


def take_at_last(process: Process, some: list[Message], cache: Any = None) -> int:
    """Handle messages as often as they have to be. Returns how often that was."""
    for times in range(1, 5):
        try:
            take(process, some, cache)
        except AlreadyStoredError:
            continue
        return times
    raise AssertionError


@pytest.mark.parametrize("kind", ["", "cache", "model"])
def test_a_message_counts_once_however_it_comes(make: Make, kind: str) -> None:
    first, second = make(), make()
    caches: list[Any] = [None, None]
    if kind == "cache":
        caches = [LruCache(5), LruCache(5)]
    elif kind == "model":
        caches = [each.collect(Visits, 5) for each in (first, second)]
    some = messages(0, 200)
    take(first, some[:100] + some[:10], caches[0])  # twice in one batch
    take(first, some[50:120], caches[0])  # known here
    with pytest.raises(AlreadyStoredError, match="stored before by another delivery") as raised:
        take(second, some[90:150], caches[1])
    assert set(raised.value.ids) <= {each.encode() for each, _ in some[90:120]}
    assert take_at_last(second, some, caches[1]) <= 2
    assert take_at_last(first, some, caches[0]) <= 2
    for cache in caches:
        if cache is not None:
            cache.expire_all()
    first.stop()
    second.stop()
    assert Count.executed == expected(some)


@pytest.mark.parametrize("kind", ["cache", "model"])
def test_a_record_may_leave_and_come_back_within_a_batch(make: Make, kind: str) -> None:
    process = make()
    cache: Any = LruCache(3) if kind == "cache" else process.collect(Visits, 3)
    some = [(f"id-{n}", n * n % 7) for n in range(300)]
    for first in range(0, 300, 30):
        take(process, some[first : first + 30], cache)
    cache.expire_all()
    process.stop()
    assert Count.executed == expected(some)


def test_a_block_that_raises_leaves_its_messages_new(make: Make) -> None:
    process = make()
    some = messages(0, 50)
    with pytest.raises(RuntimeError), process.batch(some, dedupe="queue") as batch:
        for _, key in batch:
            Count(process, key, doc={"n": 1})
        raise RuntimeError
    take(process, some)
    process.stop()
    assert Count.executed == expected(some)


def test_ids_are_forgotten_after_the_window(make: Make, server: Redis) -> None:
    process, other = make(), make()
    some = messages(0, 20)
    take(process, some, window=1)
    with pytest.raises(AlreadyStoredError):
        take(other, some, window=1)

    def kept() -> int:
        with server.client() as client:
            names = client.scan_iter(match=f"{{{process.namespace}/*}}:ids:*", count=1000)
            return sum(client.scard(name) for name in names)

    assert kept() == 20
    wait_until(lambda: kept() == 0)
    third = make()
    take(third, some, window=1)
    for each in (process, other, third):
        each.stop()
    assert Count.executed == expected(some + some)


def test_ids_may_be_found_in_many_ways(make: Make) -> None:
    class Celery:
        def __init__(self, number: int) -> None:
            self.id = number

    process = make()
    many: dict[str, list[Any]] = {
        "a": [{"MessageId": "x"}, {"MessageId": "y"}],
        "b": [Celery(1), Celery(2)],
    }
    for dedupe, some in many.items():
        for _ in range(2):
            batch: Any
            with process.batch(some, dedupe=dedupe) as batch:
                for _message in batch:
                    Count(process, dedupe, doc={"n": 1})
    with process.batch([3, 4], dedupe="c", message_id=lambda n: n) as batch:
        for _message in batch:
            Count(process, "c", doc={"n": 1})
    process.stop()
    assert Count.executed == Counter(a=2, b=2, c=2)


def test_what_cannot_be_meant_is_refused(make: Make) -> None:
    process = make()
    for window in (0, "1", True):
        with pytest.raises(ConfigurationError, match="window is a number of seconds"):
            process.batch([], dedupe="x", window=window)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="dedupe is a str"):
        process.batch([], dedupe=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="a message's id is"):
        take(process, [("", 1)])
    with (
        pytest.raises(ConfigurationError, match="belongs to no message"),
        process.batch([], dedupe="x"),
    ):
        Count(process, 1, doc={"n": 1})
