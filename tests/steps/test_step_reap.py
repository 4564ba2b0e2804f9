"""Reap: what a dead process, or a class queue, has left in a partition."""

import pytest

from phonon._protocol.answers import Reply
from phonon._protocol.operations import MODIFICATIONS
from steps.lab import LEFT_SCORE, WEEK_MS, Lab, lab_fixture, refused  # noqa: F401 - found by its name
from support import operations as ops

ONE = [Reply.REAPED, 0, 0, [], [], 1]


def test_a_dead_member_is_dropped_and_its_modifications_count(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.modify(3)
    b.join()
    assert b.reap(a) == ONE
    assert lab.ask("count", "x") == 1
    assert b.leave(b"", MODIFICATIONS) == [Reply.LAST, 0, 1, [b"a", 3]]
    assert set(lab.data()) == set()


def test_what_the_last_member_stored_is_executed(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    code, left, stay, batches, wrong, taken = b.reap(a)
    assert (code, left, stay, wrong, taken) == (Reply.REAPED, 0, 0, [], 1)
    resource, token, wait = batches
    assert (resource, wait) == (b"x", 0)
    assert b.resume(token) == [Reply.RUN, 0, 0, token, 1, 0, 0, None, [b"1"]]
    assert b.complete(token) == Reply.DONE
    assert lab.data() == {}


def test_a_batch_is_taken_over_with_its_token_and_the_crash_is_counted(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch(b"1")
    assert b.reap(a)[3] == [b"x", token, 0]
    assert c.reap(b)[3] == [b"x", token, 0]
    assert c.resume(token)[3:7] == [token, 1, 0, 2]
    assert c.complete(token) == Reply.DONE


def test_a_batch_that_waits_for_its_next_attempt_goes_on_waiting(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch()
    a.fail(token, delay=60_000)
    lab.advance(1000)
    (_, _, wait) = b.reap(a)[3]
    assert 58_900 <= wait <= 59_001


def test_the_owner_goes_on_with_what_its_dead_partner_left(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch(b"1")
    b.append(b"2")
    assert c.reap(b)[3] == []
    again = a.complete(token)
    assert (again[0], again[-1]) == (Reply.AGAIN, [b"2"])


def test_a_dead_owner_was_the_last_member_too(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    a.append(b"2")
    assert b.reap(a)[3] == [b"x", token, 0]
    again = b.complete(token)
    assert (again[0], again[-1]) == (Reply.AGAIN, [b"2"])


def test_locks_come_first_then_memberships_then_batches(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(resource=b"batch")
    a.append(b"1", b"member")
    a.do(ops.lock(0, b"lock", "a/1", queue=False))
    assert b.reap(a, 1) == [Reply.REAPED, 2, 2, [], [], 1]
    assert lab.ask("lockers", "lock") == [[], []]
    _, left, _, batches, _, _ = b.reap(a, 1)
    assert (left, batches[0]) == (1, b"member")
    assert "a" in {name.decode() for name in lab.dump()["lanes"]}
    assert b.reap(a, 1) == [Reply.REAPED, 0, 0, [b"batch", token, 0], [], 1]
    assert lab.dump()["lanes"] == {b"b"}


def test_locks_and_places_in_line_are_freed_and_the_next_is_woken(lab: Lab) -> None:
    a, b, c, d = (lab.process(name) for name in "abcd")
    a.lock()
    b.lock(queue=True)
    c.lock(queue=True)
    d.reap(a)
    assert b.mail() == [b"b/1"]
    d.reap(b)
    assert c.mail() == [b"c/1"]
    assert "mailbox:b" not in lab.dump()
    assert c.lock(queue=True)[0] == Reply.GRANTED
    assert d.lock("1s")[0] == Reply.BUSY


def test_shared_locks_of_the_dead_only_are_freed(lab: Lab) -> None:
    a, b, w = (lab.process(name) for name in "abw")
    for name in ("1s", "2s"):
        a.lock(name, lease=60_000)
    b.lock("1s")
    w.lock(queue=True)
    w.reap(a)
    assert w.mail() == []
    assert lab.ask("lockers", "x")[0][0] == b"b/1s"
    b.unlock("1s")
    assert w.mail() == [b"w/1"]
    assert "leases:x" not in lab.dump()


def test_others_are_left_alone(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.join()
    b.batch(b"1", resource=b"y")
    b.append(b"2")
    b.lock()
    before = {k: v for k, v in lab.dump().items() if k.endswith((":b", "y"))}
    c.reap(a)
    after = lab.dump()
    assert {k: after[k] for k in before} == before
    assert after["partials:x"] == [b"2"]
    assert c.lock()[2] == b"b/1"


def test_a_newcomer_gets_what_was_not_ended(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.append(b"1")
    b.join()
    assert c.reap(a) == ONE
    assert b.leave()[-1] == [b"1"]


def test_one_that_does_not_execute_marks_what_it_leaves(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch(b"1")
    a.append(b"2", b"y")
    a.join(b"z")
    a.lock()
    assert b.reap(a, recovers=False) == [Reply.REAPED, 0, 2, [], [], 1], (
        "it took one over, and left two"
    )
    assert b.reap(a, recovers=False) == [Reply.REAPED, 0, 2, [], [], 0]
    assert lab.registry("a") == {b"x": LEFT_SCORE, b"y": LEFT_SCORE}
    assert lab.ask("lockers", "x") == [[], []]
    assert lab.ask("count", "y") == 0
    assert b"a" in lab.dump()["lanes"]
    _, left, stay, batches, wrong, _ = c.reap(a)
    assert (left, stay, wrong) == (0, 0, [])
    assert {batches[0], batches[3]} == {b"x", b"y"}
    assert token in batches
    assert b"a" not in lab.dump()["lanes"]
    assert "registry:a" not in lab.dump()


@pytest.mark.parametrize("suffix", ["members", "partials", "running", "left", "lock", "queue"])
def test_what_cannot_be_reaped_is_said_and_blocks_nothing(lab: Lab, suffix: str) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1", b"wrong")
    a.append(b"2", b"right")
    key = lab.key(f"{suffix}:wrong")
    lab.client.delete(key)
    lab.client.set(key, "somebody's")
    before = {k: v for k, v in lab.data().items() if k.endswith(":wrong")}
    _, left, stay, batches, (resource, error), taken = b.reap(a)
    assert (left, stay, batches[0], resource, taken) == (0, 1, b"right", b"wrong", 1)
    assert b"WRONGTYPE" in error
    assert lab.registry("a") == {b"wrong": float("inf")}
    assert {k: v for k, v in lab.data().items() if k.endswith(":wrong")} == before
    assert b.reap(a) == [Reply.REAPED, 0, 1, [], [], 0]


def test_the_dead_one_is_fenced_before_anything_and_for_a_week(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    a.append(b"2", b"y")
    b.reap(a, 1)
    with refused("PHONONFENCED 2"):
        a.append(b"3")
    ttl = lab.client.pttl(lab.key("lane:a"))
    assert WEEK_MS - 60_000 < ttl <= WEEK_MS
    assert lab.ask("open", "a", 4)[0] == b""


def test_an_unused_lane_needs_no_marker(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    b.reap(a)
    assert "lane:a" not in lab.dump()
    with refused("PHONONLOST 0"):
        a.join()


def test_survivors_share_the_work(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    names = [b"r%d" % i for i in range(25)]
    for name in names:
        a.append(b"1", name)
    found: list[bytes] = []
    left = 1
    while left:
        for survivor in (b, c):
            _, left, _, batches, _, _ = survivor.reap(a, 4)
            found += batches[::3]
    assert sorted(found) == sorted(names)


def test_nobody_reaps_itself(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    code, error = a.reap(a)
    assert (code, b"PHONONSTATE" in error) == (Reply.FAILED, True)
    assert a.join() == Reply.JOINED


def test_a_class_queue_is_nobody_that_died(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch(b"1")
    a.hand_off(token)
    assert b.reap(b"class:C", recovers=False) == [Reply.REAPED, 0, 1, [], [], 0]
    assert lab.dump()["handed"] == {b"class:C"}
    assert c.reap(b"class:C") == [Reply.REAPED, 0, 0, [b"x", token, 0], [], 1]
    assert "handed" not in lab.dump()
    assert c.resume(token)[6] == 0


def test_a_repeat_of_a_reap_gives_the_same_batches(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    told = b.reap(a)
    assert b.again() == [told]
