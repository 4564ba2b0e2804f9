"""Calls whose data has to be confirmed by replicas or by the disk, where that is asked for."""

import pytest

from phonon._protocol.lane import Lane
from phonon._protocol.operations import Operation
from phonon._transport import driving
from support import operations

STORES = (
    operations.append(0, b"x", b"1"),
    operations.append_many(0, [b"x", b"y"], [b"1", b"2"]),
    operations.leave(0, b"x", b"1"),
    operations.leave_many(0, [b"x", b"y"], [0, 0], [b"", b"2"]),
    operations.ingest(0, b"source", 1, (b"0", b"1"), [b"x", b"1"]),
    operations.ingest_new(0, b"scope", 1000, [b"id"], [b"x", b"1"]),
)
STORES_NOTHING = (
    operations.join(0, b"x"),
    operations.leave(0, b"x"),
    operations.leave_many(0, [b"x", b"y"], [0, 0], [b"", b""]),
    operations.complete_many(0, [b"x", b"y"], [1, 2]),
)


@pytest.mark.parametrize("operation", [*STORES, *STORES_NOTHING], ids=repr)
def test_each_operation_that_stores_data_is_confirmed(operation: Operation) -> None:
    lane = Lane(0, b"process", b"1")
    lane.enqueue(operation)
    call = lane.next_call()
    assert call is not None
    assert driving._stores(call) == (operation in STORES)
