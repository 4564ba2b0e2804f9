"""Processes that are declared dead and are not: paused ones, that go on."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from phonon import LruCache, Process, RetryPolicy, Update
from phonon._core.executor import TOKENS
from phonon._core.flows import Flow
from phonon._core.heartbeat import Heartbeat
from phonon.errors import DeclaredDeadError, LockLostError
from support.member import BEAT, Crew, Entry, Member, Refused
from support.nodes import Cluster
from support.proxy import Fault, Proxy
from support.world import Redis, key_for, retry_now, wait_until


@pytest.fixture
def crew(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(server.url, namespace, tmp_path) as crew:
        yield crew


def buried(process: Process, name: str) -> bool:
    """Return whether survivors have taken over everything of a process's id."""
    return process.client.zscore(process.heartbeat_hash_name, name) is None


def pause_until_buried(zombie: Member, survivor: Process) -> None:
    zombie.pause()
    wait_until(lambda: buried(survivor, zombie.id))


def test_a_zombie_goes_on_under_another_id(crew: Crew) -> None:
    zombie, survivor = crew.member(), crew.process()
    reference = survivor.create_reference("x")
    zombie.do("join", "x")
    zombie.do("keep", "a", 5)
    zombie.do("put", "b", 7)
    pause_until_buried(zombie, survivor)
    assert reference.count() == 1
    wait_until(lambda: crew.journal.lines("b"))
    assert crew.journal.applied() == {"b": {"n": 7}}, "what was stored was taken over"
    zombie.go_on()
    wait_until(lambda: zombie.do("id") != zombie.id)
    wait_until(lambda: reference.count() == 2)
    assert {holder.id for holder in reference.holders()} == {survivor.id, zombie.do("id")}
    wait_until(lambda: zombie.told("DeclaredDeadError"))
    ((_, text, _, _),) = zombie.told("DeclaredDeadError")
    assert zombie.id in text
    assert zombie.do("id") in text
    # Local data is kept, and stored once.
    zombie.do("end", "a")
    zombie.do("keep", "b", 1)
    zombie.do("end", "b")
    assert crew.journal.applied() == {"a": {"n": 5}, "b": {"n": 8}}
    assert len(crew.journal.lines()) == 3
    assert zombie.do("leave", "x") is False
    assert reference.dereference()
    assert zombie.do("stop") is None
    survivor.stop()


def test_a_zombie_has_lost_its_locks(crew: Crew) -> None:
    zombie, survivor = crew.member(), crew.process()
    zombie.do("acquire", "x")
    guarding = zombie.begin("guard", "y", "hang-work")
    wait_until(lambda: crew.journal.begun("hang-work"))
    assert zombie.do("owned", "x") is True
    pause_until_buried(zombie, survivor)
    lock = survivor.lock("x", block=False)
    assert lock.acquire()
    zombie.go_on()
    # Before a heartbeat has told it, too.
    assert zombie.do("owned", "x") is False
    wait_until(lambda: len(zombie.told("LockLostError")) == 2)
    with pytest.raises(Refused, match="LockLostError"):
        zombie.do("release", "x")
    crew.journal.open("hang-work")
    error = guarding.exception(20)
    assert isinstance(error, Refused)
    assert error.kind == "LockLostError"
    assert lock.owned()
    lock.release()
    assert zombie.do("acquire", "x") > 0
    assert zombie.do("owned", "x") is True


def test_a_zombie_cannot_complete_what_was_taken_over(crew: Crew) -> None:
    zombie, survivor = crew.member(), crew.process()
    zombie.do("put", "hang-a", 3)
    ending = zombie.begin("end", "hang-a")
    wait_until(lambda: crew.journal.begun("hang-a"))
    zombie.pause()
    (crew.journal.folder / "begun-hang-a").unlink()
    wait_until(lambda: crew.journal.begun("hang-a"))  # by the survivor
    running = survivor.client.hgetall(key_for(survivor, "running", "test.test.hang-a"))
    assert running[b"owner"].decode() == survivor.id
    assert running[b"crashes"] == b"1"
    zombie.go_on()
    wait_until(lambda: zombie.do("id") != zombie.id)
    crew.journal.open("hang-a")
    assert ending.exception(20) is None
    token = int(running[b"token"]) * TOKENS
    wait_until(lambda: zombie.told("BatchLostError"))
    ((_, text, resource, lost),) = zombie.told("BatchLostError")
    assert (resource, lost) == ("test.test.hang-a", token)
    assert "taken it over" in text
    wait_until(lambda: len(crew.journal.lines()) == 2)
    assert {line.token for line in crew.journal.lines()} == {token}
    assert {line.process for line in crew.journal.lines()} == {zombie.do("id"), survivor.id}
    assert crew.journal.applied() == {"hang-a": {"n": 3}}, "a database that checks has it once"
    wait_until(lambda: survivor.get_registry() == [])
    zombie.do("put", "hang-a", 4)
    zombie.do("end", "hang-a")
    assert crew.journal.applied() == {"hang-a": {"n": 7}}


# The next call comes before the next heartbeat


@pytest.fixture
def silent(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> tuple[Process, list[Exception]]:
    """A process whose heart has stopped, and what it is told."""
    return silenced(crew, monkeypatch)


def silenced(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> tuple[Process, list[Exception]]:
    told: list[Exception] = []
    silent: list[Heartbeat] = []
    beat = Heartbeat.beat

    def nothing() -> Flow[float]:
        yield from ()
        return 9.0

    monkeypatch.setattr(
        Heartbeat, "beat", lambda heart: nothing() if heart in silent else beat(heart)
    )
    process = crew.process(on_error=told.append)
    silent.append(process.engine.heartbeat)
    return process, told


def declare_dead(crew: Crew, process: Process) -> None:
    """Have a process taken over from."""
    survivor = crew.process()
    name = process.id
    wait_until(lambda: buried(survivor, name))
    survivor.stop()


def in_a_batch(process: Process) -> None:
    with process.batch():
        Entry(process, "other", doc={"n": 1})
        process.create_reference("reference")


CALLS: dict[str, Callable[[Process], Any]] = {
    "append": lambda process: Entry(process, "other", doc={"n": 1}),
    "join": lambda process: process.create_reference("other"),
    "modify": lambda process: process.create_reference("other").increment_times_modified(),
    "leave": lambda process: Entry(process, "other", doc={"n": 1}, init_cache=False).end_session(),
    "lock": lambda process: process.lock("other").acquire(),
    "batch": in_a_batch,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_next_call_goes_on_under_another_id(
    name: str, crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    process, told = silent
    old = process.id
    held = process.create_reference("x")
    declare_dead(crew, process)
    CALLS[name](process)
    assert process.id != old
    wait_until(lambda: told)
    assert [type(error) for error in told] == [DeclaredDeadError]
    assert old in str(told[0])
    if name != "leave":
        registry = process.get_registry()
        assert any(resource.endswith("other") for resource in registry)
    wait_until(lambda: held.count() == 1)  # what it held it holds again
    assert [holder.id for holder in held.holders()] == [process.id]
    process.stop()
    assert crew.journal.applied().get("other", {"n": 1}) == {"n": 1}
    assert len(crew.journal.lines("other")) == (name in ("append", "leave", "batch"))


def test_an_update_on_its_way_is_stored_once(
    crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    process, told = silent
    update = Entry(process, "a", doc={"n": 1})
    declare_dead(crew, process)
    assert crew.journal.applied() == {"a": {"n": 1}}
    update.refresh(Entry(process, "a", doc={"n": 2}, init_cache=False))
    update.cache()
    update.refresh(Entry(process, "a", doc={"n": 4}, init_cache=False))
    update.end_session()
    assert crew.journal.applied() == {"a": {"n": 7}}
    assert [line.doc for line in crew.journal.lines()] == [{"n": 1}, {"n": 6}]
    wait_until(lambda: told)
    assert len(told) == 1


def test_a_lock_ends_with_the_id_that_took_it(
    crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    process, told = silent
    one, two = (process.lock(name) for name in "ab")
    for lock in (one, two):
        assert lock.acquire()
    declare_dead(crew, process)
    assert not one.owned(), "nobody has told it, but its life has run out"
    with pytest.raises(LockLostError):
        one.release()
    process.create_reference("x")
    assert not two.owned()
    with pytest.raises(LockLostError):
        two.release()
    both = {DeclaredDeadError, LockLostError}
    wait_until(lambda: {type(error) for error in told} == both)
    assert one.acquire(), "made anew, it is a lock like any other"
    assert one.owned()
    one.release()


def test_a_block_that_a_death_falls_into_raises(
    crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    process, _ = silent
    with pytest.raises(LockLostError, match="was lost before it was released"), process.lock("a"):
        declare_dead(crew, process)


def test_a_zombie_may_stop_before_it_learns_of_it(
    crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    process, told = silent
    registry_key = process.registry_key
    process.create_reference("x")
    cache: LruCache[Entry] = LruCache()
    for n in (1, 2):
        cache.set("a", Entry(process, "a", doc={"n": n}, init_cache=False))
    declare_dead(crew, process)
    probe = crew.process()
    assert probe.get_registry(registry_key) == []
    process.stop()
    assert crew.journal.applied() == {"a": {"n": 3}}
    wait_until(lambda: told)
    assert [type(error) for error in told] == [DeclaredDeadError]
    assert probe.create_reference("x").count() == 1


def test_a_zombie_that_held_nothing_may_stop(
    crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    process, _ = silent
    name = process.heartbeat_hash_name
    declare_dead(crew, process)
    process.stop()
    probe = crew.process()
    assert [key.decode() for key in probe.client.zrange(name, 0, -1)] == [probe.id]


def test_a_zombie_whose_survivors_have_gone(crew: Crew) -> None:
    """The last of them takes the epoch with it. That is no loss of the server's data."""
    zombie, survivor = crew.member(), crew.process()
    zombie.do("join", "x")
    pause_until_buried(zombie, survivor)
    survivor.stop()
    zombie.go_on()
    wait_until(lambda: zombie.do("id") != zombie.id)
    wait_until(lambda: zombie.do("count", "x") == 1)
    assert [error[0] for error in wait_until(lambda: zombie.do("told"))] == ["DeclaredDeadError"]


def test_many_threads_learn_of_it_at_once(
    crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    process, told = silent
    old = process.id
    updates = [Entry(process, f"u{i}", doc={"n": 1}, init_cache=False) for i in range(8)]
    declare_dead(crew, process)

    def use(i: int) -> None:
        for _ in range(10):
            updates[i].refresh(Entry(process, f"u{i}", doc={"n": 1}, init_cache=False))
            updates[i].cache()
            with process.lock(f"lock{i % 2}"):
                process.create_reference(f"x{i}").dereference()
        updates[i].end_session()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    wait_until(lambda: told)
    assert [type(error) for error in told] == [DeclaredDeadError], "one new id for all"
    assert process.id != old
    assert crew.journal.applied() == {f"u{i}": {"n": 11} for i in range(8)}
    wait_until(lambda: not process.get_registry())


def test_a_session_whose_end_was_kept_ends_under_the_new_id(
    server: Redis, crew: Crew, silent: tuple[Process, list[Exception]]
) -> None:
    _, told = silent
    proxy = Proxy(server.socket)
    try:
        process = crew.process(url=proxy.url, retry_timeout=0.2, on_error=told.append)
        update = Entry(process, "a", doc={"n": 1})
        update.refresh(Entry(process, "a", doc={"n": 2}, init_cache=False))
        old = process.id
        proxy.strike_step(Fault.LOST_REQUEST, "leave", gone=True)
        with pytest.raises(ConnectionError):
            update.end_session()
        declare_dead(crew, process)
        assert crew.journal.applied() == {"a": {"n": 1}}
        proxy.plan()
        proxy.back()
        wait_until(lambda: len(crew.journal.lines()) == 2)
        assert process.id != old
        assert crew.journal.applied() == {"a": {"n": 3}}
        process.stop()
    finally:
        proxy.close()


def test_a_cache_of_a_zombie_ends_its_sessions(crew: Crew) -> None:
    zombie, survivor = crew.member(), crew.process()
    zombie.do("put_many", "r", 50)
    for i in range(50):
        zombie.do("keep", f"r{i}", 2)
    pause_until_buried(zombie, survivor)
    zombie.go_on()
    for i in range(50):
        zombie.do("end", f"r{i}")
    assert crew.journal.applied() == {f"r{i}": {"n": 3} for i in range(50)}


def test_a_zombie_that_dies_for_good(crew: Crew) -> None:
    """Survivors take over from both of its ids."""
    zombie, survivor = crew.member(), crew.process()
    zombie.do("put", "a", 1)
    pause_until_buried(zombie, survivor)
    zombie.go_on()
    wait_until(lambda: zombie.do("id") != zombie.id)
    zombie.do("put", "a", 2)
    second = zombie.do("id")
    zombie.kill()
    wait_until(lambda: buried(survivor, second))
    wait_until(lambda: len(crew.journal.lines()) == 2)
    assert crew.journal.applied() == {"a": {"n": 3}}


# In a cluster


def test_a_zombie_in_a_cluster(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with Crew(cluster.url, namespace, tmp_path) as crew:
        zombie, survivor = crew.member(), crew.process()
        reference = survivor.create_reference("x")
        zombie.do("join", "x")
        zombie.do("put", "b", 7)
        zombie.do("keep", "a", 5)
        zombie.do("acquire", "lock")
        pause_until_buried(zombie, survivor)
        assert reference.count() == 1
        zombie.go_on()
        zombie.do("put", "a", 1)
        assert zombie.do("id") != zombie.id
        assert zombie.do("owned", "lock") is False
        wait_until(lambda: reference.count() == 2)
        zombie.do("end", "a")
        zombie.do("stop")
        assert crew.journal.applied() == {"a": {"n": 6}, "b": {"n": 7}}


# Nobody is dead when it was the server that stood still


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_outage_is_nobodys_death(how: str, namespace: str, tmp_path: Path) -> None:
    server = Redis("--appendonly", "yes", "--appendfsync", "always")
    try:
        with Crew(server.url, namespace, tmp_path) as crew:
            members = [crew.member(retry_timeout=20) for _ in range(3)]
            told: list[Exception] = []
            process = crew.process(on_error=told.append)
            reference = process.create_reference("x")
            for member in members:
                member.do("put", "a")
                member.do("join", "x")
            members[0].do("acquire", "lock")
            members[1].do("put", "hang-b")
            ending = members[1].begin("end", "hang-b")
            wait_until(lambda: crew.journal.begun("hang-b"))
            if how == "stopped":
                server.pause()
            else:
                server.kill()
            end = time.monotonic() + 8 * BEAT  # as long as it takes to be dead, twice
            wait_until(lambda: time.monotonic() > end)
            if how == "stopped":
                server.go_on()
            else:
                server.start()
            kept = {member.id for member in members} | {process.id}
            end = time.monotonic() + 6 * BEAT
            wait_until(lambda: time.monotonic() > end)
            assert [member.do("id") for member in members] == [member.id for member in members]
            assert kept == {holder.id for holder in reference.holders()}
            assert [member.do("told") for member in members] == [[], [], []]
            assert told == []
            # As soon as a heartbeat has told it again that it lives.
            wait_until(lambda: members[0].do("owned", "lock"))
            members[0].do("release", "lock")
            crew.journal.open("hang-b")
            assert ending.exception(20) is None
            for member in members:
                member.do("end", "a")
                member.do("stop")
            assert [line.doc for line in crew.journal.lines("a")] == [{"n": 3}]
            assert [line.doc for line in crew.journal.lines("hang-b")] == [{"n": 1}]
            process.stop()
    finally:
        server.close()


def test_the_next_attempt_is_left_to_whoever_took_over(server: Redis, namespace: str) -> None:
    """Two attempts for one failure would count twice, and park the batch too early."""
    attempts: list[int | None] = []

    class Failing(Update):
        def merge(self, other: Any) -> None:
            raise NotImplementedError

        def execute(self) -> None:
            attempts.append(self.token)
            if len(attempts) < 3:
                raise OSError("the database is down")

    process = Process(
        url=server.url,
        namespace=namespace,
        retry=RetryPolicy(first_delay=60, jitter=0),
        recover_failed_processes=False,
    )
    with pytest.raises(OSError, match="the database is down"):
        Failing(process, 1, doc={}).end_session()
    engine = process.engine
    former = process.id
    engine.run(engine.rebirth.run())
    assert process.id != former
    wait_until(lambda: not engine.takeover.former)
    assert len(attempts) == 1, "the next attempt is due in a minute"
    retry_now(process)
    assert len(attempts) == 2
    process.stop()
    assert attempts == [attempts[0]] * 3, "token and all"


def test_a_stop_waits_until_the_former_self_is_unlisted(
    server: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be declared dead when all is left, just before its lanes are closed."""
    process = Process(url=server.url, namespace=namespace)
    engine, former = process.engine, process.id
    leave, request = engine._leave_all, engine.identity.in_namespace
    has_stopped = threading.Event()

    def leave_and_die() -> Flow[Any]:
        errors = yield from leave()
        if process.id == former:
            engine.identity.suspected = True
            engine.heartbeat.wake()
            wait_until(lambda: process.id != former)
        return errors

    def request_late(function: str, *arguments: bytes) -> Any:
        if (function, *arguments) == ("unlist", former.encode()):
            has_stopped.wait(0.5)
        return request(function, *arguments)

    monkeypatch.setattr(engine, "_leave_all", leave_and_die)
    monkeypatch.setattr(engine.identity, "in_namespace", request_late)
    process.stop()
    with server.client() as client:
        listed = client.zrange(process.heartbeat_hash_name, 0, -1)
    has_stopped.set()
    assert listed == []
