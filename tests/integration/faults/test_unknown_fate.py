"""Data of which nobody knows any more whether the server has it is told, and not stored twice.

A rebirth asks the fence of the former self what became of a call; after a week it is gone.
"""

from typing import Any

import pytest

from phonon import Process
from phonon._core.flows import Flow, Send
from phonon._core.parcels import Ending
from phonon.errors import ConnectionLostError, ServerError
from support.samples import fresh
from support.world import wait_until


def answered(flow: Flow[Any], answer: Exception) -> Any:
    """Answer what a flow sends first, and return its result."""
    effect = next(flow)
    assert isinstance(effect, Send)
    effect.make_all()
    with pytest.raises(StopIteration) as stopped:
        flow.send([answer for _ in effect.operations])
    return stopped.value.value


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_only_what_was_not_carried_out_is_sent_again(
    process: Process, ends: bool, known: bool
) -> None:
    kind = fresh()
    outbox = process.engine.outbox
    told: list[BaseException] = []
    process.engine.reports.on_error = told.append
    update = kind(process, "record", doc={"n": 1}, init_cache=False)
    error = ServerError("refused") if known else ConnectionLostError("a week ago")
    if ends:
        (result,) = answered(outbox.end([Ending(update.resource_id, update)]), error)
        assert result.errors == [error]
        assert not result.sent
    else:
        assert answered(outbox.store([update]), error) == [error]
    if known:
        outbox.wake()
        wait_until(lambda: not outbox.is_unfinished)
        update.end_session()
        assert kind.docs() == {"record": {"n": 1}}
    else:
        assert not update.has_unsent()
        assert not outbox.is_unfinished
        assert told == [error]
        process.stop()
        assert kind.docs() == {}
