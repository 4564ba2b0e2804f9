"""Sessions end by themselves: silent, old or large, without a message that makes them."""

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from phonon import ConflictFreeUpdate, LruCache, Model, Process
from phonon._core.sessions import SPREAD
from phonon.fields import ID, Count
from support.world import ALWAYS, Make, Redis, keys_in, wait_until


class Hits(Model, name="test_session_hits"):
    id: ID[str]
    hits: Count = Count()

    done: ClassVar[list[tuple[str, int]]] = []

    def on_complete(self) -> None:
        self.done.append((self.id, self.hits))


class Sums(ConflictFreeUpdate):
    done: ClassVar[list[tuple[Any, float]]] = []
    failing: ClassVar[bool] = False

    def execute(self) -> None:
        if self.failing:
            raise ZeroDivisionError
        self.done.append((self._id, time.monotonic()))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Hits.done.clear()
    Sums.done.clear()
    Sums.failing = False


def test_a_silent_session_ends(make: Make, server: Redis, namespace: str) -> None:
    process = make()
    hits = process.collect(Hits, idle=0.2)
    with process.batch():
        hits.add("a")
        hits.add("b")
    wait_until(lambda: len(Hits.done) == 2)
    assert len(hits) == 0
    wait_until(lambda: not keys_in(server, namespace))


def test_a_message_extends_a_silent_session(make: Make) -> None:
    process = make()
    hits = process.collect(Hits, idle=0.5)
    begun = time.monotonic()
    while time.monotonic() - begun < 1.2:
        hits.add("a")
    assert not Hits.done
    wait_until(lambda: Hits.done)


def test_a_session_that_is_silent_here_goes_on_elsewhere(make: Make) -> None:
    one, other = make(), make()
    here, there = one.collect(Hits, idle=0.2), other.collect(Hits)
    there.add("a")
    here.add("a")
    wait_until(lambda: len(here) == 0)
    assert not Hits.done, "the other process has not left"
    there.add("a")
    there.expire("a")
    assert Hits.done == [("a", 3)]


def test_a_long_session_ends_although_messages_come(make: Make) -> None:
    one, other = make(), make()
    here, there = one.collect(Hits, idle=60, longest=0.3), other.collect(Hits)
    there.add("a")
    begun = time.monotonic()
    while not Hits.done:
        here.add("a")
        assert time.monotonic() - begun < 10
    assert Hits.done[0][1] > 1, "it has what the other process had stored"


def test_a_large_session_ends(make: Make) -> None:
    process = make()
    hits = process.collect(Hits, largest=3)
    with process.batch():
        for _ in range(5):
            hits.add("a")
        hits.add("b")
        assert not Hits.done, "the block that has its data has not ended"
    wait_until(lambda: Hits.done)
    assert Hits.done == [("a", 5)]
    assert "b" in hits


def test_updates_end_by_themselves_as_well(make: Make) -> None:
    process = make()
    cache: LruCache[Sums] = LruCache()
    cache.set("soft", Sums(process, "soft", doc={"n": 1}, soft_session=0.2))
    cache.set("hard", Sums(process, "hard", doc={"n": 1}, hard_session=0.3))
    cache.set("stays", Sums(process, "stays", doc={"n": 1}))
    wait_until(lambda: len(Sums.done) == 2)
    assert list(cache._entries) == ["stays"]


def test_an_update_that_says_itself_when_it_is_over(make: Make) -> None:
    class Own(Sums):
        over: ClassVar[bool] = False

        def is_expired(self) -> bool:
            return self.over

    process = make()
    cache: LruCache[Own] = LruCache()
    cache.set("own", Own(process, "own", doc={"n": 1}, soft_session=0.05))
    cache.set("other", Sums(process, "other", doc={"n": 1}, soft_session=0.3))  # type: ignore[arg-type]
    wait_until(lambda: [key for key, _ in Sums.done] == ["other"])
    Own.over = True
    wait_until(lambda: len(Sums.done) == 2)


def test_ends_are_spread(make: Make) -> None:
    process = make()
    cache: LruCache[Sums] = LruCache()
    with process.batch():
        for i in range(300):
            cache.set(i, Sums(process, i, doc={"n": 1}, soft_session=2.0))
    deadlines = [cache.deadline(i) for i in range(300)]
    began = [cache._entries[i]._touched_ for i in range(300)]
    assert max(deadlines) - min(deadlines) > 0.5 * SPREAD * 2.0 + (max(began) - min(began))
    wait_until(lambda: len(Sums.done) == 300)
    late = {key: at for key, at in Sums.done if at < deadlines[int(key)]}
    assert late == {}, "these ended before their deadlines"


def test_there_is_one_worker_for_all_caches(make: Make) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    process = make()
    caches = [process.collect(Hits, idle=60) for _ in range(20)]
    for hits in caches:
        hits.add("a")
    names = [t.name for t in threading.enumerate() if t.ident not in before]
    assert sum(name.startswith("phonon-sessions") for name in names) == 1
    process.stop()
    wait_until(
        lambda: (
            not any(
                t.name.startswith(f"phonon-sessions-{process.id[:8]}")
                for t in threading.enumerate()
            )
        )
    )


def test_what_fails_in_the_background_is_told_and_tried_again(make: Make) -> None:
    errors: list[Exception] = []
    process = make(on_error=errors.append, retry=ALWAYS)
    cache: LruCache[Sums] = LruCache()
    Sums.failing = True
    cache.set("a", Sums(process, "a", doc={"n": 1}, soft_session=0.1))
    wait_until(lambda: errors)
    assert isinstance(errors[0], ZeroDivisionError)
    Sums.failing = False
    wait_until(lambda: Sums.done)


@pytest.mark.slow
def test_a_session_ends_once_the_server_is_back(own_server: Redis) -> None:
    with Process(url=own_server.url, retry_timeout=0.3) as process:
        hits = process.collect(Hits, idle=0.3)
        hits.add("a")
        own_server.pause()
        with pytest.raises(Exception, match="does not answer"):
            hits.add("a")
        time.sleep(0.6)  # its end is due while nothing answers
        own_server.go_on()
        wait_until(lambda: Hits.done)
        process.flush()
    assert sum(n for _, n in Hits.done) == 2


def test_a_dropped_cache_is_not_kept_alive(make: Make) -> None:
    process = make()
    cache: LruCache[Sums] | None = LruCache()
    assert cache is not None
    cache.set("a", Sums(process, "a", doc={"n": 1}, soft_session=60))
    known = cache.known
    cache = None
    gc.collect()
    assert known() is None
