"""Round trips are counted, not guessed: the benchmark's own figures against their bounds."""

import round_trips
from support.world import Redis


def test_exchanges_stay_within_their_bounds(own_server: Redis) -> None:
    found = round_trips.measure(own_server.socket)
    assert found.keys() == round_trips.TARGETS.keys()
    over = {name: trips for name, trips in found.items() if trips[0] > round_trips.TARGETS[name]}
    assert not over
    assert found["join"].calls == found["append"].calls == 1
    assert found["leave, the last, with a batch"].calls == 2
    # One call of each partition.
    assert found["batch of 1,000 messages on 600 keys"].calls == 16
    # Each session leaves and is completed; a call carries at least fifty of these operations.
    assert found["expire_all of 10,000 sessions"].calls <= 2 * 10_000 / 50
