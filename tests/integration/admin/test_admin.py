"""An operator's view: it shows what is there, changes nothing, and acts only when told to."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phonon import Admin, ConflictFreeUpdate, Process, RetryPolicy
from phonon.errors import (
    BatchMissingError,
    BatchRunningError,
    ConfigurationError,
    LockLostError,
    ProcessMissingError,
    UndecodableError,
    UnknownClassError,
)
from support.member import Crew
from support.nodes import Cluster
from support.world import Make, Redis, key_for, keys_in, wait_until

ONCE = RetryPolicy(attempts=1)
HOURLY = RetryPolicy(attempts=3, first_delay=3600, longest_delay=3600, jitter=0)


@pytest.fixture
def admin(server: Redis, namespace: str) -> Iterator[Admin]:
    with Admin(server.url, namespace=namespace, who="the test") as admin:
        yield admin


@pytest.fixture
def crew(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(server.url, namespace, tmp_path) as crew:
        yield crew


class Kept(ConflictFreeUpdate):
    """Raises as long as it is told to."""

    broken = False

    def execute(self) -> None:
        if Kept.broken:
            raise OSError("no database")


@pytest.fixture
def broken() -> Iterator[None]:
    Kept.broken = True
    yield
    Kept.broken = False


def park(process: Process, record: str, n: int = 1) -> int:
    """Have a batch parked; returns its token."""
    before = {entry.token for entry in process.parked()}
    with pytest.raises(OSError, match="no database"):
        Kept(process, record, doc={"n": n}).end_session()
    (token,) = {entry.token for entry in process.parked()} - before
    return token


def reported(admin: Admin, process: Process) -> Any:
    """The process, once it has told what it can execute."""

    def look() -> Any:
        return next((p for p in admin.processes() if p.id == process.id and p.executes), None)

    return wait_until(look)


def test_nothing_is_there_and_nothing_comes_of_looking(
    server: Redis, namespace: str, admin: Admin
) -> None:
    assert [*admin.processes(), *admin.sources(), *admin.acts()] == []
    assert [*admin.locks(), *admin.sessions(), *admin.batches()] == []
    assert admin.lock("x") is None
    found = admin.resource("x")
    assert (found.members, found.batches, found.lock, found.partials) == ((), (), None, 0)
    assert keys_in(server, namespace) == set()


def test_looking_changes_nothing(
    server: Redis, namespace: str, admin: Admin, make: Make, broken: None
) -> None:
    process = make(retry=ONCE, heartbeat_interval=400)
    reported(admin, process)
    token = park(process, "a")
    held = Kept(process, "b", doc={"n": 1})
    process.lock("x").acquire()
    with server.client() as client:
        before = {
            key: (client.dump(key), client.pttl(key))
            for key in client.scan_iter(match=f"*{namespace}*")
        }
        admin.processes()
        admin.sources()
        assert len([*admin.locks(), *admin.sessions(), *admin.batches()]) == 3
        admin.lock("x")
        admin.resource(held.resource_id)
        list(admin.content("test.test.a", token))
        after = {
            key: (client.dump(key), client.pttl(key))
            for key in client.scan_iter(match=f"*{namespace}*")
        }
    assert after == before
    assert [p.id for p in admin.processes()] == [process.id], "it is no process itself"


def test_processes(admin: Admin, make: Make, broken: None) -> None:
    process = make(retry=HOURLY, heartbeat_interval=0.5)
    Kept(process, "a", doc={"n": 1})
    with pytest.raises(OSError, match="no database"):
        Kept(process, "b", doc={"n": 1}).end_session()
    process.lock("x").acquire()
    found = reported(admin, process)
    assert (found.state, found.memberships, found.locks, found.batches) == ("alive", 1, 1, 1)
    assert found.host
    assert found.pid
    assert found.version
    assert found.heartbeat_interval == 0.5
    assert 0 <= found.lag < 5
    assert found.calls > 0
    assert found.oldest_batch >= found.since - 1
    assert f"{Kept.__module__}.Kept" in found.classes
    wait_until(lambda: reported(admin, process).backlog == 1)


def test_a_killed_process_is_late_and_then_dead(admin: Admin, crew: Crew) -> None:
    member = crew.member(recover_failed_processes=False)
    member.do("put", "a")
    (one,) = admin.processes()
    assert (one.state, one.memberships, one.executes) == ("alive", 1, False)
    member.kill()
    (late,) = wait_until(lambda: [p for p in admin.processes() if p.state == "late"])
    assert late.lag > late.heartbeat_interval
    assert [s.resource for s in admin.sessions()] == ["test.test.a"], "it is held still"
    crew.process(recover_failed_processes=False)
    wait_until(lambda: any(p.state == "dead" for p in admin.processes()))
    # Nobody here executes what it has left.
    (batch,) = wait_until(lambda: list(admin.batches("waiting-for-survivor")))
    assert (batch.resource, batch.partials) == ("test.test.a", 1)
    crew.process()
    wait_until(lambda: [p.id for p in admin.processes() if p.id == one.id] == [])
    assert list(admin.batches()) == []


def test_a_lock_and_its_queue(admin: Admin, make: Make) -> None:
    first, second = make(), make()
    lock = first.lock("x")
    lock.acquire()
    waiting = [
        threading.Thread(target=lambda p=p: p.lock("x").acquire() and p.lock("x"), daemon=True)
        for p in (second,)
    ]
    for thread in waiting:
        thread.start()
    found: Any = wait_until(lambda: (found := admin.lock("x")) and found.waiting and found)
    assert (found.mode, found.holding, found.waiting) == ("exclusive", 1, 1)
    assert found.holders[0].process == first.id
    assert found.holders[0].token == lock.token
    assert found.holders[0].thread == "MainThread"
    assert found.holders[0].lease is None
    assert [waiter.process for waiter in found.waiters] == [second.id]
    assert list(admin.locks()) == [found]
    assert list(admin.locks(prefix="y")) == []
    lock.release()

    def handed_over() -> bool:  # Between the release and the waiter's next try nobody holds it.
        lock = admin.lock("x")
        return lock is not None and [holder.process for holder in lock.holders] == [second.id]

    wait_until(handed_over)
    for thread in waiting:
        thread.join()  # or its process stops before it has its answer


def test_shares_and_semaphores(admin: Admin, make: Make) -> None:
    processes = [make() for _ in range(3)]
    for process in processes:
        process.lock("x", shared=True, lease=100).acquire()
        process.semaphore("x", 3).acquire()
    found = {lock.mode: lock for lock in admin.locks()}
    assert found.keys() == {"shared", "semaphore"}
    assert {g.process for g in found["shared"].holders} == {p.id for p in processes}
    assert all(90 < (grant.lease or 0) <= 100 for grant in found["shared"].holders)
    assert found["semaphore"].holding == 3
    assert admin.lock("x", semaphore=True) == found["semaphore"]


def test_sessions(admin: Admin, make: Make) -> None:
    first, second = make(), make()
    for i in range(300):
        Kept(first, f"a{i}", doc={"n": 1})
    Kept(second, "a7", doc={"n": 1})
    Kept(second, "b", doc={"n": 1})
    found = {session.resource: session for session in admin.sessions()}
    assert len(found) == 301
    assert len(list(admin.sessions())) == 301, "each is listed once"
    shared = found["test.test.a7"]
    assert (shared.members, shared.modifications, shared.partials) == (2, 2, 2)
    assert (shared.bytes or 0) > 50
    assert 0 <= shared.age < 60
    assert [s.resource for s in admin.sessions(prefix="test.test.b")] == ["test.test.b"]
    assert list(admin.sessions(older=3600)) == []
    assert len(list(admin.sessions(older=0))) == 301
    oldest = admin.oldest_sessions(5)
    assert len(oldest) == 5
    assert [s.age for s in oldest] == sorted((s.age for s in oldest), reverse=True)
    assert min(s.age for s in oldest) >= sorted(s.age for s in found.values())[-6] - 0.5


def test_batches_by_state(admin: Admin, crew: Crew, make: Make, broken: None) -> None:
    member = crew.member()
    member.do("put", "hang-a")
    member.begin("end", "hang-a")
    retrying = make(retry=HOURLY)
    with pytest.raises(OSError, match="no database"):
        Kept(retrying, "b", doc={"n": 1}).end_session()
    token = park(make(retry=ONCE), "c")
    wait_until(lambda: [b for b in admin.batches("running") if b.owner == member.id])
    found = {batch.resource: batch for batch in admin.batches()}
    assert {name: batch.state for name, batch in found.items()} == {
        "test.test.hang-a": "running",
        "test.test.b": "retrying",
        "test.test.c": "parked",
    }
    again, given_up = found["test.test.b"], found["test.test.c"]
    assert (again.attempts, again.error) == (1, "OSError: no database")
    assert (again.next_attempt or 0) > again.since + 1000
    assert (given_up.token, given_up.attempts) == (token, 1)
    assert [b.resource for b in admin.batches(["parked", "retrying"], prefix="test.test.b")] == [
        "test.test.b"
    ]
    crew.journal.open("hang-a")
    wait_until(lambda: not list(admin.batches("running")))


def test_sources(admin: Admin, make: Make) -> None:
    process = make(heartbeat_interval=0.1)
    source = process.source("orders-3")
    with source.batch([(7, "a"), (8, "b")]) as batch:
        assert [offset for offset, _ in batch] == [7, 8]
    (found,) = wait_until(lambda: [s for s in admin.sources() if s.position != "None"])
    assert (found.name, found.process, found.kind) == ("orders-3", process.id, "ordered")
    assert (found.position, found.lag) == (str(source.position()), None)
    source.report_end(20)
    (found,) = wait_until(lambda: [s for s in admin.sources() if s.lag is not None])
    assert found.lag == 11


def test_content_needs_no_class(admin: Admin, make: Make, broken: None) -> None:
    process = make(retry=ONCE)
    token = park(process, "a", 7)
    Kept(process, "a", spec={"day": 1}, doc={"n": 8})
    (letter,) = admin.content("test.test.a", token)
    assert (letter.id, letter.doc, letter.error) == ("a", {"n": 7}, "")
    assert letter.class_name == f"{Kept.__module__}.Kept"
    (open_one,) = admin.content("test.test.a")
    assert (open_one.doc, open_one.spec) == ({"n": 8}, {"day": 1})
    with pytest.raises(BatchMissingError, match=r"has no batch"):
        list(admin.content("test.test.a", token + 1024))


def test_what_cannot_be_read_says_why(
    server: Redis, admin: Admin, make: Make, broken: None
) -> None:
    process = make(retry=ONCE)
    token = park(process, "a")
    with server.client() as client:
        key = key_for(process, f"dead:{token // 1024}", "test.test.a")
        client.rpush(key, b"\x93never one of ours")
    good, bad = admin.content("test.test.a", token)
    assert good.error == ""
    assert "not one of Phonon's" in bad.error
    with pytest.raises(UndecodableError, match="phonon discard"):
        admin.replay("test.test.a", token)


def test_replay(admin: Admin, make: Make, broken: None) -> None:
    process = make(retry=ONCE, heartbeat_interval=0.1)
    token = park(process, "a")
    reported(admin, process)
    Kept.broken = False
    said = admin.replay("test.test.a", token)
    assert "goes on as" in said
    wait_until(lambda: not list(admin.batches()))
    assert [(act.act, act.resource, act.token, act.who) for act in admin.acts()] == [
        ("replay", "test.test.a", token, "the test")
    ]
    with pytest.raises(BatchMissingError):
        admin.replay("test.test.a", token)


def test_replay_without_a_process_that_knows_the_class(
    admin: Admin, make: Make, broken: None
) -> None:
    process = make(retry=ONCE)
    token = park(process, "a")
    process.stop()
    with pytest.raises(UnknownClassError, match="no live process can execute"):
        admin.replay("test.test.a", token)
    # One that lives, and executes nothing of others.
    make(recover_failed_processes=False)
    with pytest.raises(UnknownClassError, match="no live process can execute"):
        admin.replay("test.test.a", token)
    (batch,) = admin.batches()
    assert (batch.state, batch.token) == ("parked", token), "it is where it was"
    assert admin.acts() == []


def test_replay_beside_a_running_batch(admin: Admin, make: Make, broken: None) -> None:
    parking, retrying = make(retry=ONCE), make(retry=HOURLY)
    token = park(parking, "a")
    with pytest.raises(OSError, match="no database"):
        Kept(retrying, "a", doc={"n": 1}).end_session()
    reported(admin, parking)
    with pytest.raises(BatchRunningError):
        admin.replay("test.test.a", token)


def test_discard(admin: Admin, make: Make, broken: None) -> None:
    token = park(make(retry=ONCE), "a")
    assert "is deleted, with its 1 partial" in admin.discard("test.test.a", token)
    assert list(admin.batches()) == []
    with pytest.raises(BatchMissingError):
        admin.discard("test.test.a", token)
    with pytest.raises(BatchMissingError):
        admin.discard("test.test.a", 5)


def test_break_lock(admin: Admin, make: Make) -> None:
    process = make()
    lock = process.lock("x")
    lock.acquire()
    token = lock.token or 0
    with pytest.raises(LockLostError, match="phonon locks"):
        admin.break_lock("x", token + 1024)
    assert process.id in admin.break_lock("x", token)
    assert admin.lock("x") is None
    with make().lock("x", block=False):
        pass
    with pytest.raises(LockLostError):
        lock.release()


def test_expire(admin: Admin, make: Make) -> None:
    zombie, survivor = make(heartbeat_interval=1), make(heartbeat_interval=0.2)
    reported(admin, zombie)
    zombie.lock("x").acquire()
    former = zombie.id
    assert "is declared dead" in admin.expire(former)
    wait_until(lambda: former not in {p.id for p in admin.processes()})
    assert admin.lock("x") is None
    wait_until(lambda: zombie.id != former)  # it lives on, and knows
    with pytest.raises(ProcessMissingError, match="phonon ps"):
        admin.expire("nobody")
    assert survivor.id in {p.id for p in admin.processes()}


def test_arguments_are_checked(server: Redis, admin: Admin) -> None:
    wrong: Any = "wrong"
    for call in (
        lambda: list(admin.batches(state=wrong)),
        lambda: list(admin.sessions(older=wrong)),
        lambda: list(admin.locks(prefix=3)),  # type: ignore[arg-type]
        lambda: admin.replay("x", wrong),
        lambda: Admin(server.url, timeout=0),
    ):
        with pytest.raises(ConfigurationError):
            call()


def test_another_number_of_partitions_is_adopted(admin: Admin, make: Make) -> None:
    process = make(partitions=5)
    Kept(process, "a", doc={"n": 1})
    assert [s.resource for s in admin.sessions()] == ["test.test.a"]


@pytest.mark.slow
def test_in_a_cluster(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        cluster = Cluster()
        stack.callback(cluster.close)
        process = Process(url=cluster.url, namespace=namespace, retry=ONCE)
        stack.callback(process.stop)
        admin = stack.enter_context(Admin(cluster.url, namespace=namespace))
        monkeypatch.setattr(Kept, "broken", True)
        token = park(process, "a")
        monkeypatch.setattr(Kept, "broken", False)
        for i in range(100):
            Kept(process, f"b{i}", doc={"n": 1})
        process.lock("x").acquire()
        assert len(list(admin.sessions())) == 100
        assert [lock.name for lock in admin.locks()] == ["x"]
        assert [b.token for b in admin.batches("parked")] == [token]
        admin.discard("test.test.a", token)
        assert [act.act for act in admin.acts()] == ["discard"]
