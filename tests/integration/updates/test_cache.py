"""The local cache: merges what it is given, ends the session of what it drops."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from phonon import ConflictFreeUpdate, LruCache
from phonon.errors import NotStorableError
from support.world import Make


class Count(ConflictFreeUpdate):
    totals: ClassVar[Counter[Any]] = Counter()
    writes: ClassVar[list[Any]] = []
    failing: ClassVar[set[Any]] = set()
    lock: ClassVar[threading.Lock] = threading.Lock()

    def execute(self) -> None:
        if self._id in self.failing:
            raise ZeroDivisionError(self._id)
        with self.lock:
            self.writes.append(self._id)
            self.totals[self._id] += self.doc["n"]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.totals.clear()
    Count.writes.clear()
    Count.failing.clear()


def test_set_tells_what_became_of_the_update(make: Make) -> None:
    process = make()
    cache: LruCache[Count] = LruCache(max_entries=2)
    first = Count(process, "a", doc={"n": 1})
    assert cache.set("a", first) is True
    assert cache.set("a", Count(process, "a", doc={"n": 2})) is False
    assert cache.get("a") is first
    assert cache.set("b", Count(process, "b", doc={"n": 4}, soft_session=0)) is True
    assert cache.set("b", Count(process, "b", doc={"n": 8})) is None, "its session was over"
    assert cache.size() == len(cache) == 1
    assert Count.totals == {"b": 12}
    cache.set("c", Count(process, "c", doc={"n": 1}))
    cache.get("a")
    cache.set("d", Count(process, "d", doc={"n": 1}))
    assert "c" not in cache, "the least recently used went"
    assert Count.totals == {"b": 12, "c": 1}
    cache.expire_oldest()
    assert Count.totals == {"a": 3, "b": 12, "c": 1}
    with pytest.raises(KeyError):
        cache.expire("a")
    with pytest.raises(KeyError):
        cache.get("a")


def test_expired_entries_go_by_get_and_purge(make: Make) -> None:
    process = make()
    cache: LruCache[Count] = LruCache()
    for key in "abc":
        cache.set(key, Count(process, key, doc={"n": 1}, soft_session=0 if key != "c" else 60))
    assert cache.get("a") is None
    cache.purge()
    assert Count.totals == {"a": 1, "b": 1}
    assert cache.size() == 1
    cache.expire_all()
    assert Count.totals == {"a": 1, "b": 1, "c": 1}


def test_failures_do_not_stop_the_others(make: Make) -> None:
    process = make()
    cache: LruCache[Count] = LruCache()
    for n in range(20):
        cache.set(n, Count(process, n, doc={"n": 1}, init_cache=False))
    Count.failing |= {3, 7}
    with pytest.raises(ZeroDivisionError):
        cache.expire(3)
    failed = cache.get_last_failed()
    assert failed is not None
    assert failed._id == 3
    with pytest.raises(ExceptionGroup) as raised:
        cache.expire_all()
    assert [str(error) for error in raised.value.exceptions] == ["7"]
    assert sorted(Count.writes) == [n for n in range(20) if n not in {3, 7}]
    assert cache.size() == 0
    Count.failing.clear()
    process.stop()
    assert sorted(Count.writes) == list(range(20)), "what had failed was kept"


def test_what_cannot_be_sent_stays(make: Make) -> None:
    cache: LruCache[Count] = LruCache()
    update = Count(make(), "a", doc={"n": 1}, init_cache=False)
    cache.set("a", update)
    update.doc["bad"] = object()
    with pytest.raises(NotStorableError, match=r"doc\['bad'\]"):
        cache.expire("a")
    assert cache.get_last_failed() is update
    del update.doc["bad"]
    cache.expire_all()
    assert Count.totals == {"a": 1}


class Duck:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def refresh(self, _other: Any) -> None:
        self.calls.append("refresh")

    def is_expired(self) -> bool:
        return False

    def end_session(self) -> None:
        self.calls.append("end")
        raise ZeroDivisionError


def test_anything_that_quacks_may_be_cached() -> None:
    cache: LruCache[Duck] = LruCache(max_entries=1)
    duck = Duck()
    cache.set(1, duck)
    assert cache.set(1, Duck()) is False
    with pytest.raises(ZeroDivisionError):
        cache.set(2, Duck())
    assert duck.calls == ["refresh", "end"]
    assert cache.get_last_failed() is duck
    with pytest.raises(ValueError, match="at least 1"):
        LruCache(max_entries=0)


@pytest.mark.parametrize("batched", [False, True])
def test_many_threads_one_cache_exact_totals(make: Make, *, batched: bool) -> None:
    process = make()
    cache: LruCache[Count] = LruCache(max_entries=7)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for start in range(0, 400, 50):
                if batched:
                    with process.batch():
                        put(number, start)
                else:
                    put(number, start)
        except BaseException as error:  # noqa: BLE001 - the test fails on any
            errors.append(error)

    def put(number: int, start: int) -> None:
        for i in range(start, start + 50):
            key = (i * 7 + number) % 20
            cache.set(key, Count(process, key, doc={"n": 1}, init_cache=False))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    cache.expire_all()
    expected = Counter((i * 7 + number) % 20 for number in range(8) for i in range(400))
    assert expected == Count.totals
