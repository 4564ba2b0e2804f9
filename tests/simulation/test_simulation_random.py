"""Random schedules of the flows over a real server: a schedule is repeated by its seed.

`PHONON_TEST_SIMULATIONS` asks for more of them, `PHONON_TEST_SEED` for others.
"""

import os
from collections import Counter

import pytest
from sim_link import Link, link_fixture  # noqa: F401 - the fixture is found by its name
from sim_random import Schedule, run_random

SIMULATIONS = int(os.environ.get("PHONON_TEST_SIMULATIONS", "300"))
SEED = os.environ.get("PHONON_TEST_SEED", "1")

#: What schedules must have come across, and how often at least in 300 of them.
REACHED = {
    "kills": 30,
    "zombies": 100,
    "reborn": 100,
    "refused as dead": 5,
    "beat found it dead": 50,
    "fate deaf": 500,
    "fate lost": 300,
    "fate twice": 200,
    "fate gave up": 30,
    "fate unsent": 20,
    "given up by its caller": 25,
    "cancelled by its caller": 50,
    "cancelled at append": 20,
    "cancelled at leave": 20,
    "cancelled at lock": 10,
    "cancelled at Wait": 5,
    "cancelled at Turn": 20,
    "cancelled at execute": 5,
    "append stored": 1000,
    "append DeclaredDeadError": 2,
    "append StaleOperationError": 5,
    "compact compacted": 50,
    "compact changed": 5,
    "leave held": 500,
    "leave last": 100,
    "leave deferred": 100,
    "leave run": 300,
    "leave repeated": 50,
    "complete done": 300,
    "complete again": 50,
    "complete lost": 2,
    "complete repeated": 20,
    "fail retry": 50,
    "fail parked": 2,
    "failure entrusted": 20,
    "resume run": 30,
    "resume lost": 2,
    "recover free": 300,
    "recover run": 50,
    "recover later": 1,
    "lock granted": 300,
    "lock wait": 100,
    "lock busy": 50,
    "unlock released": 300,
    "unlock lost": 20,
    "granted together": 50,
    "meet met": 50,
    "woken": 50,
    "waited in vain": 10,
    "sink applies": 500,
    "sink skips": 5,
    "executed in vain": 2,
    "parked and replayed": 1,
    "zombie's write refused": 1,
    "silent at execute": 5,
    "silent at executed": 5,
    "silent at complete": 2,
    "silent at recover": 2,
    "silent at claim": 5,
    "silent at bury": 2,
    "silent at hold": 10,
    "silent at append": 10,
    "silent at compact": 2,
    "silent at leave": 10,
    "silent at lock": 2,
    "silent at unlock": 2,
    "silent at Wait": 5,
}


@pytest.mark.timeout(60 + SIMULATIONS)
def test_random_schedules(link: Link) -> None:
    result = run_random(link, SEED, SIMULATIONS)
    seen = result.seen
    print(  # noqa: T201 - what the schedules have reached
        f"\n{result.schedules} schedules, {result.moves} moves, {result.calls} commands, "
        f"{seen['kills']} kills, {seen['zombies']} zombies, "
        f"{seen['fate deaf'] + seen['fate lost']} lost, "
        f"{seen['fate cancelled'] + seen['fate cancelled unsent']} cancelled, "
        f"{seen['sink applies']} batches, "
        "0 violations"
    )
    share = min(1.0, SIMULATIONS / 300)
    missed = {what: seen[what] for what, least in REACHED.items() if seen[what] < least * share}
    assert not missed, f"the schedules do not come across {missed}"


def test_a_schedule_depends_on_its_seed_only(link: Link) -> None:
    stories = []
    for seed in ("5 1", "5 1", "5 2"):
        schedule = Schedule(link, seed)
        schedule.run()
        stories.append(schedule.world.story())
    assert stories[0] == stories[1]
    assert stories[0] != stories[2]
    assert len(Counter(stories[0].splitlines())) > 50
