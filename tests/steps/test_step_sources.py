"""Sources: claims, positions, ids; each with its data in one operation."""

from itertools import combinations
from typing import Any

import msgpack
import pytest

from phonon._protocol.answers import Reply
from steps.lab import Lab, Proc, lab_fixture  # noqa: F401 - found by its name
from support import operations as ops

S = b"orders/1"
HOUR = 3_600_000


def claim(process: Proc, epoch: int = 0, position: bytes = b"") -> Any:
    return process.do(ops.claim(0, S, epoch, position))


def ingest(process: Proc, epoch: int, first: bytes, upto: bytes, *items: bytes) -> Any:
    return process.do(ops.ingest(0, S, epoch, (first, upto), list(items)))


def ingest_new(process: Proc, ids: list[bytes], *items: bytes, window: int = HOUR) -> Any:
    return process.do(ops.ingest_new(0, b"queue", window, ids, list(items)))


def partials(lab: Lab, resource: str = "x") -> list[bytes]:
    found: list[bytes] = lab.dump().get(f"partials:{resource}", [])
    return found


def source(lab: Lab) -> list[Any]:
    found: list[Any] = lab.ask("source", S)
    return found


def test_each_claim_has_a_greater_epoch(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    code, first, position = claim(a)
    assert (code, position) == (Reply.CLAIMED, b"")
    _, second, _ = claim(b)
    lab.set_clock(lab.now - 10_000_000)  # a clock that is set back
    lab.client.delete(lab.key("token"))
    _, third, _ = claim(a)
    assert first < second < third
    assert source(lab) == [b"%d" % third, None]


def test_a_claim_is_told_its_number_by_another_partition(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert claim(a, 5, b"7") == [Reply.CLAIMED, 5, b"7"]
    assert claim(b, 4) == [Reply.REFUSED, 5, b"7"]
    assert claim(a, 5) == [Reply.CLAIMED, 5, b"7"]
    assert claim(b, 6) == [Reply.CLAIMED, 6, b"7"]
    assert claim(b, 6, b"3") == [Reply.CLAIMED, 6, b"3"]


def test_data_and_position_come_together(lab: Lab) -> None:
    a = lab.process("a")
    _, epoch, _ = claim(a)
    assert ingest(a, epoch, b"", b"5", b"x", b"1", b"y", b"2") == Reply.INGESTED
    assert (partials(lab), partials(lab, "y")) == ([b"1"], [b"2"])
    assert source(lab) == [b"%d" % epoch, b"5"]
    assert lab.dump()["members:x"] == {b"a": b"1"}
    assert set(lab.registry("a")) == {b"x", b"y"}
    answer = a.leave()
    assert answer[0] == Reply.RUN


def test_only_the_next_of_a_chain_is_stored(lab: Lab) -> None:
    a = lab.process("a")
    _, epoch, _ = claim(a)
    before = lab.data()
    assert ingest(a, epoch, b"3", b"5", b"x", b"1") == [Reply.REFUSED, epoch, b""]
    assert lab.data() == before
    assert ingest(a, epoch, b"", b"5", b"x", b"1") == Reply.INGESTED
    before = lab.data()
    for first in (b"", b"4", b"6"):
        assert ingest(a, epoch, first, b"8", b"x", b"2") == [Reply.REFUSED, epoch, b"5"]
    assert lab.data() == before
    assert ingest(a, epoch, b"5", b"8") == Reply.INGESTED
    assert source(lab)[1] == b"8"


def test_a_lost_claim_stores_nothing(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert ingest(a, 5, b"", b"1", b"x", b"1") == [Reply.REFUSED, 0, b""]
    _, old, _ = claim(a)
    _, new, _ = claim(b)
    before = lab.data()
    assert ingest(a, old, b"", b"1", b"x", b"1") == [Reply.REFUSED, new, b""]
    assert ingest(a, new + 1, b"", b"1", b"x", b"1") == [Reply.REFUSED, new, b""]
    assert lab.data() == before
    assert ingest(b, new, b"", b"1", b"x", b"1") == Reply.INGESTED


def test_a_repeat_of_a_call_stores_nothing_again(lab: Lab) -> None:
    a = lab.process("a")
    _, epoch, _ = claim(a)
    ingest(a, epoch, b"", b"5", b"x", b"1")
    ingest_new(a, [b"i"], b"x", b"2")
    before = lab.dump()
    assert a.again() == [Reply.INGESTED]
    assert lab.dump() == before


def test_a_source_is_forgotten_by_its_latest_reader(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    _, old, _ = claim(a, position=b"3")
    _, new, _ = claim(b)
    assert a.do(ops.drop_source(0, S, old)) == [Reply.REFUSED, new, b"3"]
    assert b.do(ops.drop_source(0, S, new)) == [Reply.CLAIMED, new, b""]
    assert source(lab) == [None, None]
    assert lab.data() == {}


@pytest.mark.parametrize("kind", ["source", "ids"])
def test_many_partials_ask_to_be_merged(lab: Lab, kind: str) -> None:
    a = lab.process("a")
    _, epoch, _ = claim(a)
    for n in range(63):
        a.append(b"%d" % n)
    items = [b"y", b"1", b"x", b"2"]
    if kind == "source":
        answer = ingest(a, epoch, b"", b"1", *items)
    else:
        answer = ingest_new(a, [b"i"], *items)
    assert answer == [Reply.INGESTED, [1, 64], []]


@pytest.mark.parametrize("kind", ["partials", "members"])
def test_what_a_foreign_key_does_not_take_is_parked(lab: Lab, kind: str) -> None:
    a = lab.process("a")
    _, epoch, _ = claim(a)
    lab.client.set(lab.key(f"{kind}:x"), "foreign")
    answer = ingest(a, epoch, b"", b"5", b"w", b"0", b"x", b"1", b"y", b"2")
    assert answer[:2] == [Reply.INGESTED, []]
    place, error = answer[2]
    assert (place, b"holds a string" in error) == (1, True)
    dump = lab.dump()
    assert (dump["partials:w"], dump["partials:y"]) == ([b"0"], [b"2"])
    assert (kind == "partials") == ("partials:x" in dump)
    assert source(lab)[1] == b"5"
    lab.client.delete(lab.key(f"{kind}:x"))
    ((token, entry),) = dump["parked:x"].items()
    assert msgpack.unpackb(entry)["error"].startswith("WRONGTYPE")
    answer = a.replay(int(token))
    assert (answer[0], answer[-1]) == (Reply.RUN, [b"1"])


def test_foreign_books_store_nothing(lab: Lab) -> None:
    a = lab.process("a")
    lab.client.set(lab.key(b"source:" + S), "foreign")
    for answer in (
        claim(a),
        ingest(a, 1, b"", b"1", b"x", b"1"),
        a.do(ops.drop_source(0, S, 1)),
    ):
        assert b"holds a string where Phonon keeps a hash" in answer[1]
    assert partials(lab) == []


def test_an_id_is_stored_once(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    assert ingest_new(a, [b"1", b"2"], b"x", b"p") == Reply.INGESTED
    before = lab.data()
    assert ingest_new(b, [b"2", b"3", b"1"], b"x", b"q", b"y", b"r") == [
        Reply.SEEN,
        [b"2", b"1"],
    ]
    assert lab.data() == before
    assert ingest_new(b, [b"3"], b"x", b"q", b"y", b"r") == Reply.INGESTED
    assert (partials(lab), partials(lab, "y")) == ([b"p", b"q"], [b"r"])
    assert b.do(ops.ingest_new(0, b"other", HOUR, [b"3"], [b"x", b"s"])) == Reply.INGESTED


def test_more_ids_than_lua_unpacks(lab: Lab) -> None:
    a = lab.process("a")
    ids = [b"%d" % n for n in range(9000)]
    assert ingest_new(a, ids, b"x", b"p") == Reply.INGESTED
    fresh = [b"new %d" % n for n in range(5000)]
    seen = [Reply.SEEN, [b"8999", b"0"]]
    assert ingest_new(a, [ids[8999], *fresh, ids[0]], b"x", b"p") == seen


@pytest.mark.parametrize("at", [0, 1, 499, 500, 999])
def test_ids_are_known_for_the_whole_window_and_then_forgotten(lab: Lab, at: int) -> None:
    a = lab.process("a")
    lab.set_clock(1_700_000_000_000_000 + at * 1000)
    assert ingest_new(a, [b"i"], b"x", b"p", window=1000) == Reply.INGESTED
    lab.advance(999)
    assert ingest_new(a, [b"i"], b"x", b"p", window=1000) == [Reply.SEEN, [b"i"]]
    lab.advance(502)
    assert ingest_new(a, [b"i"], b"x", b"p", window=1000) == Reply.INGESTED
    times = [ttl for name, (_, ttl) in lab.dump_with_ttl().items() if name.startswith("ids:")]
    assert times
    assert all(1500 < ttl <= 2000 for ttl in times)


def test_a_clock_that_is_set_back_forgets_no_id(lab: Lab) -> None:
    a = lab.process("a")
    lab.set_clock(1_700_000_000_000_000)
    assert ingest_new(a, [b"i"], b"x", b"p") == Reply.INGESTED
    lab.set_clock(1_700_000_000_000_000 - HOUR * 1000 // 2)
    assert ingest_new(a, [b"i"], b"x", b"p") == [Reply.SEEN, [b"i"]]


def test_a_crash_between_any_two_calls_of_a_batch(lab: Lab) -> None:
    """The readers of one source make four calls each; the dead reader's calls end anywhere."""
    offsets = (b"", b"10", b"20")
    for number, (dead, late) in enumerate(combinations(range(4), 2)):
        name = b"s%d" % number
        x, y = b"x%d" % number, b"y%d" % number
        a, b = lab.process(f"a{number}"), lab.process(f"b{number}")
        _, epoch, _ = a.do(ops.claim(0, name))
        calls = [
            ops.ingest(0, name, epoch, (offsets[0], offsets[1]), [x, b"0-9"]),
            ops.ingest(0, name, epoch, (offsets[1], offsets[2]), [x, b"10-19", y, b"10-19"]),
        ]
        for operation in calls[:dead]:
            a.do(operation)
        _, anew, position = b.do(ops.claim(0, name))
        for operation in calls[dead:late]:  # a zombie, or a copy that the network kept
            assert a.do(operation)[0] == Reply.REFUSED
        for at in range(offsets.index(position), 2):
            items = [x, b"0-9"] if at == 0 else [x, b"10-19", y, b"10-19"]
            upto = offsets[at + 1]
            assert b.do(ops.ingest(0, name, anew, (offsets[at], upto), items)) == Reply.INGESTED
        assert partials(lab, x.decode()) == [b"0-9", b"10-19"]
        assert partials(lab, y.decode()) == [b"10-19"]
