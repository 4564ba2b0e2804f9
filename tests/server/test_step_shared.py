"""Shared locks and semaphores: lock, unlock, renew, recover, lockers."""

from steps import LEASE, Lab, Process, lab_fixture  # noqa: F401 - the fixture is found by its name


def woken(lab: Lab) -> set[str]:
    return {name.partition(":wake:")[2] for name in lab.dump() if ":wake:" in name}


def queue_up(lab: Lab, process: Process, name: str) -> None:
    """Wait behind all that wait already."""
    lab.advance(1)
    assert process.lock(name, queue=True)[0] == b"wait"


def test_any_number_share_a_lock_and_exclude_a_writer(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    tokens = [process.lock(name)[2] for process, name in ((a, "1s"), (a, "2s"), (b, "1s"))]
    assert tokens == sorted(set(tokens))
    assert c.lock("1") == [b"busy", 1, LEASE, b"a/1s", lab.now, b"main"]
    assert lab.dump()["{=x}:sharers"].content == {
        b"a/1s": b"%d %d main" % (tokens[0], lab.now),
        b"a/2s": b"%d %d main" % (tokens[1], lab.now),
        b"b/1s": b"%d %d main" % (tokens[2], lab.now),
        b"@a": b"2",
        b"@b": b"1",
    }
    assert a.unlock("1s") == [b"released", 0], "it has another"
    assert a.unlock("2s") == [b"released", 1]
    assert b.unlock("1s") == [b"released", 1]
    assert c.lock("1")[2] > tokens[-1]
    assert a.lock("1s")[0] == b"busy"
    c.unlock("1")
    assert lab.dump().keys() == {"{=x}:memory"}


def test_readers_that_come_later_wait_behind_a_writer(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock("1s")
    queue_up(lab, b, "1")
    queue_up(lab, c, "1s")
    assert c.lock("2s")[0] == b"busy", "nor does it get in without waiting"
    a.unlock("1s")
    assert woken(lab) == {"b/1"}
    assert c.lock("1s", queue=True)[0] == b"wait"
    assert b.lock("1", queue=True)[0] == b"granted"
    b.unlock("1")
    assert woken(lab) == {"c/1s"}
    assert c.lock("1s", queue=True)[0] == b"granted"


def test_any_number_of_readers_are_woken(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    for number in range(250):
        queue_up(lab, b, f"{number}s")
    queue_up(lab, b, "250")
    queue_up(lab, b, "251s")
    a.unlock()
    assert woken(lab) == {f"b/{number}s" for number in range(250)}


def test_those_who_share_are_woken_together_up_to_the_next_writer(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock("1")
    for process, name in ((b, "1s"), (c, "1s"), (b, "2"), (c, "2s")):
        queue_up(lab, process, name)
    a.unlock("1")
    assert woken(lab) == {"b/1s", "c/1s"}
    assert c.lock("1s", queue=True)[0] == b"granted", "they may come in any order"
    assert b.lock("1s", queue=True)[0] == b"granted"


def test_no_more_are_woken_than_a_semaphore_has_places(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock("1s2")
    a.lock("2s2")
    for name in ("1s2", "2s2", "3s2"):
        queue_up(lab, b, name)
    a.unlock("1s2")
    assert woken(lab) == {"b/1s2"}
    a.unlock("2s2")
    assert woken(lab) == {"b/1s2", "b/2s2"}
    assert b.lock("2s2", queue=True)[0] == b"wait", "one after the other"
    assert b.lock("1s2", queue=True)[0] == b"granted"
    assert woken(lab) == {"b/2s2"}
    assert b.lock("2s2", queue=True)[0] == b"granted"
    assert woken(lab) == set()
    assert b.lock("3s2", queue=True)[0] == b"wait"


def test_a_sharer_whose_lease_runs_out_is_dropped_alone(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock("1s")
    lab.advance(LEASE - 1)
    b.lock("1s")
    lab.advance(1)
    assert c.lock("1")[3] == b"b/1s"
    assert lab.dump()["{=x}:shared"].content.keys() == {b"b/1s"}
    assert lab.dump()["{=x}:sharers"].content.keys() == {b"b/1s", b"@b"}
    assert a.unlock("1s") == [b"lost", 1]


def test_renew_prolongs_a_shared_lock_and_brings_none_back(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock("1s")
    lab.advance(LEASE - 1)
    assert a.renew("1s", "2s") == [0, 1, 0]
    lab.advance(LEASE - 1)
    assert b.lock("1")[0] == b"busy"
    lab.advance(1)
    assert a.renew("1s") == [0, 0]
    assert b.lock("1")[0] == b"granted"


def test_a_repeat_gets_the_same_grant(lab: Lab) -> None:
    a = lab.process("a")
    granted = a.lock("1s")
    before = lab.dump()["{=x}:sharers"]
    assert a.again() == granted
    assert a.lock("1s") == granted, "nor does the same holder get another"
    assert lab.dump()["{=x}:sharers"] == before


def test_the_shared_locks_of_the_dead_are_freed(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock("1s")
    a.lock("2s")
    b.lock("1s")
    queue_up(lab, c, "1")
    assert c.recover(a) == [b"free", 1, b""]
    assert lab.dump()["{=x}:sharers"].content.keys() == {b"b/1s", b"@b"}
    assert not a.holds()
    assert woken(lab) == set(), "b still has it"
    c.recover(b)
    assert woken(lab) == {"c/1"}


def test_lockers_names_those_who_hold_and_those_who_wait(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    assert a.ask("lockers") == [b""]
    since = lab.now
    first = a.lock("1s")[2]
    second = b.lock("1s")[2]
    queue_up(lab, c, "1")
    shared = [b"a/1s", first, since, LEASE - 1, b"main", b"b/1s", second, since, LEASE - 1, b"main"]
    assert c.ask("lockers") == [*shared, b"", b"c/1"]
    a.unlock("1s")
    b.unlock("1s")
    token = c.lock("1", queue=True)[2]
    assert c.ask("lockers") == [b"c/1", token, lab.now, LEASE, b"main", b""]
    lab.advance(LEASE)
    assert c.ask("lockers") == [b""]
