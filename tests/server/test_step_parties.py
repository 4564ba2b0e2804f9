"""Sessions of known parties: meet, meeting, leave, recover."""

import pytest
from steps import LEASE, Lab, lab_fixture  # noqa: F401 - the fixture is found by its name


def test_the_last_is_whoever_leaves_when_all_have_come(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert a.meet(2) == [b"met", 0]
    a.modify()
    assert a.leave() == [b"last", 1, 0, 0, 0, [b"a", 1]], "b is still to come"
    assert lab.dump()["{=x}:modified"].content == {b"a": b"1"}
    b.meet(2)
    assert b.leave() == [b"last", 1, 0, 0, 1, [b"a", 1]]
    assert lab.dump().keys() == {"{=x}:memory"}


def test_a_process_that_comes_twice_counts_once(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    for _ in range(2):
        a.meet(2)
        assert a.leave()[3:5] == [0, 0]
    assert a.ask("meeting", b"a/1") == [2, 1, 0, 0]
    b.meet(2)
    assert b.leave()[3:5] == [0, 1]


def test_the_greatest_number_of_parties_counts(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.meet(3)
    b.meet(2)
    assert a.leave()[0] == b"held"
    assert b.leave()[3:5] == [0, 0]
    c.meet(2)
    assert c.leave()[3:5] == [0, 1]


def test_waiters_are_told_when_somebody_comes_or_goes(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.meet(2)
    assert a.ask("meeting", b"a/1") == [2, 1, 1, 1]
    b.meet(2)
    assert lab.dump()["{=x}:wake:a/1"].content == [b"1"]
    b.leave()
    assert lab.dump()["{=x}:wake:a/1"].content == [b"1", b"1"]
    assert a.ask("meeting", b"a/1") == [2, 2, 1, 1]


def test_the_dead_have_come_and_gone(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.meet(2)
    b.meet(2)
    assert a.recover(b) == [b"free", 0, b""]
    assert a.leave()[3:5] == [0, 1], "nobody is waited for"


def test_the_last_member_dies_before_all_have_come(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.meet(2)
    a.modify()
    b.recover(a)
    assert lab.dump()["{=x}:modified"].content == {b"a": b"1"}
    b.meet(2)
    assert b.leave() == [b"last", 1, 0, 0, 1, [b"a", 1]]


def test_what_waits_for_the_others_does_not_wait_for_ever(lab: Lab) -> None:
    a = lab.process("a")
    a.meet(2)
    a.modify()
    a.leave()
    seconds, _ = lab.client.time()
    for name in ("parties", "modified"):
        assert 0 < lab.dump()[f"{{=x}}:{name}"].expires - seconds * 1_000 <= LEASE + 1_000


@pytest.mark.parametrize("come", ["join", "modify", "meet", "append"])
def test_nothing_expires_while_somebody_is_there(lab: Lab, come: str) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.meet(3)
    a.modify()
    a.leave()
    getattr(b, come)(*{"meet": (3,), "append": (b"1",)}.get(come, ()))
    for name in ("parties", "modified"):
        assert lab.dump()[f"{{=x}}:{name}"].expires == -1
