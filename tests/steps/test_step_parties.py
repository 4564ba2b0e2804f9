"""Sessions of known parties: over only when so many have come and left."""

from phonon._protocol.answers import Reply
from phonon._protocol.operations import MODIFICATIONS
from steps.lab import WEEK_MS, Lab, lab_fixture  # noqa: F401 - found by its name
from support import operations as ops


def ttl(lab: Lab, suffix: str) -> int:
    return int(lab.client.pttl(lab.key(suffix)))


def test_the_last_is_the_one_that_leaves_when_all_have_come(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.meet(2)
    a.modify(2)
    assert a.leave() == [Reply.LAST, 0, 0]
    b.meet(2)
    assert b.leave(b"", MODIFICATIONS) == [Reply.LAST, 0, 1, [b"a", 2]]
    assert lab.data() == {}


def test_a_rebirth_counts_once(lab: Lab) -> None:
    a, a2, b = lab.process("a"), lab.process("a2"), lab.process("b")
    a.meet(2)
    a2.meet(2, b"a")
    b.join()
    a2.reap(a)
    assert a2.leave() == [Reply.HELD, 1, 0, 0]
    assert b.leave() == [Reply.LAST, 0, 0]
    b.meet(2)
    assert b.leave() == [Reply.LAST, 0, 1]


def test_the_greatest_number_counts(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.meet(3)
    b.meet(1)
    a.leave()
    assert b.leave() == [Reply.LAST, 0, 0]
    assert lab.dump()["parties:x"][b"n"] == b"3"


def test_data_does_not_wait_for_the_parties(lab: Lab) -> None:
    a = lab.process("a")
    a.meet(2)
    answer = a.leave(b"1")
    assert answer[:3] == [Reply.RUN, 0, 0]
    assert answer[-1] == [b"1"]


def test_waiters_get_mail_when_somebody_comes_or_goes(lab: Lab) -> None:
    a, b, w = lab.process("a"), lab.process("b"), lab.process("w")
    assert w.do(ops.await_parties(0, b"x", "w/1")) == [Reply.MEETING, 0, 0, 0, 0]
    assert "parties:x" not in lab.dump()
    a.meet(2)
    assert w.do(ops.await_parties(0, b"x", "w/1")) == [Reply.MEETING, 2, 1, 1, 0]
    assert a.do(ops.await_parties(0, b"x", "a/1")) == [Reply.MEETING, 2, 1, 1, 1]
    a.do(ops.forget(0, b"x", "a/1"))
    b.meet(2)
    assert w.mail() == [b"w/1"]
    w.take_mail()
    a.leave()
    assert w.mail() == [b"w/1"]
    w.take_mail()
    b.leave()
    assert w.mail() == [b"w/1"]
    assert a.mail() == [], "it has waited no more"
    assert 0 < ttl(lab, "mailbox:w") <= 10_000


def test_the_dead_have_come_and_gone(lab: Lab) -> None:
    a, b, w = lab.process("a"), lab.process("b"), lab.process("w")
    a.meet(2)
    a.modify(3)
    w.do(ops.await_parties(0, b"x", "w/1"))
    w.reap(a)
    assert w.mail() == [b"w/1"]
    b.meet(2)
    assert b.leave(b"", MODIFICATIONS) == [Reply.LAST, 0, 1, [b"a", 3]]
    assert set(lab.data()) == {"mailbox:w"}


def test_reaping_the_last_of_all_ends_the_session(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.meet(1)
    a.modify(3)
    b.reap(a)
    assert lab.data() == {}


def test_what_waits_does_not_wait_for_ever_but_for_a_week(lab: Lab) -> None:
    a = lab.process("a")
    a.meet(2)
    a.modify()
    assert ttl(lab, "parties:x") == -1
    a.leave()
    for suffix in ("parties:x", "left:x"):
        assert WEEK_MS - 60_000 < ttl(lab, suffix) <= WEEK_MS
    a.meet(2)
    assert ttl(lab, "parties:x") == ttl(lab, "left:x") == -1
