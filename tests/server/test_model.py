"""The steps against a model: schedules of calls that arrive, get lost, are repeated and come late.

What is checked after every step is in `witness.Witness.check`; the model is in `model.Model`.
`PHONON_TEST_SCHEDULES` asks for more of them, `PHONON_TEST_SEED` for others.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scenarios import documented
from steps import Lab, lab_fixture  # noqa: F401 - the fixture is found by its name
from world import FATES, VARIANTS, WEIGHTS, Move, run, run_random

SCHEDULES = int(os.environ.get("PHONON_TEST_SCHEDULES", "200"))
SEED = int(os.environ.get("PHONON_TEST_SEED", "1"))
LENGTH = 40

MOVES = st.builds(
    Move,
    action=st.sampled_from([action for action, weight in WEIGHTS.items() for _ in range(weight)]),
    who=st.integers(0, 3),
    what=st.integers(0, VARIANTS - 1),
    fate=st.sampled_from([*FATES[:1] * 4, *FATES]),
)


# The same examples every time, without a memory of earlier runs: red means that something changed.
# They share a server and a library, but each has a namespace of its own.
@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    processes=st.integers(2, 4),
    colocated=st.booleans(),
    schedule=st.lists(MOVES, min_size=20, max_size=60),
)
def test_schedules_that_shrink(
    lab: Lab, processes: int, colocated: bool, schedule: list[Move]
) -> None:
    run(lab, processes, schedule, colocated=colocated)


def test_random_schedules(lab: Lab) -> None:
    seen = run_random(lab, SEED, SCHEDULES, LENGTH)
    print(f"seed {SEED}: {SCHEDULES} schedules, {seen.total()} calls")  # noqa: T201 - for -s
    missing = documented() - seen.keys()
    assert not missing, "the schedules do not reach these answers"
    stale = {name for name in seen if name.endswith(" stale")}
    assert len(stale) == len({name.partition(" ")[0] for name in documented()})
    assert seen["leave lost"], "no repeated leave whose batch was taken over"


@pytest.mark.parametrize("colocated", [True, False])
def test_a_schedule_by_hand(lab: Lab, colocated: bool) -> None:
    """Shows what a schedule is, and that it does what it says."""
    seen = run(
        lab,
        2,
        [
            Move("append", 0),
            Move("append", 1, fate="reply lost"),
            Move("leave", 0, 2),
            Move("leave", 1, 3, "reply lost"),  # got the batch, does not know it
            Move("append", 0),
            Move("leave", 0, 2),  # deferred
            Move("repeat", 1),
            Move("fail", 1, 1, "request lost"),  # gets the batch first
            Move("complete", 1, fate="reply lost"),
            Move("complete", 1),
        ],
        colocated=colocated,
    )
    assert seen == Counter(
        {
            "append stored": 4,
            "leave held": 1,
            "leave run": 2,
            "leave deferred": 1,
            "fail retry": 1,
            "complete again": 2,
            "complete done": 1,
            "unlock lost": 8,
            "leave last": 4,
        }
    )
