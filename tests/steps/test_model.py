"""The operations against a model: schedules of calls that arrive, get lost, come again or late.

`PHONON_TEST_SCHEDULES` asks for more of them, `PHONON_TEST_SEED` for others.
"""

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steps.lab import Lab, lab_fixture  # noqa: F401 - the fixture is found by its name
from steps.world import EVENTS, FATES, WEIGHTS, Move, fresh, run, run_random

SCHEDULES = int(os.environ.get("PHONON_TEST_SCHEDULES", "120"))
SEED = int(os.environ.get("PHONON_TEST_SEED", "1"))
LENGTH = 40

CALLS = st.lists(st.sampled_from(sorted(WEIGHTS)), min_size=1, max_size=3).map(tuple)
EVENT = st.sampled_from(sorted(EVENTS)).map(lambda name: (name,))
MOVES = st.builds(
    Move,
    actions=CALLS | EVENT,
    who=st.integers(0, 3),
    what=st.integers(0, 419),
    fate=st.sampled_from(sorted(set(FATES))),
)


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(processes=st.integers(2, 4), semaphore=st.booleans(), schedule=st.lists(MOVES, max_size=40))
def test_schedules_that_shrink(
    lab: Lab, processes: int, semaphore: bool, schedule: list[Move]
) -> None:
    fresh(lab)
    run(lab, processes, schedule, semaphore=semaphore)


#: What the schedules must come to, or they show little.
REACHED = {
    *("JOIN JOINED", "APPEND STORED", "LEAVE HELD", "LEAVE LAST", "LEAVE DEFERRED", "LEAVE RUN"),
    *("COMPLETE DONE", "COMPLETE AGAIN", "COMPLETE LOST", "FAIL RETRY", "FAIL PARKED", "FAIL LOST"),
    *("FAIL AGAIN", "RESUME RUN", "RESUME LOST", "HAND_OFF HANDED", "HAND_OFF LOST", "REPLAY RUN"),
    *("REPLAY RUNNING", "REPLAY MISSING", "DISCARD DISCARDED", "DISCARD MISSING", "REAP REAPED"),
    *("COMPACT COMPACTED", "COMPACT CHANGED", "LOCK GRANTED", "LOCK WAIT", "LOCK BUSY"),
    *("UNLOCK RELEASED", "UNLOCK NOT_HELD", "RENEW RENEWED", "RENEW NOT_HELD", "MEET JOINED"),
}


def test_random_schedules(lab: Lab) -> None:
    seen = run_random(lab, SEED, SCHEDULES, LENGTH)
    print(f"seed {SEED}: {SCHEDULES} schedules, {seen.total()} operations")
    assert not REACHED - seen.keys(), "the schedules do not reach these answers"
