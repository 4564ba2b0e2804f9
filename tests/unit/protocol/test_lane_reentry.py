"""A lane whose methods are called in the middle of each other, at every bytecode, or broken off."""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import msgpack
import pytest

from phonon._protocol.lane import Lane, State, move
from phonon._protocol.operations import Operation
from support import operations as ops

PROCESS, NUMBER = b"p1", b"7"


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Raised in the middle of something."""


def join(name: bytes) -> Operation:
    return ops.join(0, name)


def lane_with(*names: bytes) -> Lane:
    lane = Lane(0, PROCESS, NUMBER)
    for name in names:
        lane.enqueue(join(name))
    return lane


def names(operations: Any) -> list[bytes]:
    return [operation.resource for operation in operations]


def reply(count: int) -> list[bytes]:
    return [msgpack.packb([0] * count), b"stamp"]


def at_every_bytecode(
    prepare: Callable[[], Any], work: Callable[[], Any], then: Callable[[], Any]
) -> Iterator[Any]:
    """Do some work again and again, and something else at each bytecode of the lane in turn."""
    at = 0
    there = True
    while there:
        at += 1
        left = at
        there = False

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left, there
            if not frame.f_code.co_filename.endswith("_protocol/lane.py"):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == 0:
                    there = True
                    sys.settrace(None)
                    then()
            return trace

        prepare()
        sys.settrace(trace)
        try:
            result = work()
        except Interrupted:
            result = Interrupted
        finally:
            sys.settrace(None)
        yield result
    assert at > 20


def test_two_that_send_make_the_same_call() -> None:
    lane = lane_with()
    inner: list[Any] = []

    def prepare() -> None:
        nonlocal lane
        inner.clear()
        lane = lane_with(b"a", b"b")

    def work() -> Any:
        return lane.next_call()

    def then() -> None:
        lane.enqueue(join(b"c"))
        inner.append(lane.next_call())

    for outer in at_every_bytecode(prepare, work, then):
        if inner:
            assert inner == [outer]
        call = lane.call
        assert call is outer
        assert names(call.operations) + names(lane.queue) == [b"a", b"b", b"c"][: 2 + len(inner)]
        assert [operation.sent[1] for operation in call.operations if operation.sent] == list(
            range(len(call.operations))
        )
        assert lane.sequence == 1


def test_a_whole_call_in_the_middle_of_making_one() -> None:
    lane = lane_with()

    def prepare() -> None:
        nonlocal lane
        lane = lane_with(b"a")

    def work() -> Any:
        return lane.next_call()

    def then() -> None:
        lane.enqueue(join(b"b"))
        while (call := lane.next_call()) is not None:
            lane.receive(reply(len(call.operations)))

    for outer in at_every_bytecode(prepare, work, then):
        if lane.answered and outer is not None:
            assert not lane.is_under_way(outer) or outer.sequence == lane.answered + 1
        assert not lane.queue


def test_making_a_call_is_broken_off() -> None:
    lane = lane_with()

    def prepare() -> None:
        nonlocal lane
        lane = lane_with(b"a", b"b")

    def work() -> Any:
        return lane.next_call()

    def then() -> None:
        raise Interrupted

    for outer in at_every_bytecode(prepare, work, then):
        call = lane.next_call()
        assert call is not None
        assert outer in (call, Interrupted)
        assert names(call.operations) == [b"a", b"b"]
        assert not lane.queue
        lane.receive(reply(2))
        assert lane.next_call() is None
        assert (lane.sequence, lane.answered, lane.state) == (1, 1, State.IDLE)


def test_two_that_receive() -> None:
    lane = lane_with()
    inner: list[Any] = []
    calls: list[Any] = []

    def prepare() -> None:
        nonlocal lane
        inner.clear()
        lane = lane_with(b"a")
        calls[:] = [lane.next_call()]
        lane.enqueue(join(b"b"))

    def work() -> Any:
        (call,) = calls
        told, again = lane.read(call, reply(1))
        lane.advance(call, b"stamp", again)
        return told

    def then() -> None:
        call = lane.call
        if call is not None:
            inner.extend(lane.receive(reply(len(call.operations))))

    for told in at_every_bytecode(prepare, work, then):
        assert names(operation for operation, _ in told) == [b"a"]
        assert lane.answered == 1
        call = lane.next_call()
        assert call is not None
        assert (call.sequence, names(call.operations)) == (2, [b"b"])


def test_a_late_answer_and_a_late_refusal_change_nothing() -> None:
    lane = lane_with(b"a")
    first = lane.next_call()
    assert first is not None
    lane.receive(reply(1))
    lane.enqueue(join(b"b"))
    second = lane.next_call()
    lane.advance(first, b"other stamp")
    lane.refuse(Interrupted(), first)
    assert not lane.is_under_way(first)
    assert lane.call is second
    assert (lane.answered, lane.stamp, lane.state) == (1, b"stamp", State.IN_FLIGHT)


@pytest.mark.parametrize("enqueue_first", [False, True])
def test_fencing_in_the_middle_of_making_a_call(enqueue_first: bool) -> None:
    """Each operation is either in the queue or in a known call."""
    lane = lane_with()
    seen: list[Any] = []

    def prepare() -> None:
        nonlocal lane
        seen.clear()
        lane = lane_with(b"a")

    def work() -> Any:
        return lane.next_call()

    def then() -> None:
        if enqueue_first:
            lane.enqueue(join(b"b"))
        lane.fence()
        call = lane.call
        seen.append((call, names(call.operations) if call else [], names(lane.queue)))

    for outer in at_every_bytecode(prepare, work, then):
        if not seen:
            continue
        ((call, carried, queued),) = seen
        assert carried + queued == [b"a", b"b"][: 1 + enqueue_first]
        assert outer in (None, call)
        assert lane.call is call
        assert lane.next_call() is None
        assert not lane.has_work


def test_releasing_and_enqueuing_in_the_middle_of_each_other() -> None:
    lane = lane_with()

    def prepare() -> None:
        nonlocal lane
        lane = lane_with()
        lane.defer()
        lane.enqueue(join(b"a"))

    def enqueue() -> None:
        lane.enqueue(join(b"b"))

    def release() -> None:
        lane.release()

    for work, then in ((enqueue, release), (release, enqueue)):
        for _ in at_every_bytecode(prepare, work, then):
            lane.release()
            assert sorted(names(lane.queue)) in ([b"a", b"b"], [b"a"])
            assert work is release or len(lane.queue) == 2


def test_a_refused_call_gives_back_what_frees_memory() -> None:
    lane = lane_with(b"a")
    lane.enqueue(ops.leave(0, b"b"))
    call = lane.next_call()
    assert call is not None
    error = MemoryError()
    lane.refuse(error, call)
    empty = lane.next_call()
    assert empty is not None
    assert empty.frees
    assert lane.state is State.IN_FLIGHT
    assert not lane.is_under_way(call)
    told = lane.receive([msgpack.packb([]), b"stamp"])
    assert [(operation.resource, answer) for operation, answer in told] == [(b"a", error)]
    assert lane.has_work
    again = lane.next_call()
    assert again is not None
    assert again.frees
    assert names(again.operations) == [b"b"]


def test_fencing_gives_back_what_was_to_be_sent_again() -> None:
    lane = lane_with(b"a")
    lane.enqueue(ops.leave(0, b"b"))
    lane.next_call()
    lane.refuse(MemoryError())
    lane.next_call()
    lane.receive([msgpack.packb([]), b"stamp"])
    lane.enqueue(join(b"c"))
    lane.fence()
    assert names(lane.queue) == [b"b", b"c"]
    assert lane.call is None


def test_moving() -> None:
    lane, other = lane_with(b"a"), lane_with()
    operation = lane.queue[0]
    assert move(operation, lane.queue, other.queue)
    assert not move(operation, lane.queue, other.queue)
    assert names(other.queue) == [b"a"]
