"""Flows whose callers are cancelled while they have something in hand: it stays in somebody's."""

from asyncio import CancelledError
from typing import Any

import pytest

from phonon.protocol import updates
from phonon.protocol.effects import Call, Effect, Flow, Participant
from phonon.protocol.keys import Keys
from phonon.protocol.messages import Batch
from phonon.protocol.updates import RetryPolicy

BASE = b"base"
POLICY = RetryPolicy(first_delay=3.0, jitter=0)


class Parcel:
    def __init__(self) -> None:
        self.data: bytes | None = b"data"

    def take(self) -> bytes | None:
        taken, self.data = self.data, None
        return taken

    def put_back(self, partial: bytes) -> None:
        self.data = partial


class Runner:
    def __call__(self, batch: Batch) -> None:
        raise AssertionError(f"{batch} is not to be executed here")

    def merge(self, partials: list[bytes]) -> list[bytes]:
        return partials


@pytest.fixture
def me() -> Participant:
    """A process in a cluster, where the registry is written in an exchange before the step."""
    return Participant("a", Keys("n"), 1000, colocated=False)


def call_of(effect: Effect) -> Call:
    assert isinstance(effect, Call)
    return effect


@pytest.mark.parametrize("keep", [True, False])
def test_storing(me: Participant, keep: bool) -> None:
    flow = updates.append(me, BASE, Parcel(), keep=keep)
    hold = call_of(next(flow))
    append = call_of(flow.send(None))
    assert (hold.step, append.step) == ("hold", "append")
    assert (hold.keep, append.keep) == (keep, keep)


def test_leaving(me: Participant) -> None:
    flow = updates.leave(me, BASE, Runner(), POLICY, Parcel())
    hold = call_of(next(flow))
    leave = call_of(flow.send(None))
    assert (hold.step, leave.step) == ("hold", "leave")
    assert hold.keep
    assert leave.keep


@pytest.mark.parametrize("error", [CancelledError(), KeyboardInterrupt()], ids=type)
def test_fetching_the_rest_of_a_batch(me: Participant, error: BaseException) -> None:
    """It is ours, and is tried again."""
    flow: Flow[Any] = updates.execute(me, BASE, Batch(7, 0, 10, [b"1"]), Runner(), POLICY)
    assert call_of(next(flow)).step == "fetch"
    with pytest.raises(StopIteration) as stop:
        flow.throw(error)
    executed, (failure,), lost = stop.value.value
    assert (executed, lost) == (0, [])
    assert (failure.token, failure.error, failure.retry_in) == (7, error, 3.0)


def test_a_flow_that_is_forgotten_ends(me: Participant) -> None:
    flow = updates.execute(me, BASE, Batch(7, 0, 10, [b"1"]), Runner(), POLICY)
    next(flow)
    flow.close()
