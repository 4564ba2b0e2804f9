"""recover, claim, bury: what survivors do with what a dead process has left."""

import pytest
from steps import LEASE, Lab, Process, lab_fixture, refused  # noqa: F401 - found by its name

HOUR_MS = 3_600_000


@pytest.fixture(params=[True, False], ids=["one server", "cluster"])
def processes(lab: Lab, request: pytest.FixtureRequest) -> list[Process]:
    """Three processes; the first one is to die."""
    return [lab.process(name, colocated=request.param) for name in "abc"]


def claim(lab: Lab, dead: Process, most: int, ms: int = 1_000) -> tuple[int, set[bytes]]:
    left, *bases = lab.call("claim", 1, dead.registry, most, ms)
    return left, set(bases)


def bury(lab: Lab, dead: Process) -> bool:
    return bool(lab.call("bury", 1, dead.registry, HOUR_MS))


def test_a_dead_member_is_dropped(processes: list[Process]) -> None:
    a, b, _ = processes
    a.join()
    b.join()
    assert b.recover(a) == [b"free", 0, b""], "it is a member itself"
    assert b.count() == 1
    assert not a.holds()
    assert b.holds()
    assert b.leave() == [b"last", 1, 0, 0, 1, []]


def test_what_the_last_member_has_stored_is_executed(processes: list[Process]) -> None:
    a, b, _ = processes
    a.append(b"1")
    a.append(b"2")
    kind, clear, token, crashes, attempt, count, partials = b.recover(a)
    assert (kind, clear, crashes, attempt, count) == (b"run", 0, 0, 0, 2)
    assert partials == [b"1", b"2"]
    assert b.holds()
    assert b.ask("modified") == []
    assert b.complete(token) == [b"done", 1]
    assert not b.holds()


def test_a_batch_is_taken_over_with_its_token(processes: list[Process]) -> None:
    a, b, c = processes
    token = a.batch(b"1")
    assert b.recover(a) == [b"run", 0, token, 1, 0, 1, [b"1"]]
    assert a.complete(token)[0] == b"lost"
    assert c.recover(b) == [b"run", 0, token, 2, 0, 1, [b"1"]], "two have died with it"
    assert c.complete(token) == [b"done", 1]


def test_a_batch_that_waits_for_its_next_attempt_goes_on_waiting(
    lab: Lab, processes: list[Process]
) -> None:
    a, b, c = processes
    token = a.batch()
    a.fail(token, delay=5_000)
    lab.advance(1_000)
    assert b.recover(a) == [b"later", 0, token, 4_000]
    lab.advance(4_000)
    assert b.resume(token)[:3] == [b"run", 0, token]
    assert c.recover(b)[:4] == [b"run", 0, token, 1], "now one has died while it executed"


def test_an_owner_goes_on_with_what_its_dead_partner_has_left(processes: list[Process]) -> None:
    a, b, c = processes
    token = b.batch(b"1")
    a.append(b"2")
    assert c.recover(a) == [b"free", 1, b"b"]
    c.append(b"3")  # the session after
    again = b.complete(token)
    assert again[:2] == [b"again", 0]
    assert again[-1] == [b"2"]


def test_a_dead_owner_was_the_last_member_too(processes: list[Process]) -> None:
    a, b, _ = processes
    token = a.batch(b"1")
    a.append(b"2")
    assert b.recover(a)[:4] == [b"run", 0, token, 1]
    assert b.complete(token)[-1] == [b"2"]


def test_the_lock_of_the_dead_goes_to_the_next_at_once(lab: Lab, processes: list[Process]) -> None:
    a, b, c = processes
    a.lock()
    assert b.lock(queue=True)[0] == b"wait"
    assert c.recover(a) == [b"free", 1, b""]
    assert lab.dump()["{=x}:wake:b/1"].content == [b"%d" % lab.now]
    assert b.lock(queue=True)[0] == b"granted"


def test_a_dead_waiter_holds_nobody_up(processes: list[Process]) -> None:
    a, b, c = processes
    c.lock()
    a.lock(queue=True)
    b.lock(queue=True)
    c.unlock()  # wakes a
    assert b.lock(queue=True)[0] == b"wait"
    c.recover(a)
    assert b.lock(queue=True)[0] == b"granted"


def test_others_are_left_alone(lab: Lab, processes: list[Process]) -> None:
    a, b, c = processes
    a.join()
    b.append(b"1")
    b.lock()
    before = {name: key for name, key in lab.dump().items() if "memory" not in name}
    assert c.recover(a) == [b"free", 1, b""]
    assert c.recover(a) == [b"free", 1, b""], "as often as one likes"
    after = {name: key for name, key in lab.dump().items() if "memory" not in name}
    del before["{@a}:holds"]
    before["{=x}:members"].content.pop(b"a")
    after.pop("{=x}:fence", None)
    assert after == before


def test_a_newcomer_belongs_to_the_next_session(processes: list[Process]) -> None:
    a, b, c = processes
    a.append(b"1")
    token = b.recover(a)[2]
    c.append(b"2")
    assert b.complete(token) == [b"done", 1]
    assert c.leave()[-1] == [b"2"]


def test_the_dead_cannot_come_back(lab: Lab, processes: list[Process]) -> None:
    a, b, _ = processes
    token = a.batch(b"1")
    b.recover(a)
    if a.colocated:
        assert bury(lab, a)
        assert lab.dump()["{@a}:holds"].content == b"dead"
    for step, *args in (
        ("join", LEASE),
        ("append", LEASE, b"2"),
        ("modify", LEASE, 1),
        ("leave", 0, LEASE, b"2"),
        ("lock", b"a/1", LEASE, 1),
    ):
        with refused("PHONONDEAD a was declared dead"):
            a.send(a.command(str(step), *args))
    assert a.leave()[0] == b"last", "nothing is stored and nothing begun"
    assert a.complete(token)[0] == b"lost"
    assert b.complete(token) == [b"done", 1]


def test_a_repeat_of_the_dead_is_answered_as_before(lab: Lab) -> None:
    """The call was carried out; refused, it would be made once more under another name."""
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    b.recover(a)
    assert bury(lab, a)
    assert a.again() == [b"stored", 0]


def test_hold_is_refused_too(lab: Lab) -> None:
    a = lab.process("a")
    assert bury(lab, a)
    with refused("PHONONDEAD"):
        lab.call("hold", 1, a.registry, a.base, a.id)


def test_survivors_share_the_work(lab: Lab) -> None:
    held = [lab.process("a", f"r{i}") for i in range(10)]
    for process in held:
        process.join()
        lab.advance(1)
    a = held[0]
    left, first = claim(lab, a, 4)
    assert (left, len(first)) == (10, 4)
    left, second = claim(lab, a, 4)
    assert (left, len(second)) == (10, 4)
    assert not first & second
    lab.advance(999)
    left, third = claim(lab, a, 4)
    assert (left, third) == (10, {p.base for p in held} - first - second)
    assert claim(lab, a, 4) == (10, set()), "all are in somebody's hands"
    lab.advance(1)
    assert claim(lab, a, 9)[1] == first | second, "whoever had them did not see to them"
    assert not bury(lab, a), "there is something left"


def test_locks_come_first(lab: Lab) -> None:
    x, y, z = (lab.process("a", name) for name in "xyz")
    x.join()
    lab.advance(1)
    y.join()
    lab.advance(1)
    y.lock()
    lab.advance(1)
    z.lock()
    assert claim(lab, x, 2)[1] == {y.base, z.base}
    assert claim(lab, x, 2)[1] == {x.base}


def test_the_buried_have_nothing_to_claim(lab: Lab) -> None:
    a = lab.process("a")
    assert bury(lab, a)
    assert claim(lab, a, 9) == (-1, set())
    assert bury(lab, a), "again"
    assert 0 < lab.client.pttl(a.registry) <= HOUR_MS


def test_a_foreign_registry_is_neither_claimed_nor_buried(lab: Lab) -> None:
    a = lab.process("a")
    lab.client.set(a.registry, "somebody else's")
    for step, args in (("claim", (9, 1_000)), ("bury", (HOUR_MS,))):
        with refused("WRONGTYPE"):
            lab.call(step, 1, a.registry, *args)


def test_an_heir_gets_the_batch_and_whoever_knows_the_class(processes: list[Process]) -> None:
    a, b, _ = processes
    heir = a.lab.process("class:C", colocated=a.colocated)
    token = a.batch(b"1")
    assert a.entrust(token, heir) == [b"entrusted", 1]
    assert heir.holds()
    assert a.complete(token)[0] == b"lost"
    assert b.recover(heir, died=False) == [b"run", 0, token, 0, 0, 1, [b"1"]], "nobody has died"
    assert not heir.holds()


def test_what_is_left_to_an_heir_stays_named(lab: Lab) -> None:
    """The entruster died before it could list the heir: the survivor has to do it."""
    a, b = lab.process("a"), lab.process("b")
    heir = lab.process("class:C")
    token = a.batch(b"1")
    a.enter()
    lab.client.hset(f"{a.base.decode()}:running", "owner", "class:C")
    assert b.recover(a) == [b"free", 1, b"class:C"]
    assert a.holds(), "until the heir is listed"
    assert b.do("recover", a.id, 1, LEASE, a.registry, heir.id) == [b"free", 1, b"class:C"]
    assert not a.holds()
    assert heir.resume(token)[0] == b"run"


def test_a_parked_batch_is_replayed_under_a_new_token(processes: list[Process]) -> None:
    a, b, _ = processes
    token = a.batch(b"1")
    a.fail(token, most=1)
    names = a.lab.call("parked", 1, a.base, a.id)
    assert (names[0], names[2]) == (b"%d" % token, 1)
    assert a.lab.call("look", 1, a.base, a.id, token, 0, 9) == [b"1"]
    later = a.batch(b"2")
    assert b.replay(token) == [b"busy", 1]
    a.complete(later)
    kind, _, new, attempt, count, partials = b.replay(token)
    assert (kind, attempt, count, partials) == (b"run", 0, 1, [b"1"])
    assert new > later > token
    assert b.complete(new) == [b"done", 1]
    assert b.replay(token) == [b"missing", 1]


def test_a_parked_batch_is_discarded(processes: list[Process]) -> None:
    a, b, _ = processes
    token = a.batch(b"1")
    a.fail(token, most=1)
    assert b.discard(token + 1) == [b"missing", 1]
    assert b.discard(token) == [b"discarded", 1]
    assert b.discard(token) == [b"missing", 1]
    assert not [name for name in a.lab.dump() if "parked" in name]
