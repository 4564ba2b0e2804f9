"""Random schedules of whole processes over a real server: a schedule is repeated by its seed.

`PHONON_TEST_SIMULATIONS` asks for more of them, `PHONON_TEST_SEED` for others.
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from simulation.schedules import PROFILES, Schedule, run_random
from simulation.server import SimServer, small

SIMULATIONS = int(os.environ.get("PHONON_TEST_SIMULATIONS", "170"))
SEED = os.environ.get("PHONON_TEST_SEED", "1")
EACH = max(1, SIMULATIONS // len(PROFILES))

#: What schedules must have come across, and how often at least in 170 of them.
REACHED = {
    "kills": 15,
    "pauses": 40,
    "outages": 5,
    "clocks set back": 2,
    "clocks set forward": 10,
    "rollbacks all": 3,
    "emptied all": 3,
    "late duplicates": 500,
    "fate deaf": 50,
    "fate lost": 30,
    "fate twice": 30,
    "fate refused": 3,
    "repeats": 50,
    "reported DeclaredDeadError": 15,
    "reported ServerStateLostError": 3,
    "APPEND STORED": 100,
    "LEAVE RUN": 100,
    "LEAVE HELD": 50,
    "LEAVE DEFERRED": 10,
    "COMPLETE DONE": 100,
    "COMPLETE AGAIN": 5,
    "FAIL RETRY": 10,
    "HAND_OFF HANDED": 3,
    "RESUME RUN": 10,
    "REAP REAPED": 100,
    "LOCK GRANTED": 50,
    "LOCK WAIT": 5,
    "COMPACT COMPACTED": 10,
    "MEET JOINED": 10,
    "woken": 3,
    "callers gone, user": 10,
    "INGEST INGESTED": 50,
    "INGEST REFUSED": 8,
    "INGEST_NEW INGESTED": 40,
    "INGEST_NEW SEEN": 60,
    "messages again": 40,
    "sink applies": 100,
    "many changes in one operation": 20,
}


@pytest.fixture(scope="module")
def sim() -> Iterator[SimServer]:
    server = SimServer()
    with small(server):
        yield server
    server.close()


@pytest.mark.slow
@pytest.mark.timeout(120 + SIMULATIONS)
def test_random_schedules_come_across_all_that_matters(sim: SimServer) -> None:
    seen: Counter[str] = Counter()
    for profile in PROFILES:
        result = run_random(sim, profile, SEED, EACH)
        seen.update(result.seen)
        kills, pauses, late = (result.seen[w] for w in ("kills", "pauses", "late duplicates"))
        print(
            f"\n{profile}: {result.schedules} schedules, {result.moves:,} moves, "
            f"{result.calls:,} calls, {kills} kills, {pauses} pauses, {late} late duplicates"
        )
    share = min(1.0, EACH * len(PROFILES) / 170)
    missed = {what: seen[what] for what, least in REACHED.items() if seen[what] < least * share}
    assert not missed, f"the schedules do not come across {missed}"


def test_a_schedule_depends_on_its_seed_only(sim: SimServer) -> None:
    stories = []
    for seed in ("deaths 5 1", "deaths 5 1", "deaths 5 2"):
        schedule = Schedule(sim, "deaths", seed)
        schedule.run()
        stories.append(schedule.world.story())
    assert stories[0] == stories[1]
    assert stories[0] != stories[2]
