"""Processes: how they are made, what keeps them alive, and that nothing is left when they stop."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import redis

from phonon import LruCache, Process, RetryPolicy
from phonon._core.engine import ThreadEngine
from phonon._core.flows import Flow
from phonon._core.heartbeat import Heartbeat
from phonon._transport import connect, sync_io
from phonon.errors import (
    ConfigurationError,
    LockLostError,
    NotStorableError,
    PhononError,
    ProcessStoppedError,
)
from support.samples import Tally, fresh, put
from support.world import OF_PROCESSES, Make, Redis, key_for, key_of, stop_heart, wait_until

Keys = Callable[[], set[str]]


class Brisk(Process):
    """One of the user's own."""


@pytest.fixture
def admin(server: Redis) -> Iterator["redis.Redis"]:
    with server.client() as client:
        yield client


@pytest.fixture
def process_keys(admin: "redis.Redis", namespace: str) -> Keys:
    """Return the server's keys about processes themselves."""
    lasting = ("partitions", "token")

    def find() -> set[str]:
        found = admin.scan_iter(match=f"{{{namespace}*", count=1000)
        kinds = {key: key.decode().partition("}:")[2] for key in found}
        of_namespace = f"{{{namespace}}}:".encode()
        return {
            key.decode()
            for key, kind in kinds.items()
            if kind not in lasting
            and (key.startswith(of_namespace) or kind.startswith(OF_PROCESSES))
        }

    return find


def now_ms(admin: "redis.Redis") -> int:
    seconds, micros = admin.time()
    return int(seconds) * 1000 + int(micros) // 1000


def deadline_ms(admin: "redis.Redis", process: Process) -> float:
    return float(admin.zscore(process.heartbeat_hash_name, process.id) or 0) / 1000


def threads_of(process: Process) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if process.id[:8] in thread.name]


# Making one


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"session_length": 0}, "session_length is a number of seconds above 0, not 0"),
        ({"session_length": float("nan")}, "session_length"),
        ({"session_length": float("inf")}, "session_length"),
        ({"heartbeat_interval": -1}, "heartbeat_interval"),
        ({"heartbeat_interval": float("inf")}, "heartbeat_interval"),
        ({"retry_timeout": 0}, "retry_timeout"),
        ({"partitions": 0}, "partitions"),
        ({"namespace": 5}, "namespace is a str, not 5"),
        ({"serializer": 5}, "serializer is an object with"),
        ({"session_length": 5}, "make session_length at least twice heartbeat_interval"),
        ({"hosts": ["a:1"]}, "give one of url= and hosts="),
        ({"client": redis.Redis()}, "give one of client=, url= and hosts="),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused(
    options: dict[str, Any], words: str, server: Redis
) -> None:
    before = set(connect._shared), threading.active_count()
    with pytest.raises(ConfigurationError, match=words) as raised:
        Process(**{"url": server.url, **options})
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, PhononError)
    assert (set(connect._shared), threading.active_count()) == before


@pytest.mark.parametrize("hosts", ["a:1,b:2", []])
def test_hosts_are_a_list(hosts: Any) -> None:
    with pytest.raises(ConfigurationError, match='a list of "host:port"'):
        Process(hosts=hosts)


@pytest.mark.parametrize("method", ["__init__", "start"])
def test_a_constructor_that_fails_keeps_no_connection(
    method: str, server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("on purpose")

    monkeypatch.setattr(ThreadEngine, method, fail)
    before = set(connect._shared)
    with pytest.raises(TypeError, match="on purpose"):
        Process(url=server.url + "&client_name=fails")
    assert set(connect._shared) == before


class FoundError(Exception):
    """Says where a process would have connected."""


@pytest.mark.parametrize(
    ("options", "variable", "url"),
    [
        ({}, None, "redis://localhost:6379/1"),
        ({}, "", "redis://localhost:6379/1"),
        ({}, "redis://elsewhere/3", "redis://elsewhere/3"),
        ({"host": "h", "port": 1, "db": 2}, "redis://elsewhere/3", "redis://h:1/2"),
        ({"db": 0}, "redis://elsewhere/3", "redis://localhost:6379/0"),
        ({"host": "::1"}, None, "redis://[::1]:6379/1"),
        ({"url": "redis://u"}, "redis://elsewhere/3", "redis://u"),
        ({"hosts": ["a:1", "b:2"]}, "redis://elsewhere/3", "redis+cluster://a:1,b:2"),
    ],
)
def test_where_it_connects(
    options: dict[str, Any], variable: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(url: str, *_: Any, **__: Any) -> None:
        raise FoundError(url)

    monkeypatch.setattr(connect, "connect_url", found)
    if variable is None:
        monkeypatch.delenv("PHONON_URL", raising=False)
    else:
        monkeypatch.setenv("PHONON_URL", variable)
    with pytest.raises(FoundError) as raised:
        Process(**options)
    assert raised.value.args == (url,)


def test_the_arguments_of_the_original_are_positional(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(url: str, *_: Any, **__: Any) -> None:
        raise FoundError(url)

    monkeypatch.setattr(connect, "connect_url", found)
    with pytest.raises(FoundError, match="redis://h:7/5"):
        Process(900, "h", 7, 5, 10, True)


def test_from_url(server: Redis, namespace: str) -> None:
    with Brisk.from_url(server.url, namespace=namespace, heartbeat_interval=0.25) as process:
        assert type(process) is Brisk
        assert process.heartbeat_interval == 0.25
        assert process.create_reference("x").count() == 1


def test_the_variable_is_read(
    server: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHONON_URL", server.url)
    with Process(namespace=namespace) as process, server.client() as client:
        assert client.exists(process.heartbeat_hash_name)


@pytest.mark.parametrize("decode", [False, True])
def test_a_client_of_the_users_is_used_and_left_open(
    decode: bool, server: Redis, namespace: str
) -> None:
    sheet = fresh()
    with redis.Redis(unix_socket_path=server.socket, db=1, decode_responses=decode) as client:
        with Process(client=client, namespace=namespace) as process:
            assert process.client is client
            reference = process.create_reference("ключ")
            assert [holder.id for holder in reference.holders()] == [process.id]
            put(sheet, process, "ü", 2).end_session()
        assert client.ping()
    assert sheet.docs() == {"ü": {"n": 2}}


def test_it_says_who_it_is(make: Make, namespace: str, server: Redis) -> None:
    one, two = make(), make()
    assert one.id != two.id
    assert one.namespace == namespace
    assert one.id in repr(one)
    assert server.socket in repr(one)
    assert one.id in one.registry_key
    assert one.registry_key != two.registry_key
    assert one.heartbeat_hash_name == two.heartbeat_hash_name


def test_namespaces_do_not_see_each_other(make: Make, namespace: str) -> None:
    one, two = make(), make(namespace=namespace + "-other")
    here, there = one.create_reference("x"), two.create_reference("x")
    assert (here.count(), there.count()) == (1, 1)
    with here.lock(), there.lock(block=False):
        pass
    assert here.dereference()
    assert there.count() == 1


def test_connections_are_shared_by_url_and_closed_by_the_last(
    server: Redis, namespace: str, admin: "redis.Redis"
) -> None:
    name = f"shared-{namespace}"
    url = f"{server.url}&client_name={name}"

    def connections() -> int:
        clients: list[dict[str, str]] = admin.client_list()
        return sum(client["name"] == name for client in clients)

    one, two = Process(url=url, namespace=namespace), Process(url=url, namespace=namespace)
    assert one.client is two.client
    assert connections() > 0
    one.stop()
    assert two.create_reference("x").count() == 1
    assert connections() > 0
    two.stop()
    wait_until(lambda: connections() == 0)
    with Process(url=url, namespace=namespace) as three:
        assert three.client is not two.client
        assert connections() > 0


# Stopping


def test_stop_ends_what_it_holds(
    make: Make, keys: Keys, process_keys: Keys, admin: "redis.Redis"
) -> None:
    sheet = fresh()
    process, other = make(), make()
    ours = process.create_reference("reference")
    theirs = other.create_reference("reference")
    ours.increment_times_modified()
    lock = process.lock("lock")
    assert lock.acquire()
    cache: LruCache[Tally] = LruCache()
    cache.set("cached", put(sheet, process, "cached", 1))
    cache.set("cached", put(sheet, process, "cached", 2))
    cache.set("uncached", put(sheet, process, "uncached", 4, init_cache=False))
    loose = [
        put(sheet, process, "stored", 8),
        put(sheet, process, "loose", 16, init_cache=False),
    ]
    with process.batch():
        loose.append(put(sheet, process, "batched", 32))
        process.create_reference("joined in a batch")
    assert sheet.written == []

    process.stop()

    assert sheet.docs() == {
        "cached": {"n": 3},
        "uncached": {"n": 4},
        "stored": {"n": 8},
        "loose": {"n": 16},
        "batched": {"n": 32},
    }
    assert cache.size() == 0
    assert {entry.process for entry in sheet.written} == {process.id}
    assert theirs.count() == 1
    with other.lock("lock", block=False):
        pass
    assert theirs.dereference()
    other.stop()
    assert keys() == set()
    left = set(admin.scan_iter(match=f"{{{process.namespace}*"))
    settings = f"{{{process.namespace}}}:partitions".encode()
    assert settings in left, "later processes adopt the number"
    assert all(admin.pttl(key) > 0 for key in left - {settings})
    assert process_keys() == set()
    assert threads_of(process) == []


def test_stop_keeps_data_that_was_changed_behind_our_back(make: Make) -> None:
    sheet = fresh()
    process = make()
    update = put(sheet, process, "a", 1)
    update.doc["n"] = 10  # doc was emptied when its content was stored
    process.stop()
    assert sheet.docs() == {"a": {"n": 11}}


def test_an_update_takes_over_from_the_one_it_has_merged(make: Make) -> None:
    sheet = fresh()
    process = make()
    older = put(sheet, process, "a", 1, init_cache=False)
    newer = put(sheet, process, "a", 2, init_cache=False)
    newer.refresh(older)
    del older
    process.stop()
    assert sheet.docs() == {"a": {"n": 3}}


def test_an_update_takes_over_from_one_that_is_gone(make: Make) -> None:
    sheet = fresh()
    process = make()
    put(sheet, process, "a", 1)
    kept = put(sheet, process, "a", 2, init_cache=False)
    process.create_reference("test.test.b")
    also_kept = put(sheet, process, "b", 4, init_cache=False)
    process.stop()
    assert sheet.docs() == {"a": {"n": 3}, "b": {"n": 4}}
    assert not kept.has_unsent()
    assert not also_kept.has_unsent()


def test_stopping_twice_does_nothing(make: Make, process_keys: Keys) -> None:
    process = make()
    with process:
        process.stop()
        process.stop()
    assert process_keys() == set()


def test_many_threads_stop_it(make: Make, keys: Keys) -> None:
    sheet = fresh()
    process = make()
    updates = [put(sheet, process, record) for record in range(50)]
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(process.stop) for _ in range(8)]:
            future.result()
    assert sheet.docs() == {record: {"n": 1} for record in range(50)}
    assert not any(update.has_unsent() for update in updates)


def test_nothing_works_after_stop(make: Make, keys: Keys) -> None:
    sheet = fresh()
    process = make()
    reference = process.create_reference("x")
    update = put(sheet, process, "u")
    lock = process.lock("x")
    cache: LruCache[Tally] = LruCache()
    process.stop()
    before = keys()

    def in_a_batch() -> None:
        with process.batch():
            process.create_reference("y")

    def update_in_a_batch() -> None:
        with process.batch():
            put(sheet, process, "v")

    update.doc = {"n": 1}
    attempts: list[Callable[[], object]] = [
        lambda: process.create_reference("y"),
        reference.count,
        reference.holders,
        reference.modified_by,
        reference.get_times_modified,
        reference.increment_times_modified,
        reference.refresh_session,
        reference.dereference,
        lambda: reference.dereference(print),
        reference.lock().__enter__,
        lock.acquire,
        lambda: put(sheet, process, "v"),
        lambda: put(sheet, process, "v", init_cache=False),
        lambda: cache.set("v", put(sheet, process, "v", init_cache=False)),
        update.cache,
        update.end_session,
        update.force_expiry,
        process.get_registry,
        lambda: process.add_to_registry("y"),
        lambda: process.remove_from_registry("x"),
        process.flush,
        in_a_batch,
        update_in_a_batch,
    ]
    for attempt in attempts:
        with pytest.raises(ProcessStoppedError, match="make a new Process"):
            attempt()
    assert keys() == before
    assert sheet.docs() == {"u": {"n": 1}}
    assert update.doc == {"n": 1}
    assert threads_of(process) == []


def test_an_entry_that_comes_too_late_stays_in_its_cache(make: Make) -> None:
    sheet = fresh()
    process, other = make(), make()
    cache: LruCache[Tally] = LruCache()
    update = put(sheet, process, "a")
    process.stop()
    update.doc = {"n": 5}
    cache.set("a", update)
    cache.set("b", put(sheet, other, "b", 7))
    with pytest.raises(ExceptionGroup) as raised:
        cache.expire_all()
    assert [type(error) for error in raised.value.exceptions] == [ProcessStoppedError]
    assert cache.size() == 1
    assert update.doc == {"n": 5}
    assert sheet.docs() == {"a": {"n": 1}, "b": {"n": 7}}


def test_leaving_the_block_does_not_hide_the_users_error(make: Make) -> None:
    class Fails(Tally):
        def execute(self) -> None:
            raise OSError("no database")

    class UserError(Exception):
        pass

    with pytest.raises(UserError) as raised, make() as process:
        put(Fails, process, "a")
        raise UserError
    assert any("no database" in note for note in raised.value.__notes__)


def test_stop_says_what_it_left_undone(
    make: Make, process_keys: Keys, admin: "redis.Redis", keys: Keys
) -> None:
    sheet = fresh()

    class Fails(Tally):
        def execute(self) -> None:
            raise OSError(f"no database for {self._id}")

    process = make()
    put(Fails, process, "a")
    put(Fails, process, "b")
    put(sheet, process, "c")
    with pytest.raises(ExceptionGroup, match="2 errors") as raised:
        process.stop()
    assert {str(error) for error in raised.value.exceptions} == {
        "no database for a",
        "no database for b",
    }
    assert sheet.docs() == {"c": {"n": 1}}
    # Its batches are there, its registry names them, and it can be seen to be dead.
    assert {"batch:test.test.a", "batch:test.test.b"} <= keys()
    other = make(recover_failed_processes=False)
    assert set(other.get_registry(process.registry_key)) == {"test.test.a", "test.test.b"}
    assert admin.zscore(process.heartbeat_hash_name, process.id) == 0
    process.stop()


def test_stop_keeps_what_cannot_be_stored(make: Make) -> None:
    sheet = fresh()
    process = make()
    cache: LruCache[Tally] = LruCache()
    odd, even = put(sheet, process, "odd"), put(sheet, process, "even")
    cache.set("odd", odd)
    cache.set("even", even)
    odd.doc["n"] = object()
    with pytest.raises(ExceptionGroup) as raised:
        process.stop()
    assert {type(error) for error in raised.value.exceptions} == {NotStorableError}
    assert "Sheet.doc['n']" in str(raised.value.exceptions[0])
    assert sheet.docs() == {"even": {"n": 1}}
    assert cache.size() == 1
    assert cache._entries["odd"] is odd


@pytest.mark.parametrize("cached", [True, False])
def test_stop_inside_a_batch_ends_it(make: Make, cached: bool, keys: Keys) -> None:
    sheet = fresh()
    process = make()
    cache: LruCache[Tally] = LruCache()
    with process.batch():
        update = put(sheet, process, "a")
        if cached:
            cache.set("a", update)
        process.create_reference("x")
        process.stop()
    assert sheet.docs() == {"a": {"n": 1}}
    assert keys() == set()


def test_a_batch_that_another_thread_has_stopped(make: Make) -> None:
    sheet = fresh()
    process = make()
    cache: LruCache[Tally] = LruCache()

    def stop() -> None:
        thread = threading.Thread(target=process.stop)
        thread.start()
        thread.join()

    with process.batch():
        cache.set("a", put(sheet, process, "a"))
        stop()
    # Everything that was set in the block had been stored, and executed.
    assert sheet.docs() == {"a": {"n": 1}}

    process = make()
    with pytest.raises(ProcessStoppedError), process.batch():
        update = put(sheet, process, "b")
        stop()
    # Nobody could know of this one. It is not stored, and it is here.
    assert update.doc == {"n": 1}
    assert sheet.docs() == {"a": {"n": 1}}


# The heartbeat


def lease_end_ms(admin: "redis.Redis", process: Process, resource: str) -> float:
    """Until when a lock is leased, if it has a lease of its own."""
    found: Any = admin.zrange(key_for(process, "leases", resource), 0, -1, withscores=True)
    return float(found[0][1]) if found else 0


def test_the_heartbeat_prolongs_its_life(make: Make, admin: "redis.Redis") -> None:
    process = make(heartbeat_interval=0.02)
    first = deadline_ms(admin, process)
    assert first - now_ms(admin) <= 5 * 20

    def prolonged(last: float) -> bool:
        return deadline_ms(admin, process) > last

    for _ in range(3):
        last = deadline_ms(admin, process)
        wait_until(partial(prolonged, last))


def test_a_heartbeat_that_fails_is_not_the_last(
    make: Make, admin: "redis.Redis", monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    failures = iter([ValueError("a bug"), KeyError("another")])
    beat = Heartbeat.beat

    def failing(heart: Heartbeat) -> Flow[float]:
        for error in failures:
            raise error
        return beat(heart)

    monkeypatch.setattr(Heartbeat, "beat", failing)
    process = make(heartbeat_interval=0.02)
    first = deadline_ms(admin, process)
    wait_until(lambda: deadline_ms(admin, process) > first)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
        ValueError,
        KeyError,
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_heart_that_stopped_is_started_again(
    make: Make, admin: "redis.Redis", monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    beat = Heartbeat.beat

    def stop(_: Heartbeat) -> None:
        raise SystemExit  # which ends a thread without a word

    monkeypatch.setattr(Heartbeat, "beat", stop)
    process = make(heartbeat_interval=0.02)
    reference = process.create_reference("x")
    wait_until(lambda: not threads_of(process))
    assert f"the heartbeat thread of process {process.id} has died" in caplog.text
    monkeypatch.setattr(Heartbeat, "beat", beat)
    last = deadline_ms(admin, process)
    assert reference.count() == 1
    wait_until(lambda: deadline_ms(admin, process) > last)
    wait_until(lambda: deadline_ms(admin, process) > last + 20)
    assert len(threads_of(process)) == 1


def test_a_process_that_was_believed_dead_says_so(
    make: Make, admin: "redis.Redis", caplog: Any
) -> None:
    process = make(heartbeat_interval=0.05)
    first = process.id
    admin.zadd(process.heartbeat_hash_name, {first: 0})
    wait_until(lambda: f"process {first} was silent for more than 0.2 s" in caplog.text)
    assert process.id != first
    assert f"It goes on as {process.id}" in caplog.text
    assert deadline_ms(admin, process) > now_ms(admin)


def test_a_membership_outlives_its_length(make: Make, admin: "redis.Redis") -> None:
    """Which has no effect: it lasts as long as the process does."""
    process = make(session_length=0.6, heartbeat_interval=0.1)
    reference = process.create_reference("x")
    update = fresh()(process, "u", doc={"n": 1})
    end = now_ms(admin) + 900
    wait_until(lambda: now_ms(admin) > end)
    assert reference.count() == update.ref.count() == 1


def test_a_member_without_a_heartbeat_is_dropped(make: Make) -> None:
    silent, alive = (make(heartbeat_interval=0.1, recover_failed_processes=False) for _ in range(2))
    theirs, ours = silent.create_reference("x"), alive.create_reference("x")
    assert ours.count() == 2
    stop_heart(silent)
    wait_until(lambda: ours.count() == 1)
    assert [holder.id for holder in ours.holders()] == [alive.id]
    assert ours.dereference()
    silent.engine.run(silent.engine.rebirth.run())
    wait_until(lambda: ours.count() == 1)
    assert theirs.dereference(), "it has joined again under its new id"


def test_a_member_that_an_operator_deleted_joins_again(make: Make, admin: "redis.Redis") -> None:
    process = make()
    theirs = process.create_reference("x")
    admin.delete(key_for(process, "members", "x"))
    assert theirs.count() == 0
    theirs.refresh_session()
    assert theirs.count() == 1
    assert theirs.dereference()


def test_a_held_lock_outlives_its_lease(make: Make, admin: "redis.Redis") -> None:
    process, other = make(), make()
    with process.lock("x", lease=2) as lock:  # renewed four times: a busy machine misses some
        until = lease_end_ms(admin, process, "x")
        assert 0 < until - now_ms(admin) <= 2000
        wait_until(lambda: now_ms(admin) > until + 300)
        assert lock.owned()
        with pytest.raises(Process.AlreadyLocked):
            other.lock("x", block=False).__enter__()
    with other.lock("x", block=False):
        pass


def test_a_lock_that_an_operator_deleted_is_reported_lost(
    make: Make, admin: "redis.Redis", namespace: str
) -> None:
    process, other = make(), make()
    lock = process.lock("x", lease=2)
    with pytest.raises(LockLostError, match=r"the lock on 'x' \(token \d+\) was lost"), lock:
        assert lock.owned()
        admin.delete(key_of(namespace, "lock", "x"))
        wait_until(lambda: not lock.owned())
        with other.lock("x", block=False):
            pass
    assert lock.token is None
    # Its next holder has it, and keeps it.
    with pytest.raises(LockLostError), process.lock("x"):
        admin.delete(key_of(namespace, "lock", "x"))
        assert other.lock("x", block=False).acquire()
    with pytest.raises(Process.AlreadyLocked):
        process.lock("x", block=False).__enter__()


def test_a_lost_lock_does_not_hide_the_users_error(
    process: Process, admin: "redis.Redis", namespace: str
) -> None:
    with pytest.raises(ZeroDivisionError) as raised, process.lock("x"):
        admin.delete(key_of(namespace, "lock", "x"))
        _ = 1 / 0
    (note,) = raised.value.__notes__
    assert note.startswith("phonon: the lock on 'x'")
    assert "was lost" in note


# The registry


def test_the_registry_names_what_it_may_be_responsible_for(make: Make) -> None:
    process, other = make(), make()
    assert process.get_registry() == []
    names = ["", "}", "{a}", "a}b{c", "\n", "ключ", "%7D", "x" * 10_000, "\udc80"]
    references = [process.create_reference(name) for name in names]
    assert sorted(process.get_registry()) == sorted(names)
    assert sorted(other.get_registry(process.registry_key)) == sorted(names)
    assert other.get_registry() == []
    for reference in references:
        assert reference.dereference()
    assert process.get_registry() == []
    with process.lock("locked"):
        assert process.get_registry() == ["locked"]
    sheet = fresh()
    put(sheet, process, "u")
    assert process.get_registry() == ["test.test.u"]


def test_the_registry_can_be_kept_by_hand(make: Make) -> None:
    process, other = make(), make()
    assert process.add_to_registry("x") == 1
    assert process.add_to_registry("x") == 0
    assert other.add_to_registry("y", process.registry_key) == 1
    assert sorted(process.get_registry()) == ["x", "y"]
    assert other.remove_from_registry("x", registry_key=process.registry_key) == 1
    assert process.remove_from_registry("x") == 0
    assert process.get_registry() == ["y"]


# Examples of use


def test_a_name_may_be_any_text(make: Make) -> None:
    one, two = make(), make()
    for name in ["", "}", "{a}", "a}b{c", "\n", "ключ", "x" * 10_000, "a:members", "%"]:
        here, there = one.create_reference(name), two.create_reference(name)
        with here.lock(), pytest.raises(Process.AlreadyLocked):
            there.lock(block=False).__enter__()
        assert (here.count(), here.dereference(), there.dereference()) == (2, False, True)


def test_errors_in_the_log_name_no_root_logger(make: Make, caplog: Any) -> None:
    class Fails(Tally):
        def execute(self) -> None:
            raise OSError("no database")

    process = make(retry=RetryPolicy(attempts=1))
    with pytest.raises(OSError, match="no database"):
        put(Fails, process, "a").end_session()
    assert {record.name for record in caplog.records} == {"phonon"}
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_process_that_nobody_holds_stops_beating(server: Redis, namespace: str) -> None:
    process = Process(url=server.url, namespace=namespace, heartbeat_interval=0.02)
    connection = process._connection
    (heart,) = threads_of(process)
    del process

    def stopped() -> bool:
        gc.collect()
        return not heart.is_alive()

    wait_until(stopped)
    sync_io.run(connection.close())


def test_a_lock_lasts_as_long_as_the_lease_of_its_process(make: Make, admin: "redis.Redis") -> None:
    process = make(heartbeat_interval=100, session_length=900)
    with process.lock("x") as lock:
        assert lease_end_ms(admin, process, "x") == 0, "it has none of its own"
        assert 390_000 < deadline_ms(admin, process) - now_ms(admin) <= 400_000
        left = float(repr(lock).partition("lease ")[2].split()[0])
        assert 390 < left <= 400
