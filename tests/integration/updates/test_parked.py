"""Batches that were given up on: listed, looked into, replayed, discarded."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phonon import Parked, Process, RetryPolicy
from phonon._core.executor import TOKENS
from phonon.errors import (
    BatchMissingError,
    BatchRunningError,
    UndecodableError,
    UnknownClassError,
)
from support.member import Crew, Entry, learn
from support.nodes import Cluster
from support.world import Redis, key_for, keys_in, retry_now, wait_until

SOON = RetryPolicy(attempts=3, first_delay=0.01, longest_delay=0.02)
ONCE = RetryPolicy(attempts=1)
HOURLY = RetryPolicy(attempts=3, first_delay=3600, longest_delay=3600, jitter=0)


@pytest.fixture
def crew(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(server.url, namespace, tmp_path) as crew:
        yield crew


def park(process: Process, record: str = "fail-a", n: int = 1) -> Parked:
    """Have a batch parked at its first attempt."""
    with pytest.raises(OSError, match=f"no database for {record}"):
        Entry(process, record, doc={"n": n}).end_session()
    return next(
        entry for entry in reversed(process.parked()) if entry.resource == f"test.test.{record}"
    )


def test_what_is_listed(crew: Crew) -> None:
    process, other = crew.process(retry=SOON), crew.process()
    before = time.time()
    held = Entry(other, "fail-a", doc={"n": 2})
    update = Entry(process, "fail-a", doc={"n": 1})
    held.end_session()
    with pytest.raises(OSError, match="no database"):
        update.end_session()
    wait_until(process.parked)
    (entry,) = process.parked()
    assert other.parked() == [entry], "everybody sees it"
    assert entry.resource == "test.test.fail-a"
    assert entry.error == "OSError: no database for fail-a"
    assert (entry.attempts, entry.owner, entry.size) == (3, process.id, 2)
    assert before - 1 < entry.since <= entry.parked_at < time.time() + 1
    assert entry.token > 0
    wait_until(lambda: process.get_registry() == [])


def test_what_is_inside(crew: Crew) -> None:
    process, other = crew.process(retry=ONCE), crew.process()
    held = Entry(other, "fail-a", spec={"id": 1}, doc={"n": 2})
    update = Entry(process, "fail-a", spec={"id": 1}, doc={"n": 1})
    held.end_session()
    with pytest.raises(OSError, match="no database"):
        update.end_session()
    (entry,) = other.parked()
    looked = other.look(entry.resource, entry.token)
    assert [(type(one), one._id, one.spec, one.doc) for one in looked] == [
        (Entry, "fail-a", {"id": 1}, {"n": 2}),
        (Entry, "fail-a", {"id": 1}, {"n": 1}),
    ]
    assert other.parked() == [entry], "to look changes nothing"
    assert other.get_registry() == []


def test_a_long_one_is_looked_into_whole(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    process = crew.process(retry=ONCE)
    merge = process.engine.codec.merge
    monkeypatch.setattr(process.engine.codec, "merge", lambda _, partials: partials)  # on the way
    update = Entry(process, "fail-a", doc={"n": 0})
    for i in range(1, 1203):
        update.doc = {"n": i}
        update.cache()
    with pytest.raises(OSError, match="no database"):
        update.end_session()
    (entry,) = process.parked()
    assert entry.size == 1203
    looked = process.look(entry.resource, entry.token)
    assert [one.doc["n"] for one in looked] == list(range(1203))
    monkeypatch.setattr(process.engine.codec, "merge", merge)
    crew.journal.open("fail-a")
    process.replay(entry.resource, entry.token)
    assert crew.journal.applied() == {"fail-a": {"n": sum(range(1203))}}


def test_it_holds_nothing_up(crew: Crew) -> None:
    process = crew.process(retry=ONCE)
    entry = park(process)
    Entry(process, "b", doc={"n": 1}).end_session()
    crew.journal.open("fail-a")
    Entry(process, "fail-a", doc={"n": 2}).end_session()
    (later,) = crew.journal.lines("fail-a")
    assert later.doc == {"n": 2}
    assert later.token > entry.token
    assert process.parked() == [entry]


def test_a_session_that_ended_meanwhile_goes_on(crew: Crew) -> None:
    process, other = crew.process(retry=HOURLY._replace(attempts=2)), crew.process()
    with pytest.raises(OSError, match="no database"):
        Entry(process, "fail-a", doc={"n": 1}).end_session()
    Entry(other, "fail-a", doc={"n": 2}).end_session()
    assert crew.journal.lines() == []
    assert process.parked() == []
    process.engine.executor._policy = HOURLY._replace(attempts=1)
    retry_now(process)
    first, second = process.parked()
    assert first.token < second.token
    assert [entry.attempts for entry in (first, second)] == [2, 1]
    assert [process.look(*entry[:2])[0].doc for entry in (first, second)] == [{"n": 1}, {"n": 2}]


def test_replay(crew: Crew) -> None:
    process, other = crew.process(retry=ONCE), crew.process()
    entry = park(process, n=1)
    crew.journal.open("fail-a")
    Entry(process, "fail-a", doc={"n": 2}).end_session()
    other.replay(entry.resource, entry.token)
    later, replayed = crew.journal.lines()
    assert (later.doc, replayed.doc) == ({"n": 2}, {"n": 1})
    assert replayed.token > later.token > entry.token
    assert replayed.process == other.id
    assert crew.journal.applied() == {"fail-a": {"n": 3}}, "a database that checks accepts it"
    assert other.parked() == []
    assert other.get_registry() == []
    with pytest.raises(BatchMissingError, match="no parked batch"):
        other.replay(entry.resource, entry.token)


def test_a_replay_that_fails_again(crew: Crew) -> None:
    process = crew.process(retry=ONCE)
    entry = park(process)
    with pytest.raises(OSError, match="no database") as raised:
        process.replay(entry.resource, entry.token)
    assert any("is parked" in note for note in raised.value.__notes__)
    (again,) = process.parked()
    assert again.token > entry.token
    assert (again.resource, again.size, again.attempts) == (entry.resource, 1, 1)
    with pytest.raises(BatchMissingError):
        process.look(entry.resource, entry.token)
    crew.journal.open("fail-a")
    process.replay(again.resource, again.token)
    assert [line.doc for line in crew.journal.lines()] == [{"n": 1}]


def test_a_replay_is_tried_again_like_any_batch(crew: Crew) -> None:
    process = crew.process(retry=ONCE)
    entry = park(process)
    patient = crew.process(retry=RetryPolicy(first_delay=0.3))
    with pytest.raises(OSError, match="no database") as raised:
        patient.replay(entry.resource, entry.token)
    assert any("is tried again in" in note for note in raised.value.__notes__)
    assert patient.parked() == []
    crew.journal.open("fail-a")
    wait_until(crew.journal.lines)
    assert crew.journal.applied() == {"fail-a": {"n": 1}}


def test_a_replay_whose_process_dies(crew: Crew) -> None:
    process, doomed = crew.process(retry=ONCE), crew.member()
    entry = park(process, "fail-a", 5)
    # It fails there, waits for its next attempt, and is taken over.
    replaying = doomed.begin("replay", entry.resource, entry.token)
    assert "no database" in str(replaying.exception(20))
    assert process.parked() == []
    crew.journal.open("fail-a")
    doomed.kill()
    wait_until(crew.journal.lines)
    assert crew.journal.applied() == {"fail-a": {"n": 5}}


@pytest.mark.parametrize("call", ["replay", "look", "discard"])
def test_one_that_is_not_there(call: str, crew: Crew) -> None:
    process = crew.process(retry=ONCE)
    entry = park(process)
    with pytest.raises(BatchMissingError, match=f"has no parked batch {entry.token + 1}"):
        getattr(process, call)(entry.resource, entry.token + 1)
    with pytest.raises(LookupError, match="'nothing' has no parked batch"):
        getattr(process, call)("nothing", entry.token)
    assert process.parked() == [entry]
    assert process.get_registry() == []


def test_not_beside_another_batch(crew: Crew) -> None:
    process = crew.process(retry=ONCE)
    entry = park(process)
    other = crew.member(retry={"first_delay": 3600, "longest_delay": 3600})
    other.do("put", "fail-a", 2)
    assert "no database" in str(other.begin("end", "fail-a").exception(20))
    with pytest.raises(BatchRunningError, match=f"replay {entry.token} when it is done"):
        process.replay(entry.resource, entry.token)
    assert process.parked() == [entry]
    assert process.get_registry() == []
    crew.journal.open("fail-a")
    other.do("stop")
    process.replay(entry.resource, entry.token)
    assert [line.doc for line in crew.journal.lines()] == [{"n": 2}, {"n": 1}]


def test_discard(crew: Crew, server: Redis, namespace: str) -> None:
    process = crew.process(retry=ONCE)
    first, second = park(process, n=1), park(process, n=2)
    assert process.parked() == [first, second]
    process.discard(first.resource, first.token)
    assert process.parked() == [second]
    process.discard(second.resource, second.token)
    assert process.parked() == []
    with pytest.raises(BatchMissingError):
        process.discard(first.resource, first.token)
    process.stop()
    assert keys_in(server, namespace) == set(), "nothing of them stays"


def test_many_of_many_resources(crew: Crew) -> None:
    process = crew.process(retry=ONCE)
    entries = [park(process, f"fail-{name}", n) for name in "cab" for n in (1, 2)]
    listed = process.parked()
    assert listed == sorted(entries)
    assert [entry.resource[-1] for entry in listed] == list("aabbcc")
    for name in "abc":
        crew.journal.open(f"fail-{name}")
    for entry in listed:
        process.replay(entry.resource, entry.token)
    assert crew.journal.applied() == {f"fail-{name}": {"n": 3} for name in "abc"}


def test_parked_batches_outlive_their_processes(crew: Crew) -> None:
    doomed = crew.member(retry={"attempts": 1})
    doomed.do("put", "fail-a", 3)
    assert "no database" in str(doomed.begin("end", "fail-a").exception(20))
    doomed.kill()
    process = crew.process()
    (entry,) = process.parked()
    assert entry.owner == doomed.id
    crew.journal.open("fail-a")
    process.replay(entry.resource, entry.token)
    assert crew.journal.applied() == {"fail-a": {"n": 3}}


def test_what_cannot_be_read_is_parked_at_once(crew: Crew) -> None:
    process = crew.process()
    update = Entry(process, "a", doc={"n": 1})
    process.client.rpush(key_for(process, "partials", "test.test.a"), b"\xc1 nothing of ours")
    with pytest.raises(UndecodableError):
        update.end_session()
    (entry,) = process.parked()
    assert entry.error.startswith("UndecodableError: ")
    assert "test.test.a" in entry.error
    assert (entry.attempts, entry.size) == (1, 2)
    with pytest.raises(UndecodableError, match=f"dead:{entry.token // TOKENS}:test.test.a"):
        process.look(entry.resource, entry.token)
    process.discard(entry.resource, entry.token)


def test_one_of_a_class_that_is_not_known_here(crew: Crew) -> None:
    member, process = crew.member(retry={"attempts": 1}), crew.process()
    member.do("learn", "Foreign")
    member.do("put", "fail-a", 1, "Foreign")
    assert "no database" in str(member.begin("end", "fail-a").exception(20))
    (entry,) = process.parked()
    with pytest.raises(UnknownClassError, match=r"member\.Foreign"):
        process.look(entry.resource, entry.token)
    kind = learn("Foreign")
    assert [type(update) for update in process.look(entry.resource, entry.token)] == [kind]
    crew.journal.open("fail-a")
    process.replay(entry.resource, entry.token)
    assert crew.journal.applied() == {"fail-a": {"n": 1}}


def test_a_long_error_is_cut(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "phonon")  # pytest-xdist fails on the lone surrogate

    class Wordy(Entry):
        def execute(self) -> None:
            raise OSError("ключ\udc80" * 2000)

    process = crew.process(retry=ONCE)
    with pytest.raises(OSError, match="ключ"):
        Wordy(process, "a", doc={"n": 1}).end_session()
    (entry,) = process.parked()
    assert entry.error.startswith("OSError: ключ\\udc80ключ")
    assert len(entry.error) < 10_000
    process.discard(entry.resource, entry.token)


# A batch that kills whoever executes it


@pytest.mark.slow
def test_a_batch_that_kills_its_process_is_parked(crew: Crew) -> None:
    retry = {"crashes": 2}
    members = [crew.member(retry=retry) for _ in range(5)]
    members[0].do("put", "die-a", 7)
    members[0].do("put", "b", 1)
    members[0].begin("end", "die-a")
    probe = crew.process(recover_failed_processes=False)
    wait_until(probe.parked, timeout=30)
    (entry,) = probe.parked()
    assert entry.resource == "test.test.die-a"
    assert "3 processes have died while they executed it" in entry.error
    deaths = (crew.journal.folder / "deaths").read_text().split()
    assert deaths == ["die-a"] * 3
    living = [member for member in members if member.popen.poll() is None]
    assert len(living) == 2
    # It harms nobody any more: the rest is done, and they live on.
    wait_until(lambda: crew.journal.lines("b"))
    for member in living:
        member.do("put", "c")
        member.do("end", "c")
        member.do("stop")
    assert probe.parked() == [entry]
    assert [update.doc for update in probe.look(entry.resource, entry.token)] == [{"n": 7}]


# In a cluster


def test_parked_in_a_cluster(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with Crew(cluster.url, namespace, tmp_path) as crew:
        process, other = crew.process(retry=ONCE), crew.process()
        entries = sorted(park(process, f"fail-{i}", i + 1) for i in range(8))
        assert other.parked() == entries
        assert [other.look(*entry[:2])[0].doc for entry in entries] == [
            {"n": i + 1} for i in range(8)
        ]
        for i in range(7):
            crew.journal.open(f"fail-{i}")
            other.replay(*entries[i][:2])
        other.discard(*entries[7][:2])
        assert process.parked() == []
        assert crew.journal.applied() == {f"fail-{i}": {"n": i + 1} for i in range(7)}
        with pytest.raises(BatchMissingError):
            process.replay(*entries[0][:2])
