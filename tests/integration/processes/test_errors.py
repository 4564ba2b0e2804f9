"""A server refuses calls: each error names the remedy, and no data is lost or doubled.

What goes wrong when a connection is made is in test_connect.py.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import redis

from phonon import LruCache, Process, RetryPolicy, Update
from phonon.errors import (
    ConfigurationError,
    ConnectionLostError,
    DeclaredDeadError,
    ForeignKeyError,
    PhononError,
    ServerError,
)
from phonon.reference import Reference
from support.proxy import Fault, Proxy
from support.world import Make, Redis, is_settled, key_for, keys_in, retry_now, wait_until

#: So long that a test sees no heartbeat but those it makes.
NO_BEAT = 50
SOON = RetryPolicy(first_delay=0.01, longest_delay=0.01)
executed: list[tuple[str, int]] = []


@pytest.fixture(autouse=True)
def nothing_executed() -> None:
    executed.clear()


class Total(Update):
    """Adds up numbers."""

    def __init__(self, process: Process, record: str, n: int, **options: Any) -> None:
        super().__init__(process, record, doc={"n": n}, **options)

    def merge(self, other: Any) -> None:
        self.doc = {"n": self.doc.get("n", 0) + other.doc.get("n", 0)}

    def execute(self) -> None:
        executed.append((self._id, self.doc["n"]))


# A key of ours with somebody else's content


@dataclass
class Stage:
    """Two processes and a resource, which is the record's too."""

    make: Make
    namespace: str
    called: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"heartbeat_interval": NO_BEAT, "retry": SOON}
        self.process: Process = self.make(namespace=self.namespace, **options)
        self.other: Process = self.make(namespace=self.namespace, **options)
        self.name = "test.test.record"
        self.reference = Reference(self.process, self.name)  # which has not joined
        self.lock = self.process.lock(self.name)
        self.cache: LruCache[Total] = LruCache()

    @cached_property
    def update(self) -> Total:
        return Total(self.process, "record", 1, init_cache=False)


@dataclass
class Act:
    """A public call: what comes before it, the call, and what it must have come to.

    The call is made while a key is foreign, and again when it is so no more.
    """

    call: Callable[[Stage], Any]
    before: Callable[[Stage], Any] = lambda _: None
    total: int = 1


def ended(stage: Stage) -> None:
    stage.update.end_session()


def stored(stage: Stage) -> None:
    stage.update.cache()


def shared(stage: Stage) -> None:
    """Another process has left its partial, and we have new data."""
    Total(stage.other, "record", 2).end_session()
    stage.update.cache()
    stage.update.refresh(Total(stage.process, "record", 4, init_cache=False))


def cached(stage: Stage) -> None:
    stage.cache.set("other", Total(stage.process, "other", 1, init_cache=False))
    stage.cache.set("record", stage.update)


def batch(stage: Stage) -> None:
    with stage.process.batch():
        if not stage.called:
            stage.called.append(True)
            Total(stage.process, "record", 2)
            Total(stage.process, "other", 1)


def ended_in_a_batch(stage: Stage) -> None:
    with stage.process.batch():
        if not stage.called:
            stage.called.append(True)
            Total(stage.process, "record", 2).end_session()


def locked(stage: Stage) -> None:
    if not stage.lock.owned():
        assert stage.lock.acquire(block=False)


ACTS: dict[str, Act] = {
    "create_reference": Act(lambda stage: stage.process.create_reference(stage.name)),
    "count": Act(lambda stage: stage.reference.count()),
    "holders": Act(lambda stage: stage.reference.holders()),
    "modified_by": Act(lambda stage: stage.reference.modified_by()),
    "increment": Act(lambda stage: stage.reference.increment_times_modified()),
    "update": Act(lambda stage: Total(stage.process, "record", 2, init_cache=True), total=3),
    "cache": Act(stored),
    "end_session": Act(ended),
    "end_session after cache": Act(ended, stored),
    "end_session of all": Act(ended, shared, total=7),
    "dereference": Act(lambda stage: stage.reference.dereference(), stored),
    "callback": Act(lambda stage: stage.reference.dereference(lambda: None), stored),
    "expire_all": Act(lambda stage: stage.cache.expire_all(), cached),
    "batch": Act(batch, total=3),
    "end_session in a batch": Act(ended_in_a_batch, total=3),
    "lock": Act(locked),
    "unlock": Act(lambda stage: stage.lock.release(), locked),
    "stop": Act(lambda stage: stage.process.stop(), cached),
}


#: Calls that leave nothing to be called again.
ONCE = {"stop", "expire_all", "update"}
#: The keys of a resource.
KINDS = [
    "members",
    "left",
    "partials",
    "running",
    "batch",
    "parked",
    "parties",
    "lock",
    "shared",
    "leases",
    "queue",
    "woken",
]
#: Where the lock that cannot be released is forgotten.
FORGOTTEN = [("unlock", "queue")]


def meet(act: str, kind: str, stage: Stage, client: "redis.Redis") -> bool:
    """Make a call with a key in its way, and again without; returns whether it was refused."""
    expect = ACTS[act]
    expect.before(stage)
    key = key_for(stage.process, kind, stage.name).decode()
    refused = False
    if client.set(key, "somebody's", nx=True):  # otherwise it is there already, and ours
        try:
            expect.call(stage)
        except* ServerError as group:
            refused = True
            error = group.exceptions[0]
            assert key in str(error)
            assert "\n" not in str(error)
            if kind != "batch":  # that one must not be there at all, whatever its type
                assert isinstance(error, ForeignKeyError)
                assert "holds a string where Phonon keeps a" in str(error)
        assert client.get(key) == b"somebody's"
        client.delete(key)
    else:
        expect.call(stage)
    if refused and act not in ONCE:
        expect.call(stage)
    if refused and act == "update":
        Total(stage.process, "record", 2)
    if act != "stop":
        finish(stage)
        assert sum(n for record, n in executed if record == "record") == expect.total
    return refused


def finish(stage: Stage) -> None:
    """End all sessions; what could not be stored is still here."""
    stage.process.flush()
    stage.cache.expire_all()
    retry_now(stage.process)
    stage.update.end_session()
    stage.process.stop()
    stage.other.stop()


@pytest.mark.parametrize("act", sorted(ACTS.keys() - {"unlock"}))
def test_a_foreign_key_is_named_and_nothing_is_lost(
    server: Redis, make: Make, namespace: str, act: str
) -> None:
    refused = set()
    with server.client() as client:
        for kind in KINDS:
            if (act, kind) in FORGOTTEN:
                continue
            executed.clear()
            own = f"{namespace}-{kind}"
            if meet(act, kind, Stage(make, own), client):
                refused.add(kind)
            if act != "stop":
                assert keys_in(server, own) == set()
    assert refused


@pytest.mark.parametrize(("act", "kind"), FORGOTTEN)
def test_a_lock_that_could_not_be_released_is_still_ours(
    server: Redis, make: Make, namespace: str, act: str, kind: str
) -> None:
    stage = Stage(make, namespace)
    stage.reference.block = False
    with server.client() as client:
        assert meet(act, kind, stage, client)


def test_a_foreign_registry_is_named(make: Make) -> None:
    process = make(heartbeat_interval=NO_BEAT)
    key = key_for(process, "registry", "resource").removesuffix(b"resource") + process.id.encode()
    process.client.set(key, "somebody's")
    with pytest.raises(ForeignKeyError, match="holds a string where Phonon keeps a zset"):
        process.create_reference("resource")
    process.client.delete(key)
    assert process.create_reference("resource").dereference()


def test_a_foreign_key_elsewhere_holds_nothing_up(make: Make, server: Redis) -> None:
    """The session of one record ends although another one's cannot; what is kept goes on."""
    process = make(heartbeat_interval=0.1, retry=SOON)
    cache: LruCache[Total] = LruCache()
    for record in "abc":
        cache.set(record, Total(process, record, 1))
    lock = process.lock("locked")
    assert lock.acquire()
    keys = [key_for(process, "running", "test.test.b"), key_for(process, "members", "locked")]
    with server.client() as client:
        for key in keys:
            client.set(key, "somebody's")
        with pytest.raises(ExceptionGroup) as caught:
            cache.expire_all()
        assert [type(error) for error in caught.value.exceptions] == [ForeignKeyError]
        assert sorted(executed) == [("a", 1), ("c", 1)]
        # The lock cannot be renewed, but the rest of a heartbeat happens.
        process.engine.outbox.unsent.append(Total(process, "d", 1, init_cache=False))
        process.engine.outbox.wake()
        wait_until(lambda: not process.engine.outbox.unsent)
        client.delete(*keys)
    cache.expire_all()
    assert lock.owned()
    lock.release()
    process.stop()
    assert sorted(executed) == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


# A server without memory


def test_a_server_without_memory_stores_no_more_and_loses_nothing(
    own_server: Redis, namespace: str
) -> None:
    with Process(url=own_server.url, namespace=namespace, heartbeat_interval=NO_BEAT) as process:
        updates = {record: Total(process, record, 1) for record in "abc"}
        for update in updates.values():
            update.refresh(Total(process, update._id, 2, init_cache=False))
        lock = process.lock("resource")
        assert lock.acquire()
        reference = process.create_reference("resource")
        process.client.config_set("maxmemory", 1)
        refused: dict[str, Callable[[], Any]] = {
            "cache": updates["a"].cache,
            "batch": lambda: store_in_a_batch(process, "d"),
            "update": lambda: Total(process, "e", 1),
            "create_reference": lambda: process.create_reference("other"),
            "increment": reference.increment_times_modified,
            "lock": process.lock("other").acquire,
        }
        for name, call in refused.items():
            with pytest.raises((PhononError, ExceptionGroup)) as caught:
                call()
            for error in getattr(caught.value, "exceptions", [caught.value]):
                assert isinstance(error, ServerError), name
                assert "raise its maxmemory" in str(error), name
        # Calls that free memory, and heartbeats, go on.
        updates["b"].end_session()
        assert executed == [("b", 3)]
        process.engine.run(process.engine.heartbeat.beat())
        assert lock.owned()
        lock.release()
        assert reference.dereference()
        process.client.config_set("maxmemory", 0)
        updates["a"].cache()
        process.flush()
    assert sorted(executed) == [("a", 3), ("b", 3), ("c", 3), ("d", 1)]


def store_in_a_batch(process: Process, record: str) -> None:
    with process.batch():
        Total(process, record, 1)


# A server that is a replica for a while, or for long


def test_a_replica_takes_nothing_and_nothing_is_lost(own_server: Redis, namespace: str) -> None:
    with Process(
        url=own_server.url, namespace=namespace, heartbeat_interval=0.1, retry_timeout=0.5
    ) as process:
        update = Total(process, "record", 1)
        update.refresh(Total(process, "record", 2, init_cache=False))
        process.client.replicaof("127.0.0.1", 1)
        for call in (update.cache, update.end_session):
            with pytest.raises(ConnectionLostError):
                call()
        with pytest.raises(ConfigurationError, match="is a replica; its primary is at"):
            Process(url=f"{own_server.url}&socket_timeout=9")
        process.client.replicaof("NO", "ONE")
        wait_until(lambda: executed)
        wait_until(lambda: is_settled(process))
    assert executed == [("record", 3)]


# A call that was kept, and is refused when the server is back


@pytest.mark.parametrize("refusal", ["foreign key", "no memory"])
def test_what_was_kept_and_is_refused_is_still_there(
    own_server: Redis, namespace: str, refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Proxy(own_server.socket)) as proxy, own_server.client() as client:
        with Process(
            url=proxy.url,
            namespace=namespace,
            heartbeat_interval=0.1,
            retry_timeout=0.3,
            retry=SOON,
        ) as process:
            cache: LruCache[Total] = LruCache()
            cache.set("record", Total(process, "record", 1, init_cache=False))
            proxy.strike(Fault.LOST_REQUEST, gone=True)
            with pytest.raises(ExceptionGroup):
                cache.expire_all()
            assert cache.size() == 0
            key = key_for(process, "running", "test.test.record")
            if refusal == "foreign key":
                client.set(key, "somebody's")
            else:
                client.config_set("maxmemory", 1)
            proxy.back()
            if refusal == "foreign key":
                wait_until(lambda: "a session could still not be ended" in caplog.text)
                assert not executed
                client.delete(key)
            wait_until(lambda: executed)  # to end a session makes room
            client.config_set("maxmemory", 0)
        assert executed == [("record", 1)]


def test_an_on_error_that_raises_does_no_harm(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception) -> None:
        told.append(type(error))
        raise ValueError("a bug")

    told: list[type[Exception]] = []
    process = make(heartbeat_interval=0.25, on_error=fail)
    first = process.id
    reference = process.create_reference("x")
    process.client.zadd(process.heartbeat_hash_name, {first: 0})
    wait_until(lambda: process.id != first)
    wait_until(lambda: "has raised" in caplog.text)
    assert told == [DeclaredDeadError]
    wait_until(lambda: [holder.id for holder in reference.holders()] == [process.id])
