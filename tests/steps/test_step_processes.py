"""List, beat, expire, unlist: who lives, and who is told of the dead."""

from typing import Any

import pytest

from steps.lab import Lab, lab_fixture  # noqa: F401 - found by its name

TTL = 1000


class Life:
    def __init__(self, lab: Lab, name: str, partitions: int = 16, *, insist: bool = False) -> None:
        self.lab, self.name = lab, name
        lab.advance(1)
        self.epoch, self.listing, self.partitions = lab.whole(
            "list", name, TTL, partitions, f"card of {name}", int(insist)
        )

    def beat(
        self,
        *,
        marks: bool = True,
        executes: int = 1,
        hand_out_ms: int = 0,
        since_ms: int = 10**7,  # longer than any of the lab's pauses: no clock was set
    ) -> list[Any]:
        words = (self.name, TTL, self.epoch, self.listing, int(marks), executes, hand_out_ms)
        return list(self.lab.whole("beat", *words, "", since_ms * 1000))


def processes(lab: Lab) -> dict[bytes, float]:
    found: dict[bytes, float] = lab.dump(lab.partitions.prefix).get("processes", {})
    return found


def test_a_listing_answers_epoch_number_and_partitions(lab: Lab) -> None:
    a = Life(lab, "a")
    b = Life(lab, "b", 32)
    assert a.epoch == b.epoch != b""
    assert a.listing != b.listing
    assert (a.partitions, b.partitions) == (16, 16)
    assert Life(lab, "c", 32, insist=True).partitions == 32
    assert set(lab.whole("processes")) == {b"a", b"b", b"c"}
    assert lab.whole("cards", "a", "z") == [b"card of a", b""]


def test_a_duplicate_of_the_listing_changes_nothing(lab: Lab) -> None:
    a = Life(lab, "a")
    before = lab.dump(lab.partitions.prefix)
    again = Life(lab, "a")
    assert (again.epoch, again.listing) == (a.epoch, a.listing)
    assert lab.dump(lab.partitions.prefix) == before


def test_a_beat_makes_the_lease_longer(lab: Lab) -> None:
    a, b = Life(lab, "a"), Life(lab, "b")
    lab.advance(600)
    assert a.beat() == [b"alive", 400, 2]
    assert processes(lab)[b"a"] == lab.now + TTL * 1000
    lab.advance(300)
    assert b.beat()[:2] == [b"alive", 700]


def test_alone_there_is_no_next_deadline(lab: Lab) -> None:
    assert Life(lab, "a").beat() == [b"alive", -1, 1]


def test_dead_is_one_that_was_marked_by_anothers_beat(lab: Lab) -> None:
    a, b = Life(lab, "a"), Life(lab, "b")
    lab.advance(700)
    a.beat()
    lab.advance(700)
    assert processes(lab)[b"b"] > 0, "overdue is not dead"
    assert a.beat() == [b"alive", -1, 1, b"b"]
    assert b.beat() == [b"dead"]
    assert a.beat() == [b"alive", -1, 1, b"b"]


def test_one_that_is_overdue_and_unmarked_lives_on(lab: Lab) -> None:
    a, b = Life(lab, "a"), Life(lab, "b")
    lab.advance(700)
    a.beat()
    lab.advance(700)
    assert b.beat()[0] == b"alive"
    assert a.beat()[3:] == []


def test_one_that_is_overdue_itself_marks_nobody_and_gives_time(lab: Lab) -> None:
    a, b, c = (Life(lab, name) for name in "abc")
    lab.advance(3_600_000)
    assert a.beat() == [b"alive", TTL, 3]
    assert processes(lab)[b"b"] == processes(lab)[b"c"] == lab.now + TTL * 1000
    assert b.beat()[3:] == c.beat()[3:] == []


@pytest.mark.parametrize("jump_ms", [200, 700, 5_000])
def test_deadlines_move_with_a_clock_that_is_set_forward(lab: Lab, jump_ms: int) -> None:
    b = Life(lab, "b")
    lab.advance(400)
    a = Life(lab, "a")
    lab.advance(500)
    before = processes(lab)[b"b"]
    lab.advance(jump_ms)
    assert a.beat(since_ms=500)[3:] == []
    assert processes(lab)[b"b"] in (before + jump_ms * 1000, lab.now + TTL * 1000)
    assert a.beat(since_ms=0)[3:] == []
    after = processes(lab)
    assert b.beat(since_ms=900)[0] == b"alive"
    assert processes(lab)[b"a"] == after[b"a"], "it is noticed once"


def test_a_beat_that_is_a_little_late_moves_nothing(lab: Lab) -> None:
    Life(lab, "b")
    a = Life(lab, "a")
    before = processes(lab)[b"b"]
    lab.advance(100)
    a.beat(since_ms=0)
    assert processes(lab)[b"b"] == before


def test_a_newcomer_marks_nobody(lab: Lab) -> None:
    Life(lab, "b")
    lab.advance(2000)
    a = Life(lab, "a")
    assert a.beat(marks=False)[3:] == []
    assert processes(lab)[b"b"] > 0
    assert a.beat(marks=True)[3:] == [b"b"]


def test_a_late_duplicate_of_the_listing_revives_nobody(lab: Lab) -> None:
    a = Life(lab, "a")
    Life(lab, "b")  # keeps the epoch
    lab.whole("expire", "a")
    Life(lab, "a")
    assert a.beat() == [b"dead"]
    lab.whole("unlist", "a")
    Life(lab, "a")
    assert a.beat() == [b"forgotten"]


def test_expire_marks_only_those_that_are_listed(lab: Lab) -> None:
    lab.whole("expire", "nobody")
    assert processes(lab) == {}


@pytest.mark.parametrize("what", ["processes", "epoch", "listings"])
def test_a_server_without_data_has_forgotten(lab: Lab, what: str) -> None:
    a = Life(lab, "a")
    lab.client.delete(lab.partitions.prefix + what.encode())
    assert a.beat() == [b"forgotten"]


def test_another_epoch_is_noticed(lab: Lab) -> None:
    a = Life(lab, "a")
    lab.client.set(lab.partitions.prefix + b"epoch", 1)
    assert a.beat() == [b"forgotten"]


def test_the_dead_are_handed_out_for_some_time(lab: Lab) -> None:
    lives = [Life(lab, f"d{i:02}") for i in range(20)]
    a, b = Life(lab, "a"), Life(lab, "b")
    for life in lives:
        lab.whole("expire", life.name)
    first = a.beat(hand_out_ms=500)[3:]
    second = b.beat(hand_out_ms=500)[3:]
    assert (len(first), len(second)) == (16, 4)
    assert not set(first) & set(second)
    assert a.beat(hand_out_ms=500)[3:] == []
    assert len(a.beat(executes=0, hand_out_ms=500)[3:]) == 16, "those that only reap have their own"
    lab.advance(501)
    assert len(b.beat(hand_out_ms=500)[3:]) == 16


def test_the_last_one_takes_all_along(lab: Lab) -> None:
    a, b = Life(lab, "a"), Life(lab, "b")
    lab.whole("expire", "b")
    a.beat(hand_out_ms=1)
    assert lab.whole("unlist", "b") == 1
    assert lab.whole("unlist", "b") == 0
    assert set(lab.dump(lab.partitions.prefix)) == {
        *("processes", "listings", "cards", "epoch", "partitions"),
    }
    lab.whole("unlist", "a")
    assert set(lab.dump(lab.partitions.prefix)) == {"partitions"}
    assert Life(lab, "b").epoch != b.epoch


def test_no_process_is_lost_without_a_lane_that_a_survey_names(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert set(lab.ask("survey")) == {b"a", b"b"}
    a.reap(b)
    assert lab.ask("survey") == [b"a"]
