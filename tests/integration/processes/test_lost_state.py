"""A server that comes back without its data, and one that comes back with it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from phonon import Process
from phonon.errors import LockLostError, ServerStateLostError
from support.member import Crew, Entry
from support.world import Redis, wait_until


@pytest.fixture
def crew(own_server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(own_server.url, namespace, tmp_path) as crew:
        yield crew


@pytest.fixture
def safe_server() -> Iterator[Redis]:
    """A server that keeps its data."""
    server = Redis("--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.close()


def lost(told: list[Exception]) -> list[Exception]:
    return [error for error in told if isinstance(error, ServerStateLostError)]


def test_processes_register_again(own_server: Redis, crew: Crew) -> None:
    told: list[Exception] = []
    process, other = crew.process(on_error=told.append), crew.process()
    id_ = process.id
    reference, there = process.create_reference("x"), other.create_reference("x")
    stored = Entry(process, "a", doc={"n": 1})
    stored.refresh(Entry(process, "a", doc={"n": 2}, init_cache=False))
    lock = process.lock("lock")
    assert lock.acquire()
    own_server.kill()
    own_server.start()
    wait_until(lambda: lost(told))
    wait_until(lambda: reference.count() == 2)
    wait_until(lambda: {h.id for h in reference.holders()} == {process.id, other.id})
    assert process.id != id_, "a process whose data is lost is another one"
    assert {holder.pid for holder in reference.holders()} != {None}, "their cards are back"
    with own_server.client() as client:
        # Nothing stays but that its calls are refused, for a week.
        old = [key for key in client.scan_iter() if id_.encode() in key]
        wait_until(lambda: not [key for key in old if client.pttl(key) == -1])
    wait_until(lambda: any(isinstance(error, LockLostError) for error in told))
    assert not lock.owned()
    with pytest.raises(LockLostError):
        lock.release()
    assert lock.acquire()
    lock.release()
    wait_until(lambda: sorted(process.get_registry()) == ["test.test.a", "x"])
    stored.end_session()
    assert crew.journal.applied() == {"a": {"n": 2}}, "what was only there is lost"
    for _ in range(3):
        wait_until(partial(is_later, process, deadline(process)))
    assert len(lost(told)) == 1, "it is said once"
    assert f"has lost the last 3 calls of process {id_}" in str(lost(told)[0])
    assert "has lost its 1 locks" in str(lost(told)[0])
    assert not there.dereference()
    assert reference.dereference()


def deadline(process: Process) -> float:
    return float(process.client.zscore(process.heartbeat_hash_name, process.id) or 0)


def is_later(process: Process, last: float) -> bool:
    return deadline(process) > last


def test_a_flushed_database_is_a_loss_too(own_server: Redis, crew: Crew) -> None:
    told: list[Exception] = []
    process = crew.process(on_error=told.append)
    reference = process.create_reference("x")
    with own_server.client() as client:
        client.flushall()
    wait_until(lambda: lost(told))
    wait_until(lambda: reference.count() == 1)
    assert len(told) == 1


def test_a_batch_that_is_executed_while_its_data_is_lost(own_server: Redis, crew: Crew) -> None:
    """It is written, and its executor is told that the server does not know it any more."""
    member = crew.member()
    member.do("put", "hang-a", 5)
    ending = member.begin("end", "hang-a")
    wait_until(lambda: crew.journal.begun("hang-a"))
    own_server.kill()
    own_server.start()
    crew.journal.open("hang-a")
    assert ending.exception(20) is None
    assert [line.doc for line in crew.journal.lines()] == [{"n": 5}]
    wait_until(lambda: member.told("BatchLostError"))
    wait_until(lambda: member.told("ServerStateLostError"))
    assert member.do("id") != member.id
    member.do("put", "hang-a", 1)
    member.do("end", "hang-a")
    assert crew.journal.applied() == {"hang-a": {"n": 6}}


def test_work_goes_on_after_a_loss(own_server: Redis, crew: Crew) -> None:
    members = [crew.member(retry_timeout=20) for _ in range(2)]
    for member in members:
        member.do("put_many", "r", 20)
        for i in range(20):
            member.do("keep", f"r{i}", 100)
    own_server.kill()
    own_server.start()
    for member in members:
        for i in range(20):
            member.do("end", f"r{i}")
        wait_until(partial(member.told, "ServerStateLostError"))
    sums = crew.journal.applied()
    # A process that ended before the other's heartbeat had renewed its membership was alone.
    assert sums == {f"r{i}": {"n": 200} for i in range(20)}, "all that was local"
    for member in members:
        member.do("stop")


def test_a_server_that_keeps_its_data_loses_nothing(
    safe_server: Redis, namespace: str, tmp_path: Path
) -> None:
    with Crew(safe_server.url, namespace, tmp_path) as crew:
        members = [crew.member(retry_timeout=20) for _ in range(2)]
        for member in members:
            member.do("put_many", "r", 50)
            member.do("put", "a")
            member.do("join", "x")
        members[0].do("acquire", "lock")
        members[0].do("put", "hang-b", 7)
        ending = members[0].begin("end", "hang-b")
        wait_until(lambda: crew.journal.begun("hang-b"))
        for _ in range(2):
            safe_server.kill()
            safe_server.start()
            for member in members:
                member.do("put", "a")
        crew.journal.open("hang-b")
        assert ending.exception(20) is None
        assert members[1].do("count", "x") == 2
        assert members[0].do("owned", "lock") is True
        members[0].do("release", "lock")
        for member in members:
            assert member.do("told") == []
            assert member.do("id") == member.id
            member.do("stop")
        expected = {f"r{i}": {"n": 2} for i in range(50)} | {"a": {"n": 6}, "hang-b": {"n": 7}}
        assert crew.journal.applied() == expected
        assert len(crew.journal.lines()) == len(expected), "each once"


def test_killed_all_together(safe_server: Redis, namespace: str, tmp_path: Path) -> None:
    """The server and all its clients: what was acknowledged is executed by who comes next."""
    with Crew(safe_server.url, namespace, tmp_path) as crew:
        members = [crew.member() for _ in range(2)]
        for member in members:
            member.do("put_many", "r", 30)
        members[0].do("put", "hang-a", 3)
        members[0].begin("end", "hang-a")
        wait_until(lambda: crew.journal.begun("hang-a"))
        safe_server.kill()
        for member in members:
            member.kill()
        crew.journal.open("hang-a")
        safe_server.start()
        survivor = crew.process()
        wait_until(lambda: len(crew.journal.lines()) >= 31)
        expected = {f"r{i}": {"n": 2} for i in range(30)} | {"hang-a": {"n": 3}}
        assert crew.journal.applied() == expected
        assert {line.process for line in crew.journal.lines()} == {survivor.id}
