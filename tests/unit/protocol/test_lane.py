"""The lane as a state machine: no server, every state and what leads from it."""

from typing import Any

import msgpack
import pytest

from phonon._protocol import lane as shipped
from phonon._protocol.answers import Reply
from support import operations as ops


@pytest.fixture(name="lanes")
def lanes_fixture() -> Any:
    """The module under test; the mutation tests put broken ones in its place."""
    return shipped


def reply(*answers: Any, stamp: bytes = b"7", contents: Any = None) -> list[bytes]:
    packed = [msgpack.packb(list(answers)), stamp]
    return [*packed, msgpack.packb(contents)] if contents is not None else packed


def test_a_new_lane_has_nothing_to_send(lanes: Any) -> None:
    lane = lanes.Lane(3, b"p", b"9")
    assert (lane.state.value, lane.has_work, lane.next_call()) == ("idle", False, None)
    assert (lane.sequence, lane.answered, lane.stamp, lane.partition) == (0, 0, b"", 3)


def test_a_call_is_made_of_bytes_and_names_the_last_answer(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.enqueue(ops.join(0, b"x"))
    call = lane.next_call()
    assert all(type(word) is bytes for word in call.arguments)
    assert call.arguments[:3] == (b"p", b"9", b"9 1 " + call.digest)
    assert msgpack.unpackb(call.arguments[3], raw=True) == [1, b"x"]
    assert (call.process, call.number) == (b"p", b"9")
    lane.receive(reply(0, stamp=b"77"))
    lane.enqueue(ops.join(0, b"y"))
    following = lane.next_call()
    assert following.arguments[1:3] == (b"77", b"9 2 " + following.digest)
    assert following.digest != call.digest
    assert (lane.sequence, lane.answered) == (2, 1)


def test_one_call_is_in_flight_and_is_repeated_byte_for_byte(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    first, second = ops.join(0, b"x"), ops.join(0, b"y")
    lane.enqueue(first)
    call = lane.next_call()
    arguments = call.arguments
    assert lane.state.value == "in flight"
    lane.enqueue(second)
    lane.no_answer()
    assert lane.state.value == "unanswered"
    assert lane.has_work
    again = lane.next_call()
    assert (again, again.arguments, lane.state.value) == (call, arguments, "in flight")
    assert lane.receive(reply(0)) == [(first, 0)]
    assert lane.state.value == "idle"
    assert lane.has_work
    assert list(lane.next_call().operations) == [second]


def test_an_answer_that_comes_twice_is_taken_once(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.enqueue(ops.join(0, b"x"))
    lane.next_call()
    assert len(lane.receive(reply(0))) == 1
    assert lane.receive(reply(0)) == []
    assert lane.answered == 1


@pytest.mark.parametrize("limit", ["operations", "bytes"])
def test_calls_are_bounded(lanes: Any, limit: str) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    size = 1 if limit == "operations" else lanes.MOST_BYTES // 3
    made = [ops.append(0, b"x", b"1" * size) for _ in range(600 if size == 1 else 5)]
    for operation in made:
        lane.enqueue(operation)
    sizes, told = [], []
    while (call := lane.next_call()) is not None:
        sizes.append(len(call.operations))
        told += [operation for operation, _ in lane.receive(reply(*([1] * sizes[-1])))]
    assert sizes == ([256, 256, 88] if size == 1 else [2, 2, 1])
    assert told == made, "in order, none twice"


def test_many_changes_travel_as_one_operation(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    one = ops.join(0, b"x")
    many = ops.append_many(0, [b"x", b"y", b"z"], [b"1", b"22", b"333"])
    last = ops.complete_many(0, [b"x"], [5])
    for operation in (one, many, last):
        lane.enqueue(operation)
    call = lane.next_call()
    words = [1, b"x", 2, b"x", b"1", 2, b"y", b"22", 2, b"z", b"333", 4, b"x", 5]
    assert msgpack.unpackb(call.arguments[3], raw=True) == words
    assert [operation.sent[:2] for operation in call.operations] == [
        (call, 0),
        (call, 1),
        (call, 4),
    ]
    failed = [99, b"text"]
    told = lane.receive(reply(0, 1, failed, 64, 3))
    assert told == [(one, 0), (many, [1, failed, 64]), (last, 3)]
    assert lane.answered_operations == 5
    assert many.changes() == [[2, b"x", b"1"], [2, b"y", b"22"], [2, b"z", b"333"]]
    assert many.each(error := OSError()) == [error] * 3


def test_contents_are_those_of_the_changes_that_start_a_batch(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    many = ops.leave_many(0, [b"x", b"y", b"z"], [0, 0, 0], [b"1", b"", b"3"])
    lane.enqueue(many)
    lane.next_call()
    first, last = [5, 0, 1, 70, 1, 0, 0], [5, 0, 1, 71, 2, 0, 0]
    told = lane.receive(reply(first, [2, 1, 0, 0], last, contents=[True, [b"old", b"3"]]))
    assert told == [(many, [[*first, None, True], [2, 1, 0, 0], [*last, None, [b"old", b"3"]]])]


def test_so_many_changes_are_a_call(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    for _ in range(5):
        lane.enqueue(ops.complete_many(0, [b"x"] * 128, [5] * 128))
    sizes = []
    while (call := lane.next_call()) is not None:
        sizes.append(sum(operation.count for operation in call.operations))
        lane.receive(reply(*([3] * sizes[-1])))
    assert sizes == [256, 256, 128]


def test_a_large_operation_goes_alone(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    for size in (10, 2 * lanes.MOST_BYTES, 10):
        lane.enqueue(ops.append(0, b"x", b"1" * size))
    sizes = []
    while (call := lane.next_call()) is not None:
        sizes.append(len(call.operations))
        lane.receive(reply(*([1] * sizes[-1])))
    assert sizes == [1, 1, 1]


def test_close_goes_alone(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    for operation in (ops.join(0, b"x"), ops.close(0), ops.join(0, b"y")):
        lane.enqueue(operation)
    codes = []
    while (call := lane.next_call()) is not None:
        codes.append([operation.code.name for operation in call.operations])
        lane.receive(reply(*([0] * len(codes[-1]))))
    assert codes == [["JOIN"], ["CLOSE"], ["JOIN"]]


def test_a_call_frees_if_all_in_it_do(lanes: Any) -> None:
    for made, frees in (
        ([ops.leave(0, b"x")], True),
        ([ops.leave(0, b"x"), ops.join(0, b"x")], False),
        ([ops.join(0, b"x"), ops.leave(0, b"x")], False),
    ):
        lane = lanes.Lane(0, b"p", b"9")
        for operation in made:
            lane.enqueue(operation)
        assert lane.next_call().frees is frees


def test_a_refused_call_is_followed_by_an_empty_one_under_its_number(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.enqueue(ops.join(0, b"x"))
    lane.enqueue(ops.leave(0, b"y"))
    call = lane.next_call()
    error = MemoryError()
    lane.refuse(error)
    assert lane.state.value == "refused"
    empty = lane.next_call()
    assert empty.arguments[:2] == call.arguments[:2]
    assert empty.arguments[2] == b"9 1 " + empty.digest
    assert (empty.arguments[3], empty.frees, empty.error) == (b"\x90", True, error)
    lane.refuse(MemoryError())  # that one too
    assert lane.next_call().error is error, "the first error is told"
    told = lane.receive(reply())
    assert [(o.code.name, answer) for o, answer in told] == [("JOIN", error)]
    assert lane.has_work
    again = lane.next_call()
    assert [o.code.name for o in again.operations] == ["LEAVE"]
    assert (again.sequence, again.frees) == (2, True)


def test_a_refused_call_of_operations_that_free_is_told(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.enqueue(ops.leave(0, b"x"))
    lane.next_call()
    error = MemoryError()
    lane.refuse(error)
    lane.next_call()
    assert [answer for _, answer in lane.receive(reply())] == [error]
    assert not lane.has_work


def test_a_refused_call_that_was_carried_out_is_answered(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.enqueue(ops.append(0, b"x", b"1"))
    lane.next_call()
    lane.refuse(MemoryError())
    lane.next_call()
    assert [answer for _, answer in lane.receive(reply(1))] == [1]


def test_contents_go_to_the_answers_that_start_a_batch(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    for name in (b"x", b"y", b"z", b"u"):
        lane.enqueue(ops.leave(0, name))
    lane.next_call()
    run, again = int(Reply.RUN), int(Reply.AGAIN)
    answers = [[run, 0, 1, 5, 1, 0, 0], [int(Reply.LAST), 0, 1]]
    answers += [[again, 0, 0, 6, 1, 0, 0, [b"p", 2]], [run, 0, 0, 7, 1, 0, 0]]  # type: ignore[list-item]
    told = lane.receive(reply(*answers, contents=[[b"1"], False]))
    assert [answer[7:] for _, answer in told] == [
        [None, [b"1"]],
        [],
        [[b"p", 2], False],
        [None, []],
    ]


def test_a_fenced_lane_sends_nothing_and_stays_so(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.enqueue(ops.join(0, b"x"))
    lane.next_call()
    lane.fence()
    lane.no_answer()
    lane.refuse(MemoryError())
    assert (lane.state.value, lane.has_work, lane.next_call()) == ("fenced", False, None)
    lane.receive(reply(0))  # an answer that comes late opens no lane again
    lane.enqueue(ops.join(0, b"y"))
    assert (lane.state.value, lane.next_call()) == ("fenced", None)


def test_operations_wait_until_the_former_self_is_reaped(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.defer()
    leave, reap, join = ops.leave(0, b"x"), ops.reap(0, b"o", 9, recovers=True), ops.join(0, b"y")
    lane.enqueue(leave)
    lane.defer()
    lane.enqueue(reap, first=True)
    assert list(lane.next_call().operations) == [reap]
    lane.receive(reply([17, 0, 0, [], []]))
    assert lane.next_call() is None
    lane.release()
    lane.enqueue(join)
    assert list(lane.next_call().operations) == [leave, join]


def test_the_own_close_is_answered_by_a_lane_that_is_gone(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    lane.enqueue(ops.join(0, b"x"))
    lane.next_call()
    assert lane.close() == []
    assert lane.call is not None
    lane.receive(reply(0))
    closing = ops.close(0)
    lane.enqueue(closing)
    lane.next_call()
    assert lane.close() == [(closing, Reply.CLOSED)]
    assert lane.call is None


def test_an_operation_knows_the_calls_that_it_was_part_of(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    first, second = ops.append(0, b"x", b"1"), ops.leave(0, b"x")
    lane.enqueue(first)
    lane.enqueue(second)
    call = lane.next_call()
    assert (first.sent, second.sent) == ((call, 0, None), (call, 1, None))
    lane.refuse(MemoryError())
    lane.next_call()
    lane.receive(reply())
    again = lane.next_call()
    assert second.sent == (again, 0, (call, 1, None))


def test_a_call_that_cannot_be_made_loses_nothing(lanes: Any) -> None:
    lane = lanes.Lane(0, b"p", b"9")
    good, bad = ops.join(0, b"x"), ops.modify(0, b"x", 2**70)
    lane.enqueue(good)
    lane.enqueue(bad)
    with pytest.raises(OverflowError):
        lane.next_call()
    assert (list(lane.queue), lane.sequence, good.sent) == ([good, bad], 0, None)
    lane.queue.remove(bad)
    assert list(lane.next_call().operations) == [good]
