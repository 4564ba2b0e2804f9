"""Connections that break, and servers that go: every call takes effect exactly once."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import phonon._core.engine
from phonon import LruCache, Process, RetryPolicy, Update
from phonon.errors import ConnectionLostError, LockLostError
from support.proxy import OF_HEARTBEATS, Fault, Proxy, nothing
from support.world import Make, Redis, is_settled, key_for, keys_in, wait_until

Keys = Callable[[], set[str]]
#: So long that a test sees no heartbeat but those it makes.
NO_BEAT = 50
SOON = RetryPolicy(first_delay=0.01)
#: Seconds for which nobody waits long.
BRIEF = 0.1
#: More than come along with a batch: the rest is fetched.
MANY = 130


@pytest.fixture
def proxy(server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(server.socket)
    yield proxy
    proxy.close()


class Sink:
    """A database that believes all it is told: what is written twice shows."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        with self.connect() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS written (record TEXT, token INTEGER, total INTEGER)"
            )

    def connect(self) -> "closing[sqlite3.Connection]":
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        connection.execute("PRAGMA synchronous = OFF")
        return closing(connection)

    def totals(self) -> dict[str, int]:
        with self.connect() as connection:
            rows = connection.execute("SELECT record, sum(total) FROM written GROUP BY record")
            return dict(rows.fetchall())

    def total(self, record: str) -> int:
        return self.totals().get(record, 0)

    def writes(self, record: str) -> int:
        with self.connect() as connection:
            rows = connection.execute("SELECT count(*) FROM written WHERE record = ?", (record,))
            return int(rows.fetchone()[0])


@pytest.fixture
def sink(tmp_path: Path) -> Sink:
    return Sink(tmp_path / "sink")


class Total(Update):
    """Adds up numbers. Its database is the path of a `Sink`."""

    def __init__(self, process: Process, record: str, sink: Sink, n: int, **options: Any) -> None:
        super().__init__(process, record, database=sink.path, doc={"n": n}, **options)

    def merge(self, other: Any) -> None:
        self.doc = {"n": self.doc.get("n", 0) + other.doc.get("n", 0)}

    def execute(self) -> None:
        with Sink.connect(self) as connection:  # type: ignore[arg-type]
            connection.execute(
                "INSERT INTO written VALUES (?, ?, ?)", (self._id, self.token, self.doc["n"])
            )

    @property
    def path(self) -> str:
        return self.database


@dataclass
class World:
    """The server, the processes and the database of a scene."""

    make: Make
    proxy: Proxy
    sink: Sink
    keys_left: Keys
    process: Process = field(init=False)
    other: Process = field(init=False)
    name: str = ""
    gone: bool = False

    def __post_init__(self) -> None:
        #: It talks through the proxy; the other one does not.
        self.process = self.made()
        self.other = self.make(heartbeat_interval=NO_BEAT, retry=SOON)

    def made(self, **options: Any) -> Process:
        options.setdefault("heartbeat_interval", NO_BEAT)
        return self.make(url=self.proxy.url, retry=SOON, **options)

    def clean(self) -> bool:
        """Return whether nothing is left of the resources."""
        return not self.keys_left()

    def strike(self, fault: Fault, at: int = 0) -> None:
        """Have a fault befall a request, and the server gone from then on; nobody waits long."""
        self.process.engine.driver.retry_timeout = BRIEF
        self.proxy.strike(fault, at, gone=True)

    def strike_step(self, fault: Fault, step: str) -> None:
        self.process.engine.driver.retry_timeout = BRIEF
        self.proxy.strike_step(fault, step, gone=True)

    def back(self) -> None:
        """The server is there again, and may be slow."""
        self.process.engine.driver.retry_timeout = 20.0
        self.proxy.back()

    @contextmanager
    def lost(self) -> Iterator[None]:
        """Of what happens in the block no answer may come, if the server is gone."""
        try:
            yield
        except* ConnectionLostError:
            if not self.gone:
                raise

    def update(self, n: int, process: Process | None = None, **options: Any) -> Total:
        return Total(process or self.process, self.name, self.sink, n, **options)


@pytest.fixture
def world(proxy: Proxy, make: Make, sink: Sink, keys: Keys) -> World:
    return World(make, proxy, sink, keys)


# Scenes: what comes before the first yield prepares, what comes between the two is struck by a
# fault, and what comes after looks at the effect.

Scene = Generator[None, None, None]
SCENES: dict[str, Callable[[World], Scene]] = {}
#: Those whose calls go on by themselves when the server has been gone for too long.
KEPT: set[str] = set()


def scene(function: Callable[[World], Scene]) -> Callable[[World], Scene]:
    SCENES[function.__name__] = function
    return function


def kept(function: Callable[[World], Scene]) -> Callable[[World], Scene]:
    KEPT.add(function.__name__)
    return scene(function)


@scene
def create_reference(world: World) -> Scene:
    yield
    reference = world.process.create_reference(world.name)
    yield
    assert reference.count() == 1
    assert reference.dereference()


@scene
def refresh_session(world: World) -> Scene:
    reference = world.process.create_reference(world.name)
    yield
    reference.refresh_session()
    yield
    assert reference.count() == 1
    assert reference.dereference()


@kept
def increment_times_modified(world: World) -> Scene:
    reference = world.process.create_reference(world.name)
    yield
    with world.lost():
        reference.increment_times_modified()
    yield
    assert reference.modified_by() == {world.process.id: 1}
    assert reference.dereference()


@scene
def reads(world: World) -> Scene:
    reference = world.process.create_reference(world.name)
    yield
    assert reference.count() == 1
    assert reference.get_times_modified() == 0
    assert [holder.id for holder in reference.holders()] == [world.process.id]
    assert world.name in world.process.get_registry()
    yield
    assert reference.dereference()


@kept
def dereference(world: World) -> Scene:
    mine = world.process.create_reference(world.name)
    its = world.other.create_reference(world.name)
    yield
    with world.lost():
        assert not mine.dereference()
    yield
    assert its.count() == 1
    assert its.dereference()


@kept
def dereference_as_the_last(world: World) -> Scene:
    mine = world.process.create_reference(world.name)
    its = world.other.create_reference(world.name)
    assert not its.dereference()
    yield
    with world.lost():
        assert mine.dereference()
    yield
    assert mine.count() == 0


@scene
def dereference_with_a_callback(world: World) -> Scene:
    mine = world.process.create_reference(world.name)
    mine.increment_times_modified()
    seen = []
    yield
    assert mine.dereference(lambda: seen.append(mine.get_times_modified()))
    yield
    assert seen == [1]


@scene
def dereference_with_a_callback_that_raises(world: World) -> Scene:
    mine = world.process.create_reference(world.name)
    mine.increment_times_modified()
    yield
    with pytest.raises(ZeroDivisionError):
        mine.dereference(lambda: 1 // 0)
    yield
    assert mine.count() == 1
    assert mine.get_times_modified() == 1
    assert mine.dereference()


@kept
def dereference_with_partials(world: World) -> Scene:
    update = world.update(2)
    yield
    with world.lost():
        assert update.ref.dereference()
    yield
    assert world.sink.total(world.name) == 2


@scene
def update(world: World) -> Scene:
    yield
    update = world.update(3)
    yield
    update.end_session()
    assert world.sink.total(world.name) == 3


@kept
def cache(world: World) -> Scene:
    update = world.update(3, init_cache=False)
    yield
    with world.lost():
        update.cache()
    yield
    update.end_session()
    assert world.sink.total(world.name) == 3


@kept
def end_session(world: World) -> Scene:
    update = world.update(3)
    its = world.update(4, world.other)
    update.refresh(world.update(5, init_cache=False))
    yield
    with world.lost():
        update.end_session()
    yield
    assert world.sink.writes(world.name) == 0
    its.end_session()
    assert world.sink.total(world.name) == 12


@kept
def end_session_as_the_last(world: World) -> Scene:
    update = world.update(3)
    world.update(4, world.other).end_session()
    update.refresh(world.update(5, init_cache=False))
    yield
    with world.lost():
        update.end_session()
    yield
    assert world.sink.total(world.name) == 12
    assert world.sink.writes(world.name) == 1


@kept
def end_session_with_many_partials(world: World) -> Scene:
    class Apart(Total, name=f"apart in {world.name}"):
        """Is not merged on the way."""

        def merge(self, other: Any) -> None:
            if not ending:
                raise ZeroDivisionError
            super().merge(other)

    ending = False
    its = Apart(world.other, world.name, world.sink, 1)
    for _ in range(MANY - 1):
        its.doc = {"n": 1}
        its.cache()
    update = Apart(world.process, world.name, world.sink, 1)
    its.end_session()
    yield
    ending = True
    with world.lost():
        update.end_session()
    yield
    wait_until(lambda: world.sink.writes(world.name))
    assert world.sink.total(world.name) == MANY + 1
    assert world.sink.writes(world.name) == 1


@kept
def end_session_while_a_batch_runs(world: World) -> Scene:
    """The owner of the running batch goes on with the next session's."""

    class Interrupted(Total, name=f"interrupted in {world.name}"):
        def execute(self) -> None:
            super().execute()
            if not arrived:
                arrived.append(Interrupted(world.other, world.name, world.sink, 10))
                arrived[0].end_session()

    arrived: list[Total] = []
    update = Interrupted(world.process, world.name, world.sink, 1)
    yield
    with world.lost():
        update.end_session()
    yield
    assert world.sink.total(world.name) == 11
    assert world.sink.writes(world.name) == 2


@scene
def end_session_that_fails(world: World) -> Scene:
    class Failing(Total, name=f"failing in {world.name}"):
        def execute(self) -> None:
            if not failed:
                failed.append(True)
                raise ZeroDivisionError
            super().execute()

    failed: list[bool] = []
    update = Failing(world.process, world.name, world.sink, 1)
    yield
    with pytest.raises(ZeroDivisionError):
        update.end_session()
    wait_until(lambda: world.sink.writes(world.name))
    wait_until(lambda: "complete" in world.proxy.steps)
    yield
    world.process.create_reference(update.resource_id).dereference()  # after the batch is done
    assert world.sink.total(world.name) == 1
    assert world.sink.writes(world.name) == 1


@kept
def expire_all(world: World) -> Scene:
    cache: LruCache[Total] = LruCache()
    names = [f"{world.name}-{i}" for i in range(4)]
    for name in names * 2:
        cache.set(name, Total(world.process, name, world.sink, 1, init_cache=name.endswith("1")))
    Total(world.other, names[0], world.sink, 5).end_session()
    yield
    with world.lost():
        cache.expire_all()
    yield
    totals = world.sink.totals()
    assert [totals[name] for name in names] == [7, 2, 2, 2]
    assert all(world.sink.writes(name) == 1 for name in names)


@scene
def batch(world: World) -> Scene:
    cache: LruCache[Total] = LruCache(max_entries=3)
    names = [f"{world.name}-{i}" for i in range(4)]
    yield
    with world.process.batch():
        reference = world.process.create_reference(f"{world.name}-join")
        for name in names * 3:
            cache.set(name, Total(world.process, name, world.sink, 1))
    yield
    assert reference.dereference()
    cache.expire_all()
    totals = world.sink.totals()
    assert [totals[name] for name in names] == [3] * 4


@scene
def lock(world: World) -> Scene:
    lock = world.process.lock(world.name)
    yield
    assert lock.acquire()
    token = lock.token
    lock.release()
    yield
    with world.other.lock(world.name, block=False) as its:
        assert token is not None
        assert its.token is not None
        assert its.token > token


@scene
def lock_that_is_taken(world: World) -> Scene:
    theirs = world.other.lock(world.name)
    assert theirs.acquire()
    mine = world.process.lock(world.name)
    yield
    assert not mine.acquire(block=False)
    yield
    theirs.release()


@scene
def lock_that_is_waited_for(world: World) -> Scene:
    theirs = world.other.lock(world.name)
    assert theirs.acquire()

    def release(step: str) -> None:
        if step == "lock" and theirs.token is not None:
            theirs.release()

    world.proxy.on_reply = release
    yield
    with world.process.lock(world.name):
        assert not world.other.lock(world.name).acquire(block=False)
    yield
    with world.other.lock(world.name, block=False) as its:
        assert its.owned()


@scene
def stop(world: World) -> Scene:
    process = world.made()
    process.create_reference(world.name)
    process.lock(world.name).acquire()
    cache: LruCache[Total] = LruCache()
    cache.set(world.name, world.update(3, process, init_cache=False))
    held = Total(process, f"{world.name}-held", world.sink, 4)
    yield
    process.stop()
    yield
    assert world.sink.total(world.name) == 3
    assert world.sink.total(held._id) == 4
    with world.other.lock(world.name, block=False) as its:
        assert its.owned()
    client = world.other.client
    assert client.zscore(world.other.heartbeat_hash_name, process.id) is None
    assert not client.exists(process.registry_key)


@scene
def start(world: World) -> Scene:
    yield
    process = world.made()
    yield
    assert process.client.zscore(process.heartbeat_hash_name, process.id) is not None
    process.stop()


@scene
def heartbeat(world: World) -> Scene:
    lock = world.process.lock(world.name)
    reference = world.process.create_reference(world.name)
    engine = world.process.engine
    wait_until(lambda: engine.heartbeat.beats)  # its own first one
    world.proxy.ignored = frozenset()
    with lock:
        yield
        engine.run(engine.heartbeat.beat())
        yield
        world.proxy.ignored = OF_HEARTBEATS
        assert lock.owned()
    assert reference.dereference()


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("name", SCENES)
def test_each_call_takes_effect_once(name: str, fault: Fault, world: World) -> None:
    point = 0
    while True:
        world.name = f"{name}-{point}"
        play = SCENES[name](world)
        next(play)
        world.proxy.strike(fault, point)
        next(play)
        struck = len(world.proxy.steps) > point
        world.proxy.plan()
        world.proxy.on_reply = nothing
        next(play, None)
        assert world.clean()
        if not struck:
            break
        point += 1
    assert point > 0


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("name", sorted(KEPT))
def test_what_is_kept_goes_on_by_itself(name: str, fault: Fault, brief: World) -> None:
    world = brief
    world.gone = True
    point = 0
    while True:
        world.name = f"{name}-{point}"
        play = SCENES[name](world)
        next(play)
        world.strike(fault, point)
        next(play)
        struck = len(world.proxy.steps) > point
        world.proxy.plan()
        world.back()
        wait_until(lambda: is_settled(world.process))
        next(play, None)
        wait_until(world.clean)
        if not struck:
            break
        point += 1
    assert point > 0


# Longer than retry_timeout


@pytest.fixture
def brief(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose process gives up soon, and then looks often whether the server is back.

    On a busy machine it may be late with its heartbeats, and is not to be taken for dead.
    """
    monkeypatch.setattr(phonon._core.engine, "DEAD_AFTER", 200)
    world.process = world.made(heartbeat_interval=0.1)
    return world


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_what_a_constructor_could_not_store_is_kept(brief: World, fault: Fault) -> None:
    """And stored once, although the caller has no update to store it with."""
    brief.name = "record"
    brief.strike(fault)
    with pytest.raises(ConnectionLostError):
        brief.update(3)
    brief.back()
    brief.update(4).end_session()
    assert brief.sink.total("record") == 7
    wait_until(lambda: is_settled(brief.process))
    assert brief.clean()


def test_the_server_is_away_for_longer_than_it_remembers(brief: World) -> None:
    """It remembers a call for as long as the process lives: nothing about it expires."""
    brief.name = "record"
    update = brief.update(3, init_cache=False)
    brief.strike(Fault.LOST_REPLY)
    with pytest.raises(ConnectionLostError):
        update.cache()
    client = brief.other.client
    found = list(client.scan_iter(match=f"{{{brief.process.namespace}*", count=1000))
    assert key_for(brief.process, "partials", update.resource_id) in found
    assert [key for key in found if client.pttl(key) != -1] == []
    # Meanwhile others go on.
    for n in range(300):
        brief.update(1, brief.other, init_cache=bool(n % 2)).end_session()
    brief.back()
    update.end_session()
    assert brief.sink.total("record") == 303
    assert brief.clean()


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("by", ["flush", "the next batch", "heartbeat", "end_session", "stop"])
@pytest.mark.parametrize("point", range(3))
def test_what_a_batch_could_not_store_is_stored_later(
    brief: World, point: int, by: str, fault: Fault
) -> None:
    process, records = brief.process, [f"record-{i}" for i in range(3)]
    updates: list[Total] = []

    def handle_messages() -> None:
        with process.batch():
            updates.extend(Total(process, record, brief.sink, 1) for record in records * 2)

    brief.strike(fault, point)
    with pytest.raises((ExceptionGroup, ConnectionLostError)):
        handle_messages()
    brief.back()
    if by == "flush":
        process.flush()
    elif by == "the next batch":
        with process.batch():
            Total(process, "another", brief.sink, 1)
    elif by == "heartbeat":
        wait_until(lambda: is_settled(process))
    if by == "stop":
        process.stop()
    else:
        for update in updates[: len(records)]:
            update.end_session()
    for record in records:
        assert brief.sink.total(record) == 2


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("point", range(6))
def test_sessions_that_end_in_a_batch_end_later(brief: World, point: int, fault: Fault) -> None:
    process, records = brief.process, [f"record-{i}" for i in range(3)]
    brief.strike(fault, point)
    with contextlib.suppress(ExceptionGroup, ConnectionLostError), process.batch():
        for record in records:
            Total(process, record, brief.sink, 1).end_session()
    brief.back()
    wait_until(lambda: is_settled(process))
    for record in records:
        assert brief.sink.total(record) == 1
    wait_until(brief.clean)


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("lock", Fault.LOST_REQUEST),
        ("lock", Fault.LOST_REPLY),
        ("leave", Fault.LOST_REQUEST),
        ("leave", Fault.LOST_REPLY),
        ("unlock", Fault.LOST_REQUEST),
        ("unlock", Fault.LOST_REPLY),
    ],
)
def test_a_callback_is_called_once(brief: World, fault: Fault, step: str) -> None:
    reference = brief.process.create_reference("resource")
    called: list[bool] = []
    brief.strike_step(fault, step)
    with pytest.raises(ConnectionLostError):
        reference.dereference(lambda: called.append(True))
    brief.back()
    if step == "lock":  # it did not come to leaving
        assert reference.count() == 1
        wait_until(lambda: is_settled(brief.process))
        reference.dereference(lambda: called.append(True), block=False)
    wait_until(lambda: called)
    wait_until(lambda: is_settled(brief.process))
    assert called == [True]
    assert brief.clean()


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_a_lock_is_free_again_when_its_holder_could_not_release_it(
    brief: World, fault: Fault
) -> None:
    """Although its work could not be stored either."""
    brief.name = "record"
    update = brief.update(1)
    update.refresh(brief.update(2, init_cache=False))
    brief.strike_step(fault, "append")
    with pytest.raises(ConnectionLostError), brief.process.lock(update.resource_id):
        update.cache()
    brief.back()
    wait_until(brief.other.lock(update.resource_id, block=False).acquire, 5)
    update.end_session()
    assert brief.sink.total("record") == 3


def test_a_lock_whose_grant_got_lost_is_free_again(brief: World) -> None:
    brief.strike_step(Fault.LOST_REPLY, "lock")
    with pytest.raises(ConnectionLostError):
        brief.process.lock("resource").acquire()
    brief.back()
    brief.process.flush()
    with brief.other.lock("resource", block=False):
        pass


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_whoever_asks_again_is_told_that_it_was_the_last(brief: World, fault: Fault) -> None:
    reference = brief.process.create_reference("resource")
    brief.strike_step(fault, "leave")
    with pytest.raises(ConnectionLostError):
        reference.dereference()
    brief.back()
    assert reference.dereference()
    assert not reference.dereference()


def test_whoever_asks_again_is_told_although_the_first_call_is_slow(
    brief: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = brief.process.create_reference("resource")
    outbox = brief.process.engine.outbox
    resume = outbox.resume

    def slowly(run: Any) -> Any:
        time.sleep(0.1)
        return resume(run)

    monkeypatch.setattr(outbox, "resume", slowly)
    brief.strike_step(Fault.LOST_REPLY, "leave")
    with pytest.raises(ConnectionLostError):
        reference.dereference()
    brief.back()
    assert reference.dereference()


def test_the_heart_beats_while_what_was_kept_executes(brief: World) -> None:
    class Slow(Total):
        def execute(self) -> None:
            executing.set()
            go_on.wait(20)
            super().execute()

    executing, go_on = threading.Event(), threading.Event()
    update = Slow(brief.process, "record", brief.sink, 3)
    brief.strike_step(Fault.LOST_REPLY, "leave")
    with pytest.raises(ConnectionLostError):
        update.end_session()
    brief.back()
    assert executing.wait(20)

    def deadline() -> float:
        client, process = brief.other.client, brief.process
        return float(client.zscore(process.heartbeat_hash_name, process.id))

    before = deadline()
    wait_until(lambda: deadline() > before)
    with brief.process.lock("resource"):  # and everything else goes on
        before = deadline()
        wait_until(lambda: deadline() > before)
    go_on.set()
    wait_until(lambda: is_settled(brief.process))
    assert brief.sink.total("record") == 3


def test_a_heartbeat_waits_for_nobodys_call(world: World) -> None:
    def hold_up(step: str) -> None:
        if step == "modify":
            under_way.set()
            go_on.wait(20)

    under_way, go_on = threading.Event(), threading.Event()
    reference = world.process.create_reference("resource")
    engine = world.process.engine
    world.proxy.on_reply = hold_up
    with ThreadPoolExecutor(2) as pool:
        modifying = pool.submit(reference.increment_times_modified)
        assert under_way.wait(20)
        pool.submit(engine.run, engine.heartbeat.beat()).result(20)
        assert not modifying.done()
        go_on.set()
        modifying.result(20)
    assert reference.get_times_modified() == 1


def test_no_heartbeat_follows_the_resignation(brief: World) -> None:
    def look(step: str) -> None:
        if step == "unlist":
            names = [thread.name for thread in threading.enumerate()]
            seen.append(any(name.startswith("phonon-heartbeat-" + me[:8]) for name in names))

    me, seen = brief.process.id, list[bool]()
    brief.proxy.on_reply = look
    brief.process.stop()
    assert seen == [False]


def test_stopping_waits_for_what_was_kept(brief: World) -> None:
    class Slow(Total):
        def execute(self) -> None:
            executing.set()
            go_on.wait(20)
            super().execute()

    executing, go_on = threading.Event(), threading.Event()
    update = Slow(brief.process, "record", brief.sink, 3)
    brief.strike_step(Fault.LOST_REPLY, "leave")
    with pytest.raises(ConnectionLostError):
        update.end_session()
    brief.back()
    assert executing.wait(20)
    stopping = threading.Thread(target=brief.process.stop)
    stopping.start()
    go_on.set()
    stopping.join(20)
    assert brief.sink.total("record") == 3
    assert brief.clean()
    client = brief.other.client
    assert client.zscore(brief.process.heartbeat_hash_name, brief.process.id) is None


def test_stopping_without_a_server_says_so_and_ends(brief: World) -> None:
    process = brief.process
    process.create_reference("resource")
    cache: LruCache[Total] = LruCache()
    cache.set("record", Total(process, "record", brief.sink, 3))
    process.engine.driver.retry_timeout = BRIEF
    with brief.proxy.away():
        with pytest.raises((ExceptionGroup, ConnectionLostError)) as caught:
            process.stop()
        assert caught.type is ConnectionLostError or caught.group_contains(ConnectionLostError)
        process.stop()
    wait_until(lambda: not [t for t in threading.enumerate() if process.id[:8] in t.name])


# Servers that forget the functions, start again, or stand still


def in_threads(count: int, function: Callable[[int], None]) -> None:
    """Run a function in many threads; what one of them raises is raised."""
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(function, range(count)):
            pass


def work(process: Process, sink: Sink, worker: int, rounds: int) -> None:
    """The work of each of several workers: messages about the same few records."""
    cache: LruCache[Total] = LruCache(max_entries=2)
    for i in range(rounds):
        record = f"record-{(i + worker) % 3}"
        cache.set(record, Total(process, record, sink, 1, init_cache=bool(i % 2)))
        process.create_reference("resource").increment_times_modified()
    cache.expire_all()


def work_in_a_process(url: str, namespace: str, path: str, rounds: int) -> None:
    """The same in an operating system process of its own."""
    with Process(url=url, namespace=namespace) as process:
        print("ready", flush=True)  # noqa: T201 - the test waits for it
        work(process, Sink(Path(path)), process.engine.identity.id[0], rounds)


@contextmanager
def workers(server: Redis, namespace: str, sink: Sink, count: int, rounds: int) -> Iterator[None]:
    """Run such processes beside the block, and wait for them at its end."""
    folder = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = {[str(folder), str(folder.parents[1])]!r}\n"
        "import test_faults\n"
        f"test_faults.work_in_a_process({server.url!r}, {namespace!r}, {sink.path!r}, {rounds})"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        yield
        for process in started:
            assert process.wait(60) == 0
    finally:
        for process in started:
            process.kill()
            process.communicate()


def busy(server: Redis, calls: int) -> None:
    """Wait until a server has been called some times more."""

    def called() -> int:
        with server.client() as client:
            return int(client.info("stats")["total_commands_processed"])

    before = called()
    wait_until(lambda: called() > before + calls)


def test_the_functions_get_lost_again_and_again(
    own_server: Redis, namespace: str, sink: Sink
) -> None:
    with Process(url=own_server.url, namespace=namespace) as process:

        def use(worker: int) -> None:
            if worker < 4:
                work(process, sink, worker, 40)
                return
            with own_server.client() as client:
                for _ in range(8):
                    busy(own_server, 40)
                    client.function_flush()

        with workers(own_server, namespace, sink, 2, 40):
            in_threads(5, use)
    assert sum(sink.totals().values()) == 6 * 40


def test_many_load_the_functions_at_once(own_server: Redis, namespace: str) -> None:
    with contextlib.ExitStack() as stack:
        # The URLs differ, so each has connections of its own.
        urls = [f"{own_server.url}&socket_timeout={i + 5}" for i in range(8)]
        processes = [stack.enter_context(Process(url=url, namespace=namespace)) for url in urls]
        references = [process.create_reference("resource") for process in processes]
        with own_server.client() as client:
            for _ in range(10):
                client.function_flush()
                barrier = threading.Barrier(len(references))

                def refresh(i: int, barrier: threading.Barrier = barrier) -> None:
                    barrier.wait()
                    references[i].increment_times_modified()

                in_threads(len(references), refresh)
        assert references[0].get_times_modified() == 80
        assert [reference.dereference() for reference in references] == [False] * 7 + [True]


def test_a_server_that_keeps_its_data_starts_again(namespace: str, sink: Sink) -> None:
    server = Redis("--appendonly", "yes", "--appendfsync", "always")
    try:
        with Process(url=server.url, namespace=namespace) as process:

            def use(worker: int) -> None:
                if worker < 4:
                    work(process, sink, worker, 60)
                    return
                for _ in range(3):
                    busy(server, 40)
                    server.kill()
                    server.start()

            with workers(server, namespace, sink, 2, 60):
                in_threads(5, use)
        assert sum(sink.totals().values()) == 6 * 60
        assert keys_in(server, namespace) == set()
    finally:
        server.close()


def test_a_server_that_has_lost_everything_starts_again(
    own_server: Redis, namespace: str, sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    with Process(url=own_server.url, namespace=namespace, heartbeat_interval=0.1) as process:
        reference = process.create_reference("held")
        lock = process.lock("locked")
        assert lock.acquire()

        def use(worker: int) -> None:
            if worker < 4:
                work(process, sink, worker, 60)
                return
            for _ in range(3):
                busy(own_server, 40)
                own_server.kill()
                own_server.start()

        in_threads(5, use)
        # The server's data is lost; from here on everything works as before.
        wait_until(lambda: not lock.owned())
        with pytest.raises(LockLostError):
            lock.release()
        wait_until(lambda: reference.count() == 1)
        for worker in range(2):
            work(process, sink, worker, 3)
        Total(process, "afterwards", sink, 3).end_session()
        assert sink.total("afterwards") == 3
        assert reference.dereference()
    assert not [record for record in caplog.records if record.exc_info]


@pytest.fixture
def impatient(own_server: Redis, namespace: str) -> Iterator[Process]:
    """A process that waits for answers for moments only."""
    with Process(url=own_server.url, namespace=namespace, heartbeat_interval=0.1) as made:
        driver = made.engine.driver
        driver.retry_timeout, driver.server._node.reply_timeout = 0.3, 0.1
        yield made
        driver.retry_timeout = driver.server._node.reply_timeout = 20.0
        own_server.go_on()


def test_a_server_that_stands_still_for_a_moment(
    own_server: Redis, impatient: Process, sink: Sink
) -> None:
    """It gets each call several times at once when it goes on."""
    driver = impatient.engine.driver
    driver.retry_timeout = 20
    records = [f"record-{i}" for i in range(8)]
    updates = [Total(impatient, record, sink, 1) for record in records]
    own_server.pause()

    def use(i: int) -> None:
        if i == len(records):
            wait_until(lambda: driver.server.troubles > 3 * len(records))
            own_server.go_on()
            return
        updates[i].refresh(Total(impatient, records[i], sink, 2, init_cache=False))
        updates[i].cache()
        updates[i].end_session()

    in_threads(len(records) + 1, use)
    assert sink.totals() == dict.fromkeys(records, 3)


def test_a_server_that_stands_still_for_long(
    own_server: Redis, impatient: Process, sink: Sink
) -> None:
    cache: LruCache[Total] = LruCache()
    update = Total(impatient, "record", sink, 1)
    update.refresh(Total(impatient, "record", sink, 2, init_cache=False))
    for i in range(20):
        cache.set(i, Total(impatient, f"record-{i}", sink, 1, init_cache=False))
    own_server.pause()
    with pytest.raises(ConnectionLostError):
        update.cache()
    with pytest.raises(ConnectionLostError):
        update.end_session()
    with pytest.raises(ExceptionGroup):
        cache.expire_all()
    own_server.go_on()
    wait_until(lambda: is_settled(impatient))
    assert cache.size() == 0
    assert sink.totals() == {"record": 3} | {f"record-{i}": 1 for i in range(20)}


def test_requests_that_arrive_late_change_nothing(world: World) -> None:
    """The client has given them up, and sent them again over other connections."""
    world.process = world.make(url=f"{world.proxy.url}&socket_timeout=0.1", retry=SOON)
    world.name = "record"
    updates = [world.update(1) for _ in range(4)]
    before = world.proxy.connections

    def use(i: int) -> None:
        if i == len(updates):
            wait_until(lambda: world.proxy.connections >= before + 5)
            stall.close()
            return
        updates[i].refresh(world.update(2, init_cache=False))
        updates[i].cache()

    with contextlib.ExitStack() as stall:
        stall.enter_context(world.proxy.stalled())
        in_threads(len(updates) + 1, use)
    updates[0].end_session()
    assert world.sink.total("record") == 12
    wait_until(world.clean)


# Interrupts


@contextmanager
def interrupted(
    proxy: Proxy, step: str, on_reply: Callable[[str], None] = nothing
) -> Iterator[None]:
    """Press Ctrl-C when the server has answered to a step, and the answer is under way."""
    caught = threading.Event()

    def interrupt(called: str) -> None:
        on_reply(called)
        if called == step and not caught.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            caught.wait(20)

    proxy.on_reply = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        caught.set()
        proxy.on_reply = nothing


@pytest.mark.parametrize("step", ["append", "leave", "complete"])
def test_an_interrupt_loses_no_call_and_no_answer(world: World, step: str) -> None:
    world.name = "record"
    update = world.update(1)
    update.refresh(world.update(2, init_cache=False))
    reference = world.process.create_reference("resource")
    with interrupted(world.proxy, step):
        update.cache()
        update.end_session()
    # The next caller gets its own answer.
    assert reference.count() == 1
    reference.increment_times_modified()
    assert reference.modified_by() == {world.process.id: 1}
    if step == "append":
        update.end_session()
    world.process.flush()
    assert world.sink.total("record") == 3
    assert world.sink.writes("record") == 1
    assert reference.dereference()
    assert world.clean()


@pytest.mark.parametrize("step", ["leave", "complete"])
def test_an_interrupt_loses_nothing_of_many(world: World, step: str) -> None:
    cache: LruCache[Total] = LruCache()
    records = [f"record-{i}" for i in range(5)]
    for record in records:
        cache.set(record, Total(world.process, record, world.sink, 1, init_cache=False))
    with interrupted(world.proxy, step):
        cache.expire_all()
    cache.expire_all()
    world.process.flush()
    assert world.sink.totals() == dict.fromkeys(records, 1)
    assert world.clean()


def test_an_interrupt_when_woken_for_a_lock_wakes_the_next(world: World) -> None:
    theirs = world.other.lock("resource")
    assert theirs.acquire()

    def release(step: str) -> None:
        if step == "lock" and theirs.owned():
            theirs.release()

    with interrupted(world.proxy, "blmpop", release):
        world.process.lock("resource").acquire()
    world.process.flush()
    with world.other.lock("resource", block=False):
        pass
    assert world.clean()


def test_an_interrupt_when_told_to_wait_for_a_lock_leaves_the_queue(world: World) -> None:
    with world.other.lock("resource"), interrupted(world.proxy, "lock"):
        world.process.lock("resource").acquire()
    world.process.flush()
    with world.other.lock("resource", block=False):
        pass
    assert world.clean()


def test_an_interrupt_when_a_lock_is_granted_leaves_it_free(world: World) -> None:
    with interrupted(world.proxy, "lock"):
        world.process.lock("resource").acquire()
    world.process.flush()
    with world.other.lock("resource", block=False):
        pass
    assert world.clean()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_execute_may_raise_anything(world: World, error: type[BaseException]) -> None:
    class Raising(Total):
        def execute(self) -> None:
            if self._id not in raised:
                raised.add(self._id)
                raise error
            super().execute()

    raised: set[str] = set()
    with pytest.raises(error):
        Raising(world.process, "record", world.sink, 1).end_session()
    wait_until(lambda: world.sink.writes("record"))
    cache: LruCache[Raising] = LruCache()
    records = [f"record-{i}" for i in range(3)]
    for record in records:
        cache.set(record, Raising(world.process, record, world.sink, 1))
    with pytest.raises(error):
        cache.expire_all()
    wait_until(lambda: len(world.sink.totals()) == 1 + len(records))
    wait_until(world.clean)
    assert world.sink.totals() == dict.fromkeys(["record", *records], 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_merge_may_raise_anything(world: World, error: type[BaseException]) -> None:
    class Raising(Total):
        def merge(self, other: Any) -> None:
            if not raised:
                raised.append(True)
                raise error
            super().merge(other)

    raised: list[bool] = []
    Raising(world.other, "record", world.sink, 1).end_session()
    first = Raising(world.process, "record", world.sink, 1)
    second = Raising(world.other, "record", world.sink, 2)
    first.end_session()
    with pytest.raises(error):
        second.end_session()  # where both are merged
    wait_until(lambda: world.sink.writes("record") == 2)
    assert world.sink.total("record") == 4
    wait_until(world.clean)


# Many threads


def test_execute_may_use_its_own_resource(world: World) -> None:
    class Calling(Total):
        def execute(self) -> None:
            super().execute()
            if again:
                return
            process = self.process()
            reference = process.create_reference(self.resource_id)
            reference.increment_times_modified()
            assert reference.modified_by() == {process.id: 1}
            again.append(Calling(process, self._id, world.sink, 10))
            again[0].end_session()
            assert not reference.dereference()  # the process was a member once, and has left
            in_threads(2, lambda _: reference.refresh_session())
            with process.lock(self.resource_id, block=False):
                pass
            assert reference.dereference()

    again: list[Total] = []
    Calling(world.process, "record", world.sink, 1).end_session()
    assert world.sink.total("record") == 11
    assert world.sink.writes("record") == 2
    assert world.clean()


def test_others_join_while_a_batch_executes(world: World) -> None:
    class Slow(Total):
        def execute(self) -> None:
            executing.set()
            assert joined.wait(20)
            super().execute()

    executing, joined = threading.Event(), threading.Event()
    update = Slow(world.process, "record", world.sink, 1)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(update.end_session)
        assert executing.wait(20)
        reference = world.process.create_reference(update.resource_id)
        assert world.other.create_reference(update.resource_id).count() == 2
        joined.set()
        ended.result(20)
    assert reference.count() == 2
    assert world.sink.total("record") == 1


@dataclass
class Crowd:
    """The work of many threads on few resources, and the expected result."""

    world: World
    seed: int
    expected: Counter[str] = field(default_factory=Counter)
    modified: Counter[str] = field(default_factory=Counter)
    reported: Counter[str] = field(default_factory=Counter)
    critical: Counter[str] = field(default_factory=Counter)
    entered: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.cache: LruCache[Total] = LruCache(max_entries=2)

    def count(self, counter: Counter[str], name: str, n: int) -> None:
        with self.lock:
            counter[name] += n

    def use(self, thread: int) -> None:
        chance = random.Random(f"{self.seed} {thread}")  # noqa: S311 - a test's schedule
        actions = [self.tell, self.collect, self.cached, self.modify, self.exclude]
        for _ in range(12):
            chance.choice(actions)(chance)

    def message(self, chance: random.Random, **options: Any) -> Total:
        record, n = f"record-{chance.randrange(3)}", chance.randrange(1, 10)
        self.count(self.expected, record, n)
        return Total(self.world.process, record, self.world.sink, n, **options)

    def tell(self, chance: random.Random) -> None:
        update = self.message(chance, init_cache=chance.random() < 0.5)
        if chance.random() < 0.5:
            update.cache()
        update.end_session()

    def collect(self, chance: random.Random) -> None:
        with self.world.process.batch():
            for _ in range(4):
                self.message(chance).end_session()

    def cached(self, chance: random.Random) -> None:
        for _ in range(3):
            update = self.message(chance)
            self.cache.set(update._id, update)
        if chance.random() < 0.3:
            self.cache.expire_all()

    def modify(self, chance: random.Random) -> None:
        name = f"resource-{chance.randrange(2)}"
        reference = self.world.process.create_reference(name)
        for _ in range(2):
            self.count(self.modified, name, 1)
            reference.increment_times_modified()
        reference.dereference(
            lambda: self.count(self.reported, name, reference.get_times_modified())
        )

    def exclude(self, chance: random.Random) -> None:
        name = f"lock-{chance.randrange(2)}"
        with self.world.process.lock(name):
            before = self.critical[name]
            assert self.world.process.create_reference(f"{name}-count").count() >= 0
            self.critical[name] = before + 1
        with self.lock:
            self.entered += 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_threads_and_a_bad_connection(world: World, seed: int) -> None:
    crowd = Crowd(world, seed)
    world.proxy.at_random(seed, 0.05)
    in_threads(16, crowd.use)
    world.proxy.plan()
    crowd.cache.expire_all()
    assert world.sink.totals() == crowd.expected
    assert crowd.reported == crowd.modified
    assert sum(crowd.critical.values()) == crowd.entered
    with world.sink.connect() as connection:
        rows = connection.execute(
            "SELECT record, count(*), count(DISTINCT token) FROM written GROUP BY 1"
        )
        assert all(writes == tokens for _, writes, tokens in rows)
    world.process.stop()
    assert world.clean()
