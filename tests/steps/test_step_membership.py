"""Join, modify, leave, restore: who is a member, and who is told to be the last."""

import pytest

from phonon._protocol.answers import Reply
from phonon._protocol.operations import FORCE, MODIFICATIONS
from steps.lab import BATCH_SCORE, Lab, lab_fixture  # noqa: F401 - found by its name
from support import operations as ops


def test_join_counts_a_process_once(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert [a.join(), a.join(), b.join()] == [Reply.JOINED] * 3
    assert lab.ask("count", "x") == 2
    assert lab.registry("a") == {b"x": (lab.now - 20) // 1000}


def test_a_member_keeps_the_time_when_it_came(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    since = lab.now_ms
    lab.advance(5000)
    a.join()
    a.modify()
    a.append()
    assert lab.ask("members", "x") == [b"a", since]


def test_leave_says_how_many_are_left_and_the_last_one_is_told(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    for process in (a, b, c):
        process.join()
    assert a.leave() == [Reply.HELD, 2, 0, 0]
    assert b.leave() == [Reply.HELD, 1, 0, 0]
    assert c.leave() == [Reply.LAST, 0, 1]
    assert lab.data() == {}


def test_one_that_is_no_member_is_never_the_last(lab: Lab) -> None:
    assert lab.process("a").leave() == [Reply.LAST, 0, 0]
    assert lab.process("b").leave(b"", MODIFICATIONS) == [Reply.LAST, 0, 0]


def test_a_partial_makes_a_member_of_the_one_that_leaves(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    b.join()
    assert a.leave(b"1") == [Reply.HELD, 1, 0, 0]
    answer = b.leave(b"", MODIFICATIONS)
    assert answer[0] == Reply.RUN
    assert answer[7:] == [[b"a", 1], [b"1"]]


@pytest.mark.parametrize("partial", [b"", b"2"])
@pytest.mark.parametrize("stored", [0, 1, 3])
def test_the_only_member_leaves_the_fast_way_as_the_general_one(
    lab: Lab, stored: int, partial: bytes
) -> None:
    """The flags that ask for modifications lead the general way."""
    a = lab.process("a")
    answers, keys = [], []
    for flags in (0, MODIFICATIONS):
        a.join()
        for i in range(stored):
            a.append(b"%d" % i)
        answer = a.leave(partial, flags)
        token = answer[3] if answer[0] == Reply.RUN else 0
        if token:
            answer[3] = 0
            modified = stored + (partial != b"")
            assert answer[7] == ([b"a", modified] if flags else None)
            answer[7] = None
            found = lab.data()
            assert found["running:x"][b"token"] == b"%d" % token
            since = float(found["running:x"][b"since"])
            assert found["registry:a"] == {b"x": BATCH_SCORE + since}
            for volatile in (b"token", b"since"):
                del found["running:x"][volatile]
            keys.append({k: v for k, v in found.items() if k != "registry:a"})
            a.complete(token)
        else:
            keys.append(lab.data())
        answers.append(answer[:3] if answer[0] == Reply.LAST else answer)
        assert lab.data() == {}
    assert answers[0] == answers[1]
    assert keys[0] == keys[1]


def test_the_last_one_learns_who_modified_the_resource(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.modify(3)
    b.modify(1)
    a.leave()
    assert dict(zip(*[iter(lab.ask("modified", "x"))] * 2, strict=True)) == {b"a": b"3", b"b": b"1"}
    a.modify(2)
    assert a.leave() == [Reply.HELD, 1, 0, 0]
    answer = b.leave(b"", MODIFICATIONS)
    assert answer[:3] == [Reply.LAST, 0, 1]
    assert answer[3] == [b"a", 5, b"b", 1]
    assert lab.data() == {}, "they do not outlive the session"


def test_one_that_came_back_is_counted_in_one_sum(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    b.join()
    a.modify(3)
    a.leave()
    a.modify(2)
    b.leave()
    assert a.leave(b"", MODIFICATIONS) == [Reply.LAST, 0, 1, [b"a", 5]]


def test_force_takes_what_there_is_while_others_hold(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    b.append(b"1")
    answer = a.leave(b"2", FORCE | MODIFICATIONS)
    assert answer[:3] == [Reply.RUN, 1, 0]
    assert answer[4:] == [2, 0, 0, [b"a", 1], [b"1", b"2"]]
    assert lab.ask("count", "x") == 1
    assert b.leave(b"3", FORCE) == [Reply.DEFERRED, 0, 1]
    assert a.complete(answer[3])[-1] == [b"3"]


def test_force_with_nothing_to_execute(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.join()
    b.join()
    assert a.leave(b"", FORCE) == [Reply.LAST, 1, 0]


def test_restore_puts_back_the_modifications_of_all(lab: Lab) -> None:
    a = lab.process("a")
    assert a.do(ops.restore(0, b"x", {b"a": 3, b"q": 2})) == Reply.JOINED
    assert a.leave(b"", MODIFICATIONS) == [Reply.LAST, 0, 1, [b"q", 2, b"a", 3]]


def test_track_and_untrack_by_hand_also_within_one_call(lab: Lab) -> None:
    a = lab.process("a")
    track, untrack = ops.track(0, b"x"), ops.untrack(0, b"x")
    again, gone = ops.track(0, b"x"), ops.untrack(0, b"x")
    assert a.answers(track, again, untrack, gone) == [1, 0, 1, 0]
    assert lab.registry("a") == {}
    assert a.do(ops.track(0, b"x")) == 1
    assert lab.ask("registry", "a", 0, -1) == [b"x"]
    assert a.do(ops.track(0, b"x")) == 0
    assert a.close() == [Reply.LEFT_OVER, 1]
    assert a.do(ops.untrack(0, b"x")) == 1
    assert a.do(ops.untrack(0, b"x")) == 0


def test_joined_and_left_in_one_call_names_nothing(lab: Lab) -> None:
    a = lab.process("a")
    told = a.answers(ops.join(0, b"x"), ops.leave(0, b"x"), ops.join(0, b"x"))
    assert told == [Reply.JOINED, [Reply.LAST, 0, 1], Reply.JOINED]
    assert list(lab.registry("a")) == [b"x"]
    a.answers(ops.leave(0, b"x"), ops.join(0, b"x"), ops.leave(0, b"x"))
    assert lab.registry("a") == {}


def test_resources_do_not_touch_each_other(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1", b"x")
    a.append(b"2", b"x:y")
    a.append(b"3", b"")
    assert a.leave(resource=b"x")[-1] == [b"1"]
    assert a.leave(resource=b"x:y")[-1] == [b"2"]
    assert a.leave(resource=b"")[-1] == [b"3"]


def test_leave_never_renames_over_a_batch_that_nobody_runs(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    for partial, among in ((b"", False), (b"2", False), (b"2", True)):
        a.append(b"1")
        if among:
            b.join()
            b.leave(b"")
        lab.client.rpush(lab.key("batch:x"), "somebody's")
        before = lab.data()
        code, error = a.leave(partial, FORCE if among else 0)
        assert (code, b"PHONONSTATE" in error) == (Reply.FAILED, True)
        assert lab.data() == before
        lab.client.delete(lab.key("batch:x"))
        a.complete(a.leave()[3])
    lab.client.rpush(lab.key("batch:x"), "somebody's")
    a.join()
    before = lab.data()
    assert a.leave(b"alone")[0] == Reply.FAILED
    assert lab.data() == before
