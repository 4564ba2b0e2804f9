"""join, leave, modify; count, members, modified."""

import pytest
from steps import LEASE, Lab, lab_fixture  # noqa: F401 - the fixture is found by its name

from conftest import Redis


def test_join_counts_a_process_once(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert a.count() == 0
    assert a.join() == [b"joined", 0]
    assert a.join() == [b"joined", 0]
    assert b.join() == [b"joined", 0]
    assert a.count() == b.count() == 2


@pytest.mark.parametrize("colocated", [True, False])
def test_join_renews_the_lease_and_keeps_the_beginning(lab: Lab, colocated: bool) -> None:
    a = lab.process("a", colocated=colocated)
    joined = lab.now
    a.join()
    lab.advance(LEASE - 1)
    a.join()
    dump = lab.dump()
    assert dump["{=x}:members"].content == {b"a": lab.now + LEASE}
    assert dump["{@a}:holds"].content == {a.base: joined}


def test_join_puts_back_the_modifications_of_others_too(lab: Lab) -> None:
    a = lab.process("a")
    a.join(b=2, c=1)
    a.join(b=1)
    assert a.ask("modified") == [b"b", 3, b"c", 1]


def test_resources_do_not_touch_each_other(lab: Lab) -> None:
    x, y = lab.process("a", "x"), lab.process("a", "y")
    x.join()
    y.join()
    assert x.leave(b"data")[0] == b"run"
    assert y.count() == 1
    assert y.leave() == [b"last", 1, 0, 0, 1, []]


def test_a_lease_that_runs_out_is_not_counted(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.join(1_000)
    b.join(1_001)
    lab.advance(999)
    assert a.count() == 2
    lab.advance(1)
    assert a.count() == 1
    assert a.ask("members") == [b"b"]
    lab.advance(1)
    assert a.ask("members") == []


def test_modify_counts_and_makes_a_member(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert a.modify(3) == [b"counted", 0]
    assert b.modify() == [b"counted", 0]
    assert a.modify() == [b"counted", 0]
    assert a.count() == 2
    assert a.ask("modified") == [b"a", 4, b"b", 1]


def test_leave_says_how_many_are_left(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    for each in (a, b, c):
        each.join()
    assert a.leave() == [b"held", 1, 0, 2, 1]
    assert b.leave() == [b"held", 1, 0, 1, 1]
    assert c.leave() == [b"last", 1, 0, 0, 1, []]


def test_leave_of_a_process_that_is_no_member(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert a.leave() == [b"last", 1, 0, 0, 0, []]
    b.join()
    assert a.leave() == [b"held", 1, 0, 1, 0]
    assert b.count() == 1


def test_the_last_one_learns_who_modified_the_resource(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.modify(2)
    b.modify(5)
    assert a.leave() == [b"held", 1, 0, 1, 1]
    assert b.leave() == [b"last", 1, 0, 0, 1, [b"a", 2, b"b", 5]]
    b.join()
    assert b.leave() == [b"last", 1, 0, 0, 1, []], "the next session begins at nothing"


def test_the_last_one_gets_the_batch(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    b.append(b"2")
    assert a.leave(b"3") == [b"held", 1, 0, 1, 1]
    kind, clear, token, *rest = b.leave(b"4")
    assert (kind, clear) == (b"run", 0)
    assert token > 0
    assert rest == [0, 1, [b"a", 2, b"b", 2], 0, 4, [b"1", b"2", b"3", b"4"]]


def test_a_leave_with_a_partial_needs_no_join_before(lab: Lab) -> None:
    a = lab.process("a")
    kind, _, _, left, was_member, modified, _, count, partials = a.leave(b"only")
    assert (kind, left, was_member, modified) == (b"run", 0, 1, [b"a", 1])
    assert (count, partials) == (1, [b"only"])


def test_a_partial_may_be_any_bytes(lab: Lab) -> None:
    a = lab.process("a")
    partials = [bytes(range(256)), b"\0", b"run", b" ", b"x" * 100_000]
    for partial in partials:
        a.append(partial)
    assert a.leave()[8] == partials


def test_leave_drops_expired_members(lab: Lab) -> None:
    dead, alive, a = (lab.process(name) for name in ("dead", "alive", "a"))
    dead.append(b"from the dead")
    lab.advance(LEASE)
    alive.join()
    assert a.leave(b"mine") == [b"held", 1, 0, 1, 1], "the dead one is not counted"
    assert set(lab.dump()["{=x}:members"].content) == {b"alive"}
    kind, *_, partials = alive.leave()
    assert (kind, partials) == (b"run", [b"from the dead", b"mine"])


def test_an_expired_member_that_leaves_after_all_is_still_the_last(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    lab.advance(LEASE + 1)
    assert a.leave() == [b"last", 1, 0, 0, 1, []]


def test_an_expired_member_that_was_dropped_is_not_told_that_it_is_the_last(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.join()
    lab.advance(LEASE)
    b.join()
    assert b.leave() == [b"last", 1, 0, 0, 1, []]
    assert a.leave() == [b"last", 1, 0, 0, 0, []], "nobody is left, but it was no member"


def test_a_forced_leave_takes_what_has_come_together_while_others_hold(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    b.append(b"2")
    kind, _, token, left, was_member, modified, *_, partials = a.leave(b"3", force=True)
    assert (kind, left, was_member) == (b"run", 1, 1)
    assert (modified, partials) == ([b"a", 2, b"b", 1], [b"1", b"2", b"3"])
    assert b.count() == 1, "the other one still is a member"
    assert a.complete(token) == [b"done", 1]
    b.append(b"4")
    kind, *_, partials = b.leave()
    assert (kind, partials) == (b"run", [b"4"])


def test_a_forced_leave_with_nothing_to_execute(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.join()
    b.modify(2)
    assert a.leave(force=True) == [b"last", 1, 0, 1, 1, [b"b", 2]]
    assert b.leave() == [b"last", 1, 0, 0, 1, [b"b", 2]], "its session goes on"


def test_a_forced_leave_while_a_batch_runs_is_deferred(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch()
    b.append(b"1")
    c.append(b"2")
    assert b.leave(force=True) == [b"deferred", 1, 0, 1, 1, [b"b", 1, b"c", 1]]
    c.append(b"3")
    kind, _, again, _, count, partials = a.complete(token)
    assert (kind, count, partials) == (b"again", 2, [b"1", b"2"])
    assert a.complete(again) == [b"done", 1]
    assert c.leave()[-1] == [b"3"]


def test_leave_never_renames_over_a_batch_that_nobody_runs(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    lab.client.rpush(a.base + b":batch", "whose?")
    before = lab.dump()
    with pytest.raises(Exception, match=r"PHONONSTATE .*:batch exists"):
        a.leave()
    assert lab.dump() == before


@pytest.mark.parametrize("colocated", [True, False])
def test_the_registry_names_what_a_process_is_responsible_for(lab: Lab, colocated: bool) -> None:
    a = lab.process("a", colocated=colocated)
    b = lab.process("b", colocated=colocated)
    a.join()
    b.append(b"1")
    assert a.holds()
    assert b.holds()
    a.leave()
    assert not a.holds(), "it is no member, owns no batch, holds no lock"
    token = b.leave()[2]
    assert b.holds(), "it owns the batch"
    b.join()
    b.complete(token)
    assert b.holds(), "it is a member again"
    b.lock()
    b.leave()
    assert b.holds(), "it holds the lock"
    b.unlock()
    assert not b.holds()
    a.modify()
    assert a.holds()


def test_the_shipped_library_reads_the_servers_clock(server: Redis, namespace: str) -> None:
    lab = Lab(server, namespace, clock=False)
    try:
        a = lab.process("a")
        seconds, micros = lab.client.time()
        earliest = seconds * 1_000 + micros // 1_000
        a.join()
        (until,) = lab.dump()["{=x}:members"].content.values()
        (since,) = map(int, lab.dump()["{@a}:holds"].content.values())
        seconds, micros = lab.client.time()
        latest = seconds * 1_000 + micros // 1_000
        assert earliest <= since <= latest
        assert until == since + LEASE
        token = a.leave(b"data")[2]
        seconds, micros = lab.client.time()
        assert since * 1_000 <= token <= seconds * 1_000_000 + micros
    finally:
        lab.client.delete(*(lab.namespace + ":" + name for name in lab.dump()))
        lab.close()
