"""Calls that return only when the data is as safe as was asked for."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from phonon import Durability
from phonon.errors import ConfigurationError, ConnectionLostError, ServerError
from support.member import Crew, Entry
from support.nodes import Node
from support.proxy import Fault, Proxy
from support.world import Redis, key_for, wait_until

FSYNC = Durability(timeout=0.2)
COPIED = Durability(fsync=False, replicas=1, timeout=0.2)


@pytest.fixture
def safe_server() -> Iterator[Redis]:
    server = Redis("--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.close()


@pytest.fixture
def proxy(safe_server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(safe_server.socket)
    yield proxy
    proxy.close()


@pytest.fixture
def crew(proxy: Proxy, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(proxy.url, namespace, tmp_path) as crew:
        yield crew


@pytest.fixture
def admin(safe_server: Redis) -> Iterator["redis.Redis"]:
    with safe_server.client() as client:
        yield client


def test_whatever_stores_is_confirmed_and_nothing_else(crew: Crew, proxy: Proxy) -> None:
    process = crew.process(durability=FSYNC, heartbeat_interval=30)
    proxy.plan()
    update = Entry(process, "a", doc={"n": 1})
    assert proxy.steps == ["append", "waitaof"]
    process.create_reference("x").dereference()
    with process.lock("lock"):
        pass
    assert proxy.steps.count("waitaof") == 1
    update.refresh(Entry(process, "a", doc={"n": 1}, init_cache=False))
    update.end_session()
    assert proxy.steps[-3:] == ["leave", "waitaof", "complete"]
    proxy.plan()
    with process.batch():
        for i in range(10):
            Entry(process, f"r{i}", doc={"n": 1})
    assert proxy.steps.count("waitaof") == 1, "one for all"
    assert set(proxy.steps[:-1]) == {"append"}
    assert 1 < len(proxy.steps[:-1]) <= 10, "a call of each partition"
    without = crew.process(heartbeat_interval=30)
    proxy.plan()
    Entry(without, "b", doc={"n": 1})
    assert proxy.steps == ["append"]


@pytest.mark.parametrize("fault", Fault)
def test_a_connection_that_is_cut_before_the_confirmation(
    fault: Fault, crew: Crew, proxy: Proxy
) -> None:
    process = crew.process(durability=FSYNC, heartbeat_interval=30)
    proxy.strike_step(fault, "waitaof")
    update = Entry(process, "a", doc={"n": 1})
    assert proxy.steps == ["append", "waitaof"] * 2
    proxy.strike_step(fault, "waitaof")
    with process.batch():
        for i in range(5):
            Entry(process, f"r{i}", doc={"n": 1})
    sent = len(proxy.steps) // 2
    assert set(proxy.steps[: sent - 1]) == {"append"}
    assert proxy.steps == ["append"] * (sent - 1) + ["waitaof"] + proxy.steps[:sent]
    update.end_session()
    process.stop()
    assert crew.journal.applied() == {"a": {"n": 1}} | {f"r{i}": {"n": 1} for i in range(5)}


def test_data_that_does_not_reach_the_disk(crew: Crew, proxy: Proxy, admin: "redis.Redis") -> None:
    process = crew.process(durability=FSYNC, heartbeat_interval=30)
    admin.config_set("appendfsync", "no")
    update = Entry(process, "a", doc={"n": 1}, init_cache=False)
    process.engine.driver.retry_timeout = 0.5
    proxy.plan()
    with pytest.raises(ConnectionLostError, match="does not answer"):
        update.cache()
    assert proxy.steps.count("append") >= 2, "repeated"
    assert proxy.steps.count("append") == proxy.steps.count("waitaof")
    key = key_for(process, "partials", "test.test.a")
    assert admin.llen(key) == 1, "and stored once"
    with pytest.raises(ConnectionLostError):
        update.cache()
    admin.config_set("appendfsync", "always")
    process.engine.driver.retry_timeout = 20.0
    update.cache()
    assert admin.llen(key) == 1
    update.end_session()
    assert crew.journal.applied() == {"a": {"n": 1}}


def test_an_append_only_file_that_is_switched_off(crew: Crew, admin: "redis.Redis") -> None:
    """The confirmation is an error then; the data is stored, and must not be stored again."""
    process = crew.process(durability=FSYNC, heartbeat_interval=30)
    admin.config_set("appendonly", "no")
    update = Entry(process, "a", doc={"n": 1}, init_cache=False)
    process.engine.driver.retry_timeout = 0.3
    with pytest.raises(ConnectionLostError):
        update.cache()
    with pytest.raises(ConnectionLostError):
        update.end_session()
    admin.config_set("appendonly", "yes")
    wait_until(lambda: not admin.info("persistence")["aof_rewrite_in_progress"])
    process.engine.driver.retry_timeout = 20.0
    process.stop()
    assert crew.journal.applied() == {"a": {"n": 1}}


def test_a_refusal_is_told_once_the_rest_of_the_call_is_confirmed(
    crew: Crew, admin: "redis.Redis"
) -> None:
    process = crew.process(durability=FSYNC, heartbeat_interval=30, retry_timeout=20)
    admin.config_set("appendfsync", "no")
    admin.set(key_for(process, "partials", "test.test.a"), "somebody's")
    server = process.engine.driver.server
    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(lambda: Entry(process, "a", doc={"n": 1}))
        wait_until(lambda: server.troubles >= 2)
        assert not storing.done()
        admin.config_set("appendfsync", "always")
        with pytest.raises(ServerError, match="holds a string where Phonon keeps a list"):
            storing.result(30)


def test_a_server_without_an_append_only_file(server: Redis, namespace: str) -> None:
    with pytest.raises(ConfigurationError, match="appendonly yes"):
        Crew(server.url, namespace, Path()).process(durability=Durability())
    crew = Crew(server.url, namespace, Path())
    process = crew.process(durability=Durability(fsync=False))
    process.stop()


def test_what_was_acknowledged_survives_the_server(
    safe_server: Redis, namespace: str, tmp_path: Path
) -> None:
    safe_server.client().config_set("appendfsync", "everysec")
    with Crew(safe_server.url, namespace, tmp_path) as crew:
        process = crew.process(durability=Durability())
        with process.batch():
            for i in range(50):
                Entry(process, f"r{i}", doc={"n": 1})
        safe_server.kill()
        safe_server.start()
        process.stop()
        assert crew.journal.applied() == {f"r{i}": {"n": 1} for i in range(50)}


# Replicas


@pytest.fixture
def primary() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


@pytest.fixture
def replica() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


@pytest.fixture
def copied(primary: Node, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(f"redis://{primary.address}/0", namespace, tmp_path) as crew:
        yield crew


def follow(replica: Node, primary: Node) -> None:
    replica.ask("REPLICAOF", "127.0.0.1", primary.port)
    wait_until(lambda: replica.ask("INFO", "replication")["master_link_status"] == "up")


def test_a_replica_that_appears_later(primary: Node, replica: Node, copied: Crew) -> None:
    process = copied.process(durability=COPIED, heartbeat_interval=30)
    update = Entry(process, "a", doc={"n": 1}, init_cache=False)
    process.engine.driver.retry_timeout = 0.5
    with pytest.raises(ConnectionLostError):
        update.cache()
    update.refresh(Entry(process, "a", doc={"n": 2}, init_cache=False))
    with pytest.raises(ConnectionLostError):
        update.cache()
    follow(replica, primary)
    process.engine.driver.retry_timeout = 20.0
    update.cache()
    with replica.client() as client:
        key = key_for(process, "partials", "test.test.a")
        assert client.llen(key.decode()) == 2, "each once, and both are there"
    update.end_session()
    assert copied.journal.applied() == {"a": {"n": 3}}


def test_a_repeat_waits_for_what_the_call_has_written(
    primary: Node, replica: Node, copied: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WAIT is about its own connection, and a repeat may have another one."""
    follow(replica, primary)
    process = copied.process(durability=COPIED, heartbeat_interval=30)
    update = Entry(process, "a", doc={"n": 1}, init_cache=False)
    process.engine.driver.retry_timeout = 0.7
    server = process.engine.driver.server
    attempts = []
    attempt = server._attempt

    def lose(*arguments: Any) -> Any:
        attempts.append(arguments)
        try:
            return (yield from attempt(*arguments))
        finally:  # so that the next one uses another connection
            server._node.retire()

    monkeypatch.setattr(server, "_attempt", lose)
    with replica.paused(), pytest.raises(ConnectionLostError):
        update.cache()
    assert len(attempts) >= 2
    process.engine.driver.retry_timeout = 20.0
    update.cache()
    with replica.client() as client:
        key = key_for(process, "partials", "test.test.a")
        assert client.llen(key.decode()) == 1
    update.end_session()
    assert copied.journal.applied() == {"a": {"n": 1}}


def test_a_primary_that_has_become_a_replica(primary: Node, replica: Node, copied: Crew) -> None:
    """Its refusal of the confirmation is not the call's answer: it is repeated until it serves."""
    follow(replica, primary)
    process = copied.process(durability=COPIED, heartbeat_interval=30, retry_timeout=20)
    Entry(process, "warm", doc={"n": 1})
    with ThreadPoolExecutor(1) as pool:
        primary.ask("REPLICAOF", "127.0.0.1", 1)
        storing = pool.submit(lambda: Entry(process, "a", doc={"n": 1}))
        server = process.engine.driver.server
        wait_until(lambda: server.troubles >= 2)
        assert not storing.done()
        primary.ask("REPLICAOF", "NO", "ONE")
        follow(replica, primary)
        storing.result(30).end_session()
    process.stop()
    assert copied.journal.applied() == {"a": {"n": 1}, "warm": {"n": 1}}


def test_an_error_that_passes_before_a_connection_is_cut(
    safe_server: Redis, crew: Crew, proxy: Proxy
) -> None:
    """Nothing of the call was done, so it is repeated like those that were not answered."""
    process = crew.process(heartbeat_interval=30)
    with safe_server.client() as client:
        client.function_flush("SYNC")
    proxy.strike(Fault.LOST_REQUEST, at=1)
    with process.batch():
        for i in range(2):
            Entry(process, f"r{i}", doc={"n": 1})
    process.stop()
    assert crew.journal.applied() == {f"r{i}": {"n": 1} for i in range(2)}
