"""Calls: sequence, stamp, digest, repeats, refusals, fences, limits."""

from typing import Any

import pytest

from phonon._protocol.answers import Reply
from phonon._protocol.lane import MOST_BYTES, MOST_OPERATIONS, State
from steps.lab import Lab, lab_fixture, refused  # noqa: F401 - found by its name
from support import operations as ops


def altered(call: object, place: int, word: bytes) -> object:
    class Altered:
        frees = False
        arguments = tuple(
            word if i == place else old
            for i, old in enumerate(call.arguments)  # type: ignore[attr-defined]
        )

    return Altered()


def lift_fence(lab: Lab, name: str) -> None:
    key = lab.key(f"lane:{name}")
    state: Any = lab.client.hget(key, "fenced")
    lab.client.hset(key, "state", state)
    lab.client.hdel(key, "fenced")


def with_head(call: Any, place: int, word: bytes) -> object:
    """The call with another number of the lane, sequence or digest."""
    words = call.arguments[2].split()
    words[place] = word
    return altered(call, 2, b" ".join(words))


def test_a_repeat_gets_the_same_and_changes_nothing(lab: Lab) -> None:
    a = lab.process("a")
    told = a.answers(ops.append(0, b"x", b"1"), ops.leave(0, b"x", b"2"), ops.join(0, b"y"))
    before = lab.dump()
    assert a.again() == told
    assert lab.dump() == before


def test_a_repeat_reads_contents_afresh(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    told = a.answers(ops.leave(0, b"x", b"1"), ops.leave(0, b"y", b"2"))
    b.reap(a)  # for the batches alone: the fence is lifted, as if a had not died
    lift_fence(lab, "a")
    for answer in told:
        answer[-1] = False
    assert a.again() == told
    assert b.complete(told[0][3]) == Reply.DONE
    assert a.again() == told


def test_an_older_call_is_stale_and_changes_nothing(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    a.append(b"2")
    before = lab.dump()
    with refused("PHONONSTALE 2"):
        a.again(0)
    assert lab.dump() == before


def test_a_later_call_than_the_next_says_what_is_lost(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    kept: Any = lab.client.dump(lab.key("lane:a"))
    a.append(b"2")
    a.append(b"3")
    lab.client.restore(lab.key("lane:a"), 0, kept, replace=True)  # the server went back in time
    with refused("PHONONLOST 1"):
        a.append(b"4")


def test_a_gap_is_a_loss_whatever_the_stamp(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    a.append(b"2")
    ahead = with_head(a.sent[-1], 1, b"4")
    number, _, *rest = a.lane.stamp.split()
    before = lab.dump()
    for stamp in (a.sent[-1].arguments[1], b" ".join((number, b"3", *rest))):
        with refused("PHONONLOST 2"):
            a.send_raw(altered(ahead, 1, stamp))
    assert lab.dump() == before


def test_another_history_of_the_same_length_is_noticed(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    call = a.sent[-1]
    elsewhen = a.lane.stamp.rpartition(b" ")[0] + b" 1"
    lab.client.hset(lab.key("lane:a"), "state", elsewhen)
    with refused("PHONONLOST 1"):
        a.append(b"2")
    a.send_raw(call)  # the repeat of what it has done is no such thing


def test_the_same_number_with_other_operations_is_a_loss(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    with refused("PHONONLOST 1"):
        a.send_raw(with_head(a.sent[-1], 2, b"1"))


def test_a_call_of_another_lane_of_that_name_is_refused(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    with refused("PHONONLOST 0"):
        a.send_raw(with_head(a.sent[-1], 0, b"1"))
    a.leave()
    assert a.close() == Reply.CLOSED
    with refused("PHONONLOST 0"):
        a.again()
    assert a.lane.close() == []
    late = lab.process("a")  # a late duplicate of the opening
    assert late.lane.number != a.lane.number
    with refused("PHONONLOST 0"):
        a.again(0)


def test_opening_twice_gives_the_same_lane_with_its_number(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    assert lab.ask("open", "a", 4) == [a.lane.number, 4]
    assert lab.ask("open", "b", 8) == [b"", 4], "the number of partitions is the others'"
    assert "lane:b" not in lab.dump()
    assert lab.ask("survey") == [b"a"]


def test_fence_answers_what_was_done_last_and_ends_it(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    call = a.sent[-1]
    for _ in range(2):
        sequence, answers, digest, number = lab.ask("fence", "a")
        assert (sequence, answers, digest, number) == (1, b"\x91\x01", call.digest, a.lane.number)
    with refused("PHONONFENCED 1"):
        a.append(b"2")
    with refused("PHONONFENCED 1"):
        a.again(0)
    assert lab.ask("fence", "nobody") == [-1, b"", b"", b""]


def test_close_is_alone_and_leaves_nothing(lab: Lab) -> None:
    a = lab.process("a")
    told = a.answers(ops.join(0, b"x"), ops.close(0), ops.leave(0, b"x"), ops.close(0))
    assert told == [Reply.JOINED, [Reply.LEFT_OVER, 1], [Reply.LAST, 0, 1], Reply.CLOSED]
    assert [len(call.operations) for call in a.sent] == [1, 1, 1, 1]
    assert set(lab.dump()) == {"token"}
    assert lab.client.pttl(lab.key("token")) > 0
    lab.process("b")
    assert lab.client.pttl(lab.key("token")) == -1


def test_verify_and_its_pages(lab: Lab) -> None:
    a = lab.process("a")
    tokens = {b"r%03d" % i: a.batch(resource=b"r%03d" % i) for i in range(70)}
    a.lock()
    before, at = lab.now_ms - 1, lab.now_ms
    pages = [lab.ask("verify", "a", at, page) for page in range(3)]
    for page in pages:
        assert page[:5] == [a.lane.sequence, a.lane.number, a.lane.stamp, 0, []]
    found = [word for page in pages for word in page[5]]
    assert dict(zip(found[::2], found[1::2], strict=True)) == tokens
    assert [len(page[5]) for page in pages] == [128, 12, 0]
    assert [page[6] for page in pages] == [[b"x"], [], []]
    assert lab.ask("verify", "a", 1000, 0)[5:] == [[], [], []], "only what was so before"
    assert lab.ask("verify", "a", before - 100_000, 0)[6] == []
    assert lab.ask("verify", "nobody", at, 0) == [-1, b"", b"", 0, [], [], [], []]
    lab.ask("fence", "a")
    assert lab.ask("verify", "a", at, 0)[3] == 1


@pytest.mark.parametrize("carried_out", [True, False])
def test_an_empty_call_says_what_became_of_a_refused_one(lab: Lab, carried_out: bool) -> None:
    a = lab.process("a")
    mixed = [ops.append(0, b"x", b"1"), ops.leave(0, b"x"), ops.join(0, b"y")]
    for operation in mixed:
        a.lane.enqueue(operation)
    call = a.lane.next_call()
    assert call is not None
    if carried_out:
        a.send(call)  # an earlier copy
    error = MemoryError("OOM")
    a.lane.refuse(error)
    assert a.lane.state is State.REFUSED
    empty = a.lane.next_call()
    assert empty is not None
    assert (empty.sequence, empty.frees) == (call.sequence, True)
    told = [answer for _, answer in a.lane.receive(a.send_raw(empty))]
    if carried_out:
        assert told[0] == Reply.STORED
        assert told[1][:3] == [Reply.RUN, 0, 1]
        assert told[1][-1] == [], "to be fetched"
        assert a.lane.next_call() is None
        return
    assert told == [error, error]
    with refused("PHONONLOST 1"):
        a.send_raw(call)  # a late copy: its number is used up
    again = a.lane.next_call()
    assert again is not None
    assert ([o.code for o in again.operations], again.frees) == ([ops.Code.LEAVE], True)
    assert [answer for _, answer in a.lane.receive(a.send(again))] == [[Reply.LAST, 0, 0]]
    assert "partials:x" not in lab.dump()


def test_a_call_carries_so_many_operations_and_bytes(lab: Lab) -> None:
    a = lab.process("a")
    told = a.answers(*(ops.append(0, b"x", b"1") for _ in range(2 * MOST_OPERATIONS + 1)))
    assert len(told) == 2 * MOST_OPERATIONS + 1
    assert [len(call.operations) for call in a.sent] == [MOST_OPERATIONS, MOST_OPERATIONS, 1]
    a.sent.clear()
    sizes = [MOST_BYTES, 10, MOST_BYTES // 2, MOST_BYTES // 2, 10]
    a.answers(*(ops.append(0, b"y", b"b" * size) for size in sizes))
    assert [len(call.operations) for call in a.sent] == [1, 2, 2]


def test_an_operation_that_fails_does_not_stop_those_behind_it(lab: Lab) -> None:
    a = lab.process("a")
    lab.client.set(lab.key("members:x"), "somebody's")
    told = a.answers(ops.join(0, b"y"), ops.append(0, b"x", b"1"), ops.append(0, b"y", b"2"))
    assert (told[0], told[1][0], told[2]) == (Reply.JOINED, Reply.FAILED, Reply.STORED)
    assert "partials:x" not in lab.dump()
    assert a.again() == told
    assert set(lab.registry("a")) == {b"y"}


def test_thousands_of_registry_entries_change_in_one_call(lab: Lab) -> None:
    dead, a = lab.process("d"), lab.process("a")
    names = [b"r%d" % i for i in range(5000)]
    for name in names:
        dead.lane.enqueue(ops.append(0, name, b"1"))
    dead.answers()
    _, left, _, batches, wrong, _ = a.reap(dead, 5000)
    assert (left, wrong, len(batches)) == (0, [], 15_000)
    assert len(lab.registry("a")) == 5000
