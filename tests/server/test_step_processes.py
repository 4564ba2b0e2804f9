"""beat, resign, alive: who lives in a namespace; hold: what it is responsible for."""

from steps import LEASE, Lab, lab_fixture  # noqa: F401 - the fixture is found by its name

EPOCH = "{*}:processes:epoch"


def epoch(lab: Lab) -> bytes:
    return b"%d" % lab.now


def test_the_first_process_begins_an_epoch(lab: Lab) -> None:
    begun = epoch(lab)
    assert lab.beat("a") == [b"alive", begun, lab.now, -1]
    lab.advance(7)
    assert lab.beat("b") == [b"alive", begun, lab.now, LEASE - 7]
    assert lab.beat("a", epoch=begun) == [b"alive", begun, lab.now, LEASE]
    assert lab.alive() == [b"a", b"b"]
    assert lab.dump()[EPOCH] == (begun, -1)


def test_a_beat_prolongs_a_life(lab: Lab) -> None:
    begun = epoch(lab)
    lab.beat("a")
    lab.advance(LEASE - 1)
    assert lab.beat("a", epoch=begun)[0] == b"alive"
    lab.advance(LEASE - 1)
    assert lab.alive() == [b"a"]
    lab.advance(1)
    assert lab.alive() == []


def test_a_beat_names_the_dead_and_when_the_next_one_dies(lab: Lab) -> None:
    begun = epoch(lab)
    lab.beat("a", 1_000)
    lab.beat("b", 1_001)
    lab.beat("c", 5_000)
    assert lab.beat("c", 5_000, begun)[3] == 1_000
    lab.advance(1_000)
    assert lab.beat("c", 5_000, begun)[3:] == [1, b"a"]
    lab.advance(1)
    assert lab.beat("c", 5_000, begun)[3:] == [-1, b"a", b"b"], "until somebody has buried them"
    assert lab.alive() == [b"c"]


def test_the_dead_stay_dead(lab: Lab) -> None:
    begun = epoch(lab)
    lab.beat("a")
    lab.advance(1)
    lab.beat("b")
    lab.advance(LEASE - 1)
    for _ in range(2):
        assert lab.beat("a", epoch=begun)[0] == b"dead"
        assert lab.beat("b", epoch=begun)[4:] == [b"a"]


def test_one_that_was_buried_is_listed_once_more(lab: Lab) -> None:
    """It may have written to its registry since."""
    begun = epoch(lab)
    lab.beat("a")
    lab.beat("b")
    lab.call("resign", 1, lab.keys.processes, "a")
    assert lab.beat("b", epoch=begun)[4:] == []
    assert lab.beat("a", epoch=begun)[0] == b"dead"
    assert lab.beat("b", epoch=begun)[4:] == [b"a"]
    assert lab.alive() == [b"b"]


def test_an_outage_kills_nobody(lab: Lab) -> None:
    begun = epoch(lab)
    lab.beat("a")
    lab.beat("b")
    lab.client.zadd(lab.keys.processes, {"class:C": 0})
    lab.advance(10 * LEASE)
    assert lab.beat("a", epoch=begun, outage=True)[0] == b"alive"
    assert lab.alive() == [b"a", b"b"], "an heir is not revived"
    assert lab.beat("b", epoch=begun)[0] == b"alive"


def test_an_outage_of_one_is_a_death(lab: Lab) -> None:
    begun = epoch(lab)
    lab.beat("a")
    lab.advance(LEASE)
    lab.beat("b")
    assert lab.beat("a", epoch=begun, outage=True)[0] == b"dead", "others could reach the server"


def test_a_server_without_data_knows_nobody(lab: Lab) -> None:
    begun = epoch(lab)
    lab.beat("a")
    lab.client.delete(lab.keys.processes, lab.keys.processes + b":epoch")
    lab.advance(5)
    assert lab.beat("a", epoch=begun)[:2] == [b"forgotten", epoch(lab)]
    assert lab.alive() == [b"a"], "it is registered again"
    assert lab.beat("a", epoch=epoch(lab))[0] == b"alive"


def test_a_hundred_dead_are_named_at_a_time(lab: Lab) -> None:
    for n in range(130):
        lab.beat(f"p{n:03}", 1_000 + n)
    lab.advance(2_000)
    _, _, _, _, *dead = lab.beat("a")
    assert dead == [b"p%03d" % n for n in range(100)], "those that died first"


def test_hold_enters_a_resource_into_a_registry_and_keeps_the_beginning(lab: Lab) -> None:
    a = lab.process("a")
    since = lab.now
    assert lab.call("hold", 1, a.registry, a.base, a.id) == 1
    lab.advance(500)
    assert lab.call("hold", 1, a.registry, a.base, a.id) == 0
    assert lab.dump() == {"{@a}:holds": ({a.base: since}, -1)}


def test_the_last_one_takes_the_epoch_along(lab: Lab) -> None:
    lab.beat("a")
    lab.beat("b")
    dump = lab.dump()
    assert dump.keys() == {"{*}:processes", EPOCH}
    assert dump["{*}:processes"] == ({b"a": lab.now + LEASE, b"b": lab.now + LEASE}, -1)
    assert lab.call("resign", 1, lab.keys.processes, "a") == 1
    assert lab.dump().keys() == {"{*}:processes", EPOCH}
    assert lab.call("resign", 1, lab.keys.processes, "b") == 1
    assert lab.dump() == {}
    assert lab.call("resign", 1, lab.keys.processes, "b") == 0


def test_an_heir_is_removed_by_the_mark_of_its_last_announcement_only(lab: Lab) -> None:
    marks = [lab.call("announce", 1, lab.keys.processes, "class:C") for _ in range(3)]
    assert len(set(marks)) == 3
    assert lab.call("beat", 1, lab.keys.processes, "a", 100, "", "")[4:] == [b"class:C"]
    assert lab.call("resign", 1, lab.keys.processes, "class:C", marks[1]) == 0
    assert lab.call("resign", 1, lab.keys.processes, "class:C", marks[2]) == 1
    assert lab.call("resign", 1, lab.keys.processes, "class:C", marks[2]) == 0
    assert lab.client.zrange(lab.keys.processes, 0, -1) == [b"a"]
