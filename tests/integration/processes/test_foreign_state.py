"""Foreign data in Phonon's keys is skipped or named, and stops no heartbeat."""

import pytest

from phonon import Process
from phonon.errors import ForeignKeyError
from support.world import Make, Redis, key_for, wait_until


def test_a_process_id_that_is_no_text(make: Make) -> None:
    process = make(heartbeat_interval=0.1)
    listed = process.heartbeat_hash_name
    process.client.zadd(listed, {b"\xff\xfe": 1})
    wait_until(lambda: process.client.zscore(listed, b"\xff\xfe") is None)
    beats = process.engine.heartbeat.beats
    wait_until(lambda: process.engine.heartbeat.beats > beats + 3)


def test_a_waiter_that_nobody_is(make: Make) -> None:
    process = make()
    process.client.zadd(key_for(process, "queue", "x"), {"nobody/1": 1, b"\xff/1": 2})
    lock = process.lock("x")
    assert lock.acquire(timeout=10)
    lock.release()
    assert not process.client.exists(key_for(process, "queue", "x"))


@pytest.mark.parametrize("kind", ["processes", "listings", "epoch", "partitions"])
def test_a_key_of_the_namespace_is_named(kind: str, server: Redis, namespace: str) -> None:
    with server.client() as client:
        client.sadd(f"{{{namespace}}}:{kind}", "somebody's")
    with pytest.raises(ForeignKeyError, match=rf"}}:{kind} holds a set where Phonon keeps a \w+:"):
        Process(url=server.url, namespace=namespace)
