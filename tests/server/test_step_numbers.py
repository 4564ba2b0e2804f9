"""Operation numbers: a call that is repeated gets the same answer and changes nothing."""

import pytest
from scenarios import SCENARIOS, documented, prepare
from steps import LEASE, Lab, lab_fixture, refused, settled  # noqa: F401 - the fixture is found by its name

from phonon.protocol import messages

DELIVERING = sorted(name for name in SCENARIOS if " run" in name or " again" in name)


def test_there_is_a_scenario_for_every_documented_answer() -> None:
    assert documented() == {name.partition(" (")[0] for name in SCENARIOS}


@pytest.mark.parametrize("colocated", [True, False])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_repeat_gets_the_same_answer_and_changes_nothing(
    lab: Lab, name: str, colocated: bool
) -> None:
    process, step, args = prepare(lab, name, colocated=colocated)
    answer = process.do(step, *args)
    assert f"{step} {answer[0].decode()}" == name.partition(" (")[0]
    before = settled(lab.dump())
    for _ in range(3):
        lab.advance(7_000)
        assert process.again() == answer
        assert settled(lab.dump()) == before


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_that_comes_after_a_later_one_is_refused(lab: Lab, name: str) -> None:
    process, step, args = prepare(lab, name)
    process.do(step, *args)
    stale = process.sent
    process.join()
    before = lab.dump()
    with refused(f"PHONONSTALE operation {stale.number} came after {stale.number + 1}"):
        process.send(stale)
    assert lab.dump() == before


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_that_is_overtaken_before_it_arrives_is_refused(lab: Lab, name: str) -> None:
    process, step, args = prepare(lab, name)
    late = process.command(step, *args)
    process.join()
    before = lab.dump()
    with refused("PHONONSTALE"):
        process.send(late)
    assert lab.dump() == before


def test_a_repeat_of_a_repeat_after_other_processes_came_and_went(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    b.join()
    answer = a.leave()
    assert answer == [b"held", 1, 0, 1, 1]
    b.leave()
    before = settled(lab.dump())
    assert a.again() == answer, "what it was told then, not what is now"
    assert settled(lab.dump()) == before


@pytest.mark.parametrize("name", DELIVERING)
def test_a_repeat_delivers_the_batch_again(lab: Lab, name: str) -> None:
    process, step, args = prepare(lab, name)
    answer = process.do(step, *args)
    *_, attempt, count, partials = process.again()
    assert [attempt, count, partials] == answer[-3:]
    assert count == len(partials) > 0
    assert process.complete(answer[2]) == [b"done", 1], "and it can be completed, once"
    assert process.complete(answer[2])[0] == b"lost"


@pytest.mark.parametrize("name", DELIVERING)
def test_a_repeat_tells_that_the_batch_was_taken_over(lab: Lab, name: str) -> None:
    process, step, args = prepare(lab, name)
    token = process.do(step, *args)[2]
    lab.client.hset(f"{process.base.decode()}:running", "owner", "survivor")
    assert process.again()[0] == b"lost"
    assert process.complete(token)[0] == b"lost"
    survivor = lab.process("survivor")
    assert survivor.resume(token)[:3] == [b"run", 0, token], "the token stays the same"
    assert survivor.complete(token) == [b"done", 1]


def test_a_repeat_of_a_forced_leave_never_tells_that_it_was_the_last(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    b.append(b"1")
    assert not messages.left(a.leave(b"2", force=True)).last
    lab.client.hset(f"{a.base.decode()}:running", "owner", "survivor")
    assert not messages.left(a.again()).last, "b is, when it leaves"


@pytest.mark.parametrize("name", DELIVERING)
def test_a_repeat_tells_that_another_batch_runs(lab: Lab, name: str) -> None:
    process, step, args = prepare(lab, name)
    token = process.do(step, *args)[2]
    lab.client.hset(f"{process.base.decode()}:running", "token", token + 1)
    assert process.again()[0] == b"lost"


def test_numbers_may_have_gaps(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    a.command("append", LEASE, b"never arrives")
    a.command("append", LEASE, b"never arrives either")
    assert a.append(b"1") == [b"stored", 0]
    assert lab.dump()["{=x}:partials"].content == [b"1"]


def test_numbers_are_large(lab: Lab) -> None:
    a = lab.process("a")
    for number in (1, 2**31, 2**32 + 1, 10**15, 10**15 + 1):
        a.number = number - 1
        a.append(b"%d" % number)
        a.again()
    assert len(lab.dump()["{=x}:partials"].content) == 5


def test_processes_count_for_themselves(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    for _ in range(5):
        a.join()
    assert b.append(b"1") == [b"stored", 0]
    assert b.number == 1


def test_resources_count_for_themselves(lab: Lab) -> None:
    x, y = lab.process("a", "x"), lab.process("a", "y")
    for _ in range(5):
        x.join()
    y.append(b"1")
    assert y.again() == [b"stored", 0]
    assert y.count() == 1


def test_a_number_is_forgotten_with_the_memory(lab: Lab) -> None:
    a = lab.process("a")
    a.leave()
    lab.client.delete(a.base + b":memory")
    assert a.again() == [b"last", 1, 0, 0, 0, []]


def test_a_plain_call_takes_no_number(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    before = lab.dump()
    a.count()
    a.ask("members")
    a.ask("modified")
    a.fetch(0, 0, 9)
    assert lab.dump() == before
    a.renew()
    assert a.again() == [b"joined", 0]
