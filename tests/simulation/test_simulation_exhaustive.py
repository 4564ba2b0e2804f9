"""All interleavings of small scenarios, with a fault in every place: see `sim_scenarios`.

`PHONON_TEST_SIMULATIONS` set to 10000 or more explores the large ones to their end, too.
"""

import os

import pytest
from sim_explorer import Explorer
from sim_link import Link, link_fixture  # noqa: F401 - the fixture is found by its name
from sim_scenarios import LARGE, SCENARIOS

THOROUGH = int(os.environ.get("PHONON_TEST_SIMULATIONS", "0")) >= 10_000
#: Of each large scenario so many interleavings, if not all.
SOME = 300

HOW = pytest.mark.parametrize("colocated", [True, False], ids=["server", "cluster"])


@HOW
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_interleavings(link: Link, name: str, colocated: bool) -> None:
    result = Explorer(link, SCENARIOS[name], colocated=colocated).run()
    assert result.complete
    print(f"\n{name}: {result}")  # noqa: T201 - how many there are


@HOW
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.timeout(3600 if THOROUGH else 60)
def test_interleavings_of_large_scenarios(link: Link, name: str, colocated: bool) -> None:
    explorer = Explorer(link, LARGE[name], colocated=colocated)
    result = explorer.run() if THOROUGH else explorer.run(SOME)
    assert result.complete or result.interleavings == SOME
    print(f"\n{name}: {result}")  # noqa: T201 - how many there are
