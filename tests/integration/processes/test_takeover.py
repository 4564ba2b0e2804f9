"""Processes are killed, and the others finish what they have begun."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from phonon import Process
from phonon._core.executor import TOKENS
from support.member import BEAT, PROMISED, SLACK, Crew, Entry, Member
from support.nodes import Cluster
from support.world import Redis, key_for, wait_until


@pytest.fixture
def crew(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(server.url, namespace, tmp_path) as crew:
        yield crew


@pytest.fixture
def admin(server: Redis) -> Iterator["redis.Redis"]:
    with server.client() as client:
        yield client


@pytest.fixture
def all_keys(admin: "redis.Redis", namespace: str) -> Callable[[], set[str]]:
    """All keys of the namespace, but for its settings and last tokens."""

    def find() -> set[str]:
        found = (key.decode() for key in admin.scan_iter(match=f"{{{namespace}*", count=1000))
        return {key for key in found if not key.endswith((":partitions", ":token"))}

    return find


def running_token(process: Process, resource: str) -> int:
    """The token of the batch of a resource that is being executed."""
    return TOKENS * int(process.client.hget(key_for(process, "running", resource), "token"))


def is_dead(process: Process, member: Member) -> bool:
    """Return whether a member is not listed any more."""
    return process.client.zscore(process.heartbeat_hash_name, member.id) is None


# Resources of a dead process


def test_a_member_that_was_killed_is_dropped(crew: Crew) -> None:
    doomed, survivor = crew.member(), crew.process()
    reference = survivor.create_reference("x")
    doomed.do("join", "x")
    assert reference.count() == 2
    doomed.kill()
    begun = time.monotonic()
    wait_until(lambda: reference.count() == 1)
    assert time.monotonic() - begun < PROMISED + SLACK
    assert [holder.id for holder in reference.holders()] == [survivor.id]
    assert reference.dereference()


def test_a_waiter_gets_the_lock_of_a_holder_that_was_killed(crew: Crew) -> None:
    doomed, survivor = crew.member(), crew.process()
    token = doomed.do("acquire", "x")
    with ThreadPoolExecutor(1) as pool:
        lock = survivor.lock("x")
        waiting = pool.submit(lock.acquire)
        wait_until(lock.waiters)
        doomed.kill()
        begun = time.monotonic()
        assert waiting.result(30)
    assert time.monotonic() - begun < PROMISED + SLACK, "its lease runs for a minute"
    assert lock.token is not None
    assert lock.token > token
    lock.release()


@pytest.mark.parametrize("member", [True, False])
def test_a_waiter_that_was_killed_holds_nobody_up(
    member: bool, crew: Crew, admin: "redis.Redis"
) -> None:
    holder, doomed, survivor = crew.process(), crew.member(), crew.process()
    queue = key_for(holder, "queue", "x")
    lock, next_one = holder.lock("x"), survivor.lock("x")
    assert lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        if member:
            doomed.do("join", "x")
        doomed.begin("acquire", "x")
        wait_until(lambda: admin.zcard(queue) == 1)
        waiting = pool.submit(next_one.acquire, timeout=20)
        wait_until(lambda: admin.zcard(queue) == 2)
        doomed.kill()
        if member:  # who does nothing but wait is not responsible for anything
            wait_until(lambda: admin.zcard(queue) == 1, timeout=8)
        begun = time.monotonic()
        lock.release()
        assert waiting.result(30)
        # One that was woken has 2 s to come, and the one behind it asks every 5 s.
        assert time.monotonic() - begun < (4.5 if member else 2 + 5 + SLACK)
    next_one.release()


def test_a_batch_whose_executor_was_killed(crew: Crew) -> None:
    doomed, survivor = crew.member(), crew.process()
    doomed.do("put", "hang-a", 1)
    doomed.do("put", "hang-a", 2)
    doomed.begin("end", "hang-a")
    wait_until(lambda: crew.journal.begun("hang-a"))
    token = running_token(survivor, "test.test.hang-a")
    # Those who come meanwhile are not its business.
    later = Entry(survivor, "hang-a", doc={"n": 10})
    doomed.kill()
    crew.journal.open("hang-a")
    wait_until(crew.journal.lines)
    (line,) = crew.journal.lines()
    assert (line.doc, line.token, line.process) == ({"n": 3}, token, survivor.id)
    # Until it is complete, the next one would be left to the thread that executes it.
    wait_until(lambda: not survivor.client.exists(key_for(survivor, "running", "test.test.hang-a")))
    later.end_session()
    assert [line.doc for line in crew.journal.lines()] == [{"n": 3}, {"n": 10}]
    assert crew.journal.applied() == {"hang-a": {"n": 13}}


def test_the_partials_of_a_last_member_that_was_killed(crew: Crew) -> None:
    one, two, survivor = crew.member(), crew.member(), crew.process()
    one.do("put", "a", 1)
    two.do("put", "a", 2)
    for member in (one, two):
        member.do("put", "b", 4)
    held = Entry(survivor, "b", doc={"n": 8})
    one.kill()
    wait_until(lambda: is_dead(survivor, one))
    assert crew.journal.lines() == [], "there is still a member"
    two.kill()
    wait_until(lambda: crew.journal.lines("a"))
    wait_until(lambda: is_dead(survivor, two))
    assert not crew.journal.lines("b"), "the survivor holds it itself"
    held.end_session()
    assert crew.journal.applied() == {"a": {"n": 3}, "b": {"n": 16}}
    assert len(crew.journal.lines()) == 2


def test_a_session_that_ended_while_its_executor_was_killed(crew: Crew) -> None:
    """A batch that waits for the running batch's end goes to the survivor together with it."""
    doomed, other = crew.member(), crew.process(recover_failed_processes=False)
    doomed.do("put", "hang-a", 1)
    doomed.begin("end", "hang-a")
    wait_until(lambda: crew.journal.begun("hang-a"))
    Entry(other, "hang-a", doc={"n": 2}).end_session()
    assert crew.journal.lines() == []
    doomed.kill()
    crew.journal.open("hang-a")
    survivor = crew.process()
    wait_until(lambda: len(crew.journal.lines()) == 2)
    assert [(line.doc, line.process) for line in crew.journal.lines()] == [
        ({"n": 1}, survivor.id),
        ({"n": 2}, survivor.id),
    ]
    first, second = crew.journal.lines()
    assert first.token < second.token


def test_a_batch_that_failed_is_tried_again_when_it_is_due(crew: Crew) -> None:
    retry = {"first_delay": 3.0, "longest_delay": 3.0, "jitter": 0.0}
    doomed, survivor = crew.member(retry=retry), crew.process()
    doomed.do("put", "fail-a")
    reply = doomed.begin("end", "fail-a")
    assert "no database" in str(reply.exception(20))
    failed = time.monotonic()
    crew.journal.open("fail-a")
    doomed.kill()
    wait_until(crew.journal.lines)
    assert time.monotonic() - failed > 2.5, "it is taken over long before"
    ((line),) = crew.journal.lines()
    assert (line.doc, line.process) == ({"n": 1}, survivor.id)
    wait_until(lambda: survivor.get_registry() == [])


# The processes that take over


@pytest.mark.slow
def test_survivors_share_the_work(crew: Crew) -> None:
    doomed, *survivors = (crew.member() for _ in range(4))
    doomed.do("put_many", "orphan", 2000)
    doomed.do("put_many", "slow-", 200)  # 10 s for one alone
    doomed.kill()
    begun = time.monotonic()
    wait_until(lambda: len(crew.journal.applied()) == 2200)
    assert time.monotonic() - begun < PROMISED + SLACK
    probe = crew.process(recover_failed_processes=False)
    wait_until(lambda: is_dead(probe, doomed))
    expected = [f"orphan{i}" for i in range(2000)] + [f"slow-{i}" for i in range(200)]
    assert crew.journal.applied() == {record: {"n": 1} for record in expected}
    # On a slow machine one may be declared dead itself, and go on under another id.
    pids = {line.pid for line in crew.journal.lines()}
    assert pids == {member.popen.pid for member in survivors}, "each takes some"


def test_a_process_that_comes_later_takes_over(
    crew: Crew, all_keys: Callable[[], set[str]]
) -> None:
    doomed, alone = crew.member(), crew.member()
    doomed.do("put", "a", 1)
    alone.do("put", "a", 2)
    alone.do("put", "hang-b", 4)
    alone.begin("end", "hang-b")
    wait_until(lambda: crew.journal.begun("hang-b"))
    alone.do("acquire", "lock")
    for member in (doomed, alone):
        member.kill()
    crew.journal.open("hang-b")
    probe = crew.process(recover_failed_processes=False)
    wait_until(lambda: alone.id not in alive(probe))
    probe.stop()
    assert crew.journal.lines() == []
    survivor = crew.process()
    begun = time.monotonic()
    wait_until(lambda: len(crew.journal.lines()) == 2)
    assert time.monotonic() - begun < BEAT + SLACK
    assert crew.journal.applied() == {"a": {"n": 3}, "hang-b": {"n": 4}}
    assert survivor.lock("lock", block=False).acquire()
    wait_until(lambda: is_dead(survivor, alone) and is_dead(survivor, doomed))


def alive(process: Process) -> set[str]:
    """Return the processes that are alive by the server's clock."""
    seconds, micros = process.client.time()
    now = seconds * 1000 + micros // 1000
    found = process.client.zrangebyscore(process.heartbeat_hash_name, f"({now}", "+inf")
    return {name.decode() for name in found}


def test_who_is_told_not_to_executes_nothing(crew: Crew) -> None:
    """Memberships and locks are released by every process."""
    doomed, other = crew.member(), crew.process(recover_failed_processes=False)
    reference = other.create_reference("x")
    doomed.do("put", "a", 1)
    doomed.do("join", "x")
    doomed.do("acquire", "lock")
    doomed.kill()
    assert other.lock("lock").acquire(timeout=PROMISED + SLACK)
    wait_until(lambda: reference.count() == 1)
    first = other.client.zscore(other.heartbeat_hash_name, other.id)
    wait_until(  # several heartbeats later
        lambda: other.client.zscore(other.heartbeat_hash_name, other.id) > first + 3_000_000 * BEAT
    )
    assert crew.journal.lines() == []
    assert not is_dead(other, doomed), "its batch is for those that execute"
    crew.process()
    wait_until(crew.journal.lines)
    assert crew.journal.applied() == {"a": {"n": 1}}
    wait_until(lambda: is_dead(other, doomed))


def test_a_clean_stop_leaves_nothing(crew: Crew, all_keys: Callable[[], set[str]]) -> None:
    members = [crew.member() for _ in range(2)]
    for member in members:
        member.do("put", "a")
        member.do("join", "x")
        member.do("acquire", f"lock of {member.id}")
        member.do("put_many", "many", 20)
    assert all_keys()
    for member in members:
        member.do("stop")
    assert all_keys() == set(), "no registry, no card, no tombstone, no epoch"
    assert crew.journal.applied() == {"a": {"n": 2}} | {f"many{i}": {"n": 2} for i in range(20)}


def test_nothing_but_a_tombstone_is_left_of_the_dead(
    crew: Crew, all_keys: Callable[[], set[str]], admin: "redis.Redis"
) -> None:
    doomed, survivor = crew.member(), crew.process()
    doomed.do("put", "a")
    doomed.do("join", "x")
    doomed.do("acquire", "lock")
    doomed.do("modify", "x")
    doomed.kill()

    def is_tombstone(key: str) -> bool:
        """Return whether a key is the dead process's fenced lane, which expires by itself."""
        return (
            key.endswith(f":lane:{doomed.id}")
            and bool(admin.hexists(key, "fenced"))
            and int(admin.pttl(key)) > 24 * 3600 * 1000
        )

    wait_until(lambda: is_dead(survivor, doomed))
    survivor.stop()
    assert all_keys()
    wait_until(lambda: all(is_tombstone(key) for key in all_keys()))
    assert crew.journal.applied() == {"a": {"n": 1}}


# While it takes over


def test_the_heart_beats_on_while_it_executes_what_others_have_left(crew: Crew) -> None:
    doomed, survivor = crew.member(), crew.process()
    doomed.do("put_many", "slow-", 60)  # 3 s: many times what it may be silent for
    doomed.kill()
    wait_until(crew.journal.lines)

    def done() -> bool:
        assert survivor.id in alive(survivor), "it was starved"
        return len(crew.journal.lines()) == 60 and is_dead(survivor, doomed)

    name = survivor.id
    wait_until(done)
    assert survivor.id == name
    assert len({line.record for line in crew.journal.lines()}) == 60


@pytest.mark.slow
def test_a_survivor_that_is_killed_while_it_takes_over(crew: Crew) -> None:
    doomed, second = crew.member(), crew.member()
    doomed.do("put_many", "slow-", 40)
    doomed.do("put", "hang-a")
    doomed.begin("end", "hang-a")
    wait_until(lambda: crew.journal.begun("hang-a"))
    third = crew.process(recover_failed_processes=False)
    token = running_token(third, "test.test.hang-a")
    doomed.kill()
    wait_until(lambda: len(crew.journal.lines()) >= 3)
    second.kill()
    crew.journal.open("hang-a")
    survivor = crew.process()
    wait_until(lambda: is_dead(survivor, doomed) and is_dead(survivor, second), timeout=30)
    wait_until(lambda: len(crew.journal.applied()) == 41)
    assert all(doc == {"n": 1} for doc in crew.journal.applied().values())
    # Some may have been written before their executor could say so: under the same token.
    tokens = {(line.record, line.token) for line in crew.journal.lines()}
    assert len(tokens) == 41
    assert crew.journal.lines("hang-a")[-1].token == token


# In a cluster


@pytest.fixture
def spread(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(cluster.url, namespace, tmp_path) as crew:
        yield crew


def test_takeover_in_a_cluster(spread: Crew, cluster: Cluster, namespace: str) -> None:
    doomed, survivor = spread.member(), spread.process()
    reference = survivor.create_reference("x")
    doomed.do("join", "x")
    doomed.do("put_many", "orphan", 60)
    doomed.do("put", "hang-a", 3)
    doomed.begin("end", "hang-a")
    doomed.do("acquire", "lock")
    wait_until(lambda: spread.journal.begun("hang-a"))
    token = running_token(survivor, "test.test.hang-a")
    doomed.kill()
    begun = time.monotonic()
    spread.journal.open("hang-a")
    wait_until(lambda: len(spread.journal.lines()) == 61)
    assert survivor.lock("lock").acquire(timeout=10)
    wait_until(lambda: reference.count() == 1)
    assert time.monotonic() - begun < PROMISED + SLACK
    assert [(line.token, line.doc) for line in spread.journal.lines("hang-a")] == [
        (token, {"n": 3})
    ]
    wait_until(lambda: is_dead(survivor, doomed))
    survivor.stop()
    left = {name.partition("}:")[2] for name in cluster.scan(f"{{{namespace}*")}
    # The fence refuses what a dead process may still have on its way. A busy machine may have kept
    # the survivor from beating, too.
    former = {f"lane:{old.decode()}" for old in survivor.engine.identity.former}
    assert left <= {"partitions", "token", f"lane:{doomed.id}", *former}


@pytest.mark.slow
def test_survivors_share_the_work_in_a_cluster(spread: Crew) -> None:
    doomed, *survivors = (spread.member() for _ in range(3))
    doomed.do("put_many", "orphan", 1000)
    doomed.do("put_many", "slow-", 100)
    doomed.kill()
    wait_until(lambda: len(spread.journal.applied()) == 1100)
    probe = spread.process(recover_failed_processes=False)
    wait_until(lambda: is_dead(probe, doomed))
    expected = [f"orphan{i}" for i in range(1000)] + [f"slow-{i}" for i in range(100)]
    assert spread.journal.applied() == {record: {"n": 1} for record in expected}
    # On a slow machine one may be declared dead itself, and go on under another id.
    pids = {line.pid for line in spread.journal.lines()}
    assert pids == {member.popen.pid for member in survivors}, "each takes some"
