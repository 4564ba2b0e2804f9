"""Batches of classes that their owner has not imported are left to a process that has."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phonon import Process, RetryPolicy
from phonon._core import classes
from phonon._core.executor import TOKENS
from phonon.errors import UnknownClassError
from support.member import Crew, Entry, Member, learn
from support.nodes import Cluster
from support.world import Redis, key_for, keys_in, wait_until


@pytest.fixture
def crew(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(server.url, namespace, tmp_path) as crew:
        yield crew


def expert(crew: Crew, *names: str) -> Member:
    """A member that knows classes which this process does not."""
    member = crew.member()
    for name in names:
        member.do("learn", name)
    return member


def is_dead(process: Process, member: Member) -> bool:
    return process.client.zscore(process.heartbeat_hash_name, member.id) is None


def heirs(process: Process) -> list[bytes]:
    """The classes that batches are left to."""
    names: set[bytes] = set()
    for prefix in process.engine.identity.partitions.prefixes:
        names |= process.client.smembers(prefix + b"handed")
    return sorted(names)


def test_a_dead_ones_batches_are_left_to_who_knows_their_class(
    crew: Crew, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Exception] = []
    doomed, survivor = expert(crew, "Rare"), crew.process(on_error=told.append)
    for i in range(5):
        doomed.do("put", f"r{i}", 1, "Rare")
    doomed.do("put", "common", 1)
    doomed.do("put", "hang-r", 1, "Rare")
    doomed.begin("end", "hang-r")
    wait_until(lambda: crew.journal.begun("hang-r"))
    token = int(survivor.client.hget(key_for(survivor, "running", "test.test.hang-r"), "token"))
    with caplog.at_level(logging.WARNING, "phonon"):
        doomed.kill()
        crew.journal.open("hang-r")
        wait_until(lambda: is_dead(survivor, doomed))
        wait_until(lambda: crew.journal.lines("common") and told)
        wait_until(lambda: survivor.get_registry() == [])
    assert {line.record for line in crew.journal.lines()} == {"common"}
    assert heirs(survivor) == [b"class:support.member.Rare"]
    said = [record.message for record in caplog.records if "Rare" in record.message]
    assert len(said) == 1, "once, not for each of them"
    assert "batches of support.member.Rare are left to a process that has imported it" in said[0]
    assert [type(error) for error in told] == [UnknownClassError]
    assert survivor.parked() == []
    # Somebody starts who knows it.
    later = expert(crew, "Rare")
    wait_until(lambda: len(crew.journal.lines()) == 7)
    assert crew.journal.applied() == {
        **{f"r{i}": {"n": 1} for i in range(5)},
        "common": {"n": 1},
        "hang-r": {"n": 1},
    }
    assert {line.process for line in crew.journal.lines()} == {survivor.id, later.id}
    assert crew.journal.lines("hang-r")[0].token == token * TOKENS, "the same as before"
    wait_until(lambda: heirs(survivor) == [])


def test_one_who_is_there_already_has_them_at_once(crew: Crew) -> None:
    ignorant = [crew.process() for _ in range(2)]
    doomed, knowing = expert(crew, "Rare"), expert(crew, "Rare")
    for i in range(20):
        doomed.do("put", f"r{i}", 1, "Rare")
    doomed.kill()
    wait_until(lambda: len(crew.journal.lines()) == 20)
    assert {line.process for line in crew.journal.lines()} == {knowing.id}
    wait_until(lambda: is_dead(ignorant[0], doomed) and heirs(ignorant[0]) == [])
    assert len({line.record for line in crew.journal.lines()}) == 20


def test_the_last_one_out_does_not_know_what_the_others_have_stored(
    crew: Crew, server: Redis, namespace: str
) -> None:
    knowing, process = expert(crew, "Rare"), crew.process()
    reference = process.create_reference("test.test.r")
    knowing.do("put", "r", 3, "Rare")
    knowing.do("end", "r")
    assert reference.dereference()
    wait_until(crew.journal.lines)
    (line,) = crew.journal.lines()
    assert (line.doc, line.process) == ({"n": 3}, knowing.id)
    assert process.parked() == []
    knowing.do("stop")
    process.stop()
    assert keys_in(server, namespace) == set()


def test_the_owner_of_the_running_batch_does_not_know_the_next_ones_class(crew: Crew) -> None:
    knowing = expert(crew, "Rare")
    owner = crew.member()
    owner.do("put", "hang-a", 1)
    owner.begin("end", "hang-a")
    wait_until(lambda: crew.journal.begun("hang-a"))
    # It ends while the other's batch is running, whose owner is to go on with it.
    knowing.do("put", "hang-a", 2, "Rare")
    knowing.do("end", "hang-a")
    assert crew.journal.lines() == []
    crew.journal.open("hang-a")
    wait_until(lambda: len(crew.journal.lines()) == 2)
    first, second = crew.journal.lines()
    assert (first.doc, first.process) == ({"n": 1}, owner.id)
    assert (second.doc, second.process) == ({"n": 2}, knowing.id)
    assert first.token < second.token
    owner.do("put", "hang-a", 4)
    owner.do("end", "hang-a")
    assert crew.journal.applied() == {"hang-a": {"n": 7}}


def test_what_is_local_is_not_held_up_by_what_is_left_to_others(crew: Crew) -> None:
    """A resource goes on for those who know its class, as soon as somebody has the batch."""
    process = crew.process()
    knowing = expert(crew, "Rare")
    knowing.do("put", "r", 1, "Rare")
    knowing.kill()
    wait_until(lambda: heirs(process))
    Entry(process, "r", doc={"n": 2}).end_session()
    assert crew.journal.lines() == [], "batches run in order"
    expert(crew, "Rare")
    wait_until(lambda: len(crew.journal.lines()) == 2)
    assert [line.doc for line in crew.journal.lines()] == [{"n": 1}, {"n": 2}]


def test_an_heir_for_each_class(crew: Crew) -> None:
    doomed, process = expert(crew, "Rare", "Other"), crew.process()
    doomed.do("put", "a", 1, "Rare")
    doomed.do("put", "b", 2, "Other")
    doomed.kill()
    wait_until(
        lambda: heirs(process) == [b"class:support.member.Other", b"class:support.member.Rare"]
    )
    expert(crew, "Other")
    wait_until(crew.journal.lines)
    wait_until(lambda: heirs(process) == [b"class:support.member.Rare"])
    assert crew.journal.applied() == {"b": {"n": 2}}
    expert(crew, "Rare")
    wait_until(lambda: heirs(process) == [] and len(crew.journal.lines()) == 2)
    assert crew.journal.applied() == {"a": {"n": 1}, "b": {"n": 2}}


def test_an_heirs_heir_may_die_too(crew: Crew) -> None:
    first, process = expert(crew, "Rare"), crew.process()
    first.do("put", "hang-a", 1, "Rare")
    first.kill()
    wait_until(lambda: heirs(process))
    second = expert(crew, "Rare")
    wait_until(lambda: crew.journal.begun("hang-a"))
    second.kill()
    crew.journal.open("hang-a")
    wait_until(lambda: is_dead(process, second))
    assert crew.journal.lines() == []
    expert(crew, "Rare")
    wait_until(crew.journal.lines)
    assert crew.journal.applied() == {"hang-a": {"n": 1}}
    wait_until(lambda: heirs(process) == [])


def test_a_class_that_is_imported_later(crew: Crew) -> None:
    """In the process that has left it to others: it is one of those then."""
    doomed, process = expert(crew, "Late"), crew.process()
    doomed.do("put", "a", 1, "Late")
    doomed.kill()
    wait_until(lambda: heirs(process))
    kind = learn("Late")
    wait_until(crew.journal.lines)
    assert crew.journal.lines()[0].process == process.id
    assert kind.__qualname__ == "Late"
    wait_until(lambda: heirs(process) == [])


def test_a_clean_stop_leaves_an_heir_what_it_has(
    crew: Crew,
) -> None:
    """The last process goes, and nobody knows the class: the batch waits for who comes."""
    kind = learn("Gone")
    process = crew.process()
    kind(process, "a", doc={"n": 1})
    classes.forget(kind)
    with pytest.raises(UnknownClassError, match="import it"):
        process.stop()
    probe = crew.process()
    assert probe.client.zrange(probe.heartbeat_hash_name, 0, -1) == [probe.id.encode()]
    assert heirs(probe) == [b"class:support.member.Gone"]
    expert(crew, "Gone")
    wait_until(crew.journal.lines)
    assert crew.journal.applied() == {"a": {"n": 1}}


def test_heirs_in_a_cluster(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with Crew(cluster.url, namespace, tmp_path) as crew:
        doomed, process = expert(crew, "Rare"), crew.process()
        for i in range(10):
            doomed.do("put", f"r{i}", 1, "Rare")
        doomed.kill()
        wait_until(lambda: is_dead(process, doomed))
        assert heirs(process) == [b"class:support.member.Rare"]
        assert crew.journal.lines() == []
        expert(crew, "Rare")
        wait_until(lambda: len(crew.journal.lines()) == 10)
        assert crew.journal.applied() == {f"r{i}": {"n": 1} for i in range(10)}
        wait_until(lambda: heirs(process) == [])


# The delays between attempts


def test_delays_double_up_to_the_longest() -> None:
    policy = RetryPolicy(first_delay=1.0, longest_delay=10.0)
    assert [policy.delay(n) for n in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert policy.delay(10**6) == 10.0


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_jitter_shortens_a_delay_within_its_bounds(jitter: float) -> None:
    policy = RetryPolicy(first_delay=1.0, longest_delay=4.0, jitter=jitter)
    for failed in range(1, 5):
        delay = policy.delay(failed)
        pauses = [policy.pause(failed) for _ in range(500)]
        assert all(delay * (1 - jitter) <= pause <= delay for pause in pauses)
        if jitter:
            assert len(set(pauses)) > 400
            spread = max(pauses) - min(pauses)
            assert spread > 0.8 * jitter * delay, "all of the range is used"
        else:
            assert set(pauses) == {delay}


def test_attempts_keep_the_delays(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    process = crew.process(retry=RetryPolicy(attempts=5, first_delay=0.02, longest_delay=0.1))
    executor = process.engine.executor
    schedule = executor._schedule

    def note(batch: Any, seconds: float) -> None:
        asked.append(seconds)
        schedule(batch, seconds)

    monkeypatch.setattr(executor, "_schedule", note)
    with pytest.raises(OSError, match="no database"):
        Entry(process, "fail-a", doc={"n": 1}).end_session()
    wait_until(process.parked)
    for seconds, longest in zip(asked, [0.02, 0.04, 0.08, 0.1], strict=True):
        assert longest / 2 <= seconds <= longest
