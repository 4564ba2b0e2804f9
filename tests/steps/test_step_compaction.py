"""Compact, candidates, session: partials are replaced by what they come to."""

import hashlib

import pytest

from phonon._core.compaction import digest
from phonon._protocol.answers import Reply
from phonon._protocol.operations import MODIFICATIONS
from steps.lab import Lab, Proc, lab_fixture  # noqa: F401 - found by its name
from support import operations as ops


def compact(process: Proc, first: int, partials: list[bytes], *merged: bytes) -> object:
    operation = ops.compact(0, b"x", first, len(partials), digest(partials), list(merged))
    return process.do(operation)


def test_the_digest_is_of_each_partial() -> None:
    expected = hashlib.sha1(b"1:12:23", usedforsecurity=False).hexdigest()
    assert digest([b"1", b"23"]) == expected
    assert digest([b"1", b"23"]) != digest([b"12", b"3"])


def test_partials_in_the_middle_are_merged_in_place(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    for partial in (b"1", b"2", b"3", b"4"):
        a.append(partial)
    assert compact(b, 1, [b"2", b"3"], b"2+3") == [Reply.COMPACTED, 3]
    assert lab.dump()["partials:x"] == [b"1", b"2+3", b"4"]
    assert compact(b, 1, [b"2", b"3"], b"2+3") == Reply.CHANGED
    assert compact(b, 0, [b"1", b"2+3", b"4", b"5"], b"y") == Reply.CHANGED
    assert compact(b, 0, [b"1", b"2+3", b"4"], b"6") == [Reply.COMPACTED, 1]
    assert a.leave(b"", MODIFICATIONS)[7:] == [[b"a", 4], [b"6"]]


@pytest.mark.parametrize("due", range(6))
def test_never_across_the_end_of_a_session(lab: Lab, due: int) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"0")
    partials = [b"%d" % i for i in range(1, 6)]
    for i, partial in enumerate(partials, 1):
        (b.leave if i == due else b.append)(partial)
    answer = compact(a, 1, partials[1:3], b"m")
    assert answer == (Reply.CHANGED if 1 < due < 3 else [Reply.COMPACTED, 4])
    again = a.complete(token)
    if due:
        expected = partials[:due]
        if due >= 3:
            expected = [partials[0], b"m", *partials[3:due]]
        assert again[-1] == expected
        assert a.complete(again[3]) == Reply.DONE
    else:
        assert again == Reply.DONE


def test_many_partials_are_replaced(lab: Lab) -> None:
    a = lab.process("a")
    partials = [b"%d" % i for i in range(9000)]
    a.answers(*(ops.append(0, b"x", partial) for partial in partials))
    assert compact(a, 0, partials[:2], b"m") == [Reply.COMPACTED, 8999]
    assert lab.dump()["partials:x"] == [b"m", *partials[2:]]


def test_candidates_are_those_that_are_not_much_larger_than_all_behind(lab: Lab) -> None:
    a = lab.process("a")
    assert lab.ask("candidates", "x", 0, 63) == [0, 0]
    for size in (100, 3, 2, 2, 1):
        a.append(b"0" * size)
    assert lab.ask("candidates", "x", 0, 63) == [1, 4, b"000", b"00", b"00", b"0"]
    assert lab.ask("candidates", "x", 2, 3)[:2] == [2, 2]
    assert lab.ask("candidates", "x", 4, 4) == [5, 0], "one alone is no candidate"
    a.append(b"")
    assert lab.ask("candidates", "x", 5, 5) == [6, 0]
    assert lab.ask("session", "x", 1, 2) == [b"000", b"00"]


def test_candidates_are_all_due_or_all_of_one_session(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.batch(b"0")
    for _ in range(2):
        b.append(b"d")
    b.leave(b"d")
    b.append(b"n")
    b.append(b"n")
    assert lab.ask("candidates", "x", 0, 63)[:2] == [0, 3]
    b.append(b"n")
    b.append(b"n")
    assert lab.ask("candidates", "x", 0, 63)[:2] == [3, 4]


def test_answers_are_of_bounded_size(lab: Lab) -> None:
    a = lab.process("a")
    for _ in range(20):
        a.append(b"b" * 1_000_000)
    assert lab.ask("candidates", "x", 0, 63)[1] == 16, "16 MiB are merged at once"
    assert len(lab.ask("session", "x", 0, 19)) == 1
