"""A process with very many memberships beats in time: a beat costs the same for all of them."""

import pytest

from phonon import Process
from support.world import Make, Redis, wait_until

COUNT = 300_000
#: Seconds. One lease is four of them.
BEAT = 1.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_heart_beats_in_time_with_300000_memberships(own_server: Redis, make: Make) -> None:
    told: list[Exception] = []
    process: Process = make(url=own_server.url, heartbeat_interval=BEAT, on_error=told.append)
    other: Process = make(url=own_server.url, heartbeat_interval=BEAT)
    lock = process.lock("held")
    assert lock.acquire()
    name = process.id
    for first in range(0, COUNT, 50_000):
        with process.batch():
            for i in range(first, first + 50_000):
                process.create_reference(f"r{i}")
    heart = process.engine.heartbeat
    beats, others = heart.beats, other.engine.heartbeat.beats
    # Longer than a lease: whoever is late would be declared dead by the other one.
    wait_until(lambda: heart.beats > beats + 8 and other.engine.heartbeat.beats > others + 8, 60)
    assert process.id == name
    assert lock.owned()
    lock.check()
    assert told == []
    lock.release()
    process.engine.close()  # to leave them all takes longer than to enter them
    process._close_connection()
