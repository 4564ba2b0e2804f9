"""The simulation finds faults: each of these is put into the library or the core, and must show."""

from collections.abc import Iterator

import pytest

from simulation.mutations import MUTATIONS, mutated
from simulation.schedules import try_schedule
from simulation.server import SimServer, small

#: So many random schedules are tried at the most.
SCHEDULES = 60


@pytest.fixture(scope="module")
def sim() -> Iterator[SimServer]:
    server = SimServer()
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_found(sim: SimServer, name: str) -> None:
    mutation = MUTATIONS[name]
    found = None
    with mutated(sim, mutation):
        for number in range(mutation.first, mutation.first + SCHEDULES):
            _, violation = try_schedule(sim, mutation.profile, f"finds {number}")
            if violation is not None:
                found = f"finds {number}"
                break
    assert found is not None, f"nothing shows that {name}"
    # It is the fault that shows, not one that is there anyway.
    with small(sim):
        _, violation = try_schedule(sim, mutation.profile, found)
    assert violation is None, f"{mutation.profile} {found} fails without a fault: {violation}"
