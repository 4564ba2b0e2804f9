"""beat, alive: who lives in a namespace; hold: what it is responsible for."""

from steps import LEASE, Lab, lab_fixture  # noqa: F401 - the fixture is found by its name


def test_a_new_process_was_not_known(lab: Lab) -> None:
    assert lab.beat("a") == [0, lab.now]
    assert lab.beat("a") == [1, lab.now]
    assert lab.alive() == [b"a"]


def test_a_beat_prolongs_a_life(lab: Lab) -> None:
    lab.beat("a")
    lab.advance(LEASE - 1)
    assert lab.beat("a") == [1, lab.now]
    lab.advance(LEASE - 1)
    assert lab.alive() == [b"a"]
    lab.advance(1)
    assert lab.alive() == []


def test_a_beat_names_the_dead(lab: Lab) -> None:
    lab.beat("a", 1_000)
    lab.beat("b", 1_001)
    lab.beat("c", 5_000)
    lab.advance(1_000)
    assert lab.beat("c") == [1, lab.now, b"a"]
    lab.advance(1)
    assert lab.beat("c") == [1, lab.now, b"a", b"b"], "until somebody has taken them over"
    assert lab.alive() == [b"c"]


def test_a_zombie_learns_that_it_was_declared_dead(lab: Lab) -> None:
    lab.beat("a")
    lab.advance(LEASE)
    assert lab.beat("a") == [0, lab.now]


def test_a_hundred_dead_are_named_at_a_time(lab: Lab) -> None:
    for n in range(130):
        lab.beat(f"p{n:03}", 1_000 + n)
    lab.advance(2_000)
    _, _, *dead = lab.beat("a")
    assert dead == [b"p%03d" % n for n in range(100)], "those that died first"


def test_hold_enters_a_resource_into_a_registry_and_keeps_the_beginning(lab: Lab) -> None:
    a = lab.process("a")
    since = lab.now
    assert lab.call("hold", 1, a.registry, a.base) == 1
    lab.advance(500)
    assert lab.call("hold", 1, a.registry, a.base) == 0
    assert lab.dump() == {"{@a}:holds": ({a.base: b"%d" % since}, -1)}


def test_the_deadlines_are_all_that_is_kept(lab: Lab) -> None:
    lab.beat("a")
    dump = lab.dump()
    assert dump.keys() == {"{*}:processes"}
    assert dump["{*}:processes"] == ({b"a": lab.now + LEASE}, -1)
