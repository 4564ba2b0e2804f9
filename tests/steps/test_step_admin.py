"""Operators' functions: pages that miss no entry, and acts that are one step with their log."""

from typing import Any

from phonon._protocol.answers import Reply
from steps.lab import Lab, Proc, lab_fixture, refused  # noqa: F401 - found by its name

BATCH_SCORE = 2**50


def pages(lab: Lab, function: str, process: bytes, most: int, *words: Any) -> list[list[Any]]:
    """All entries of one process, read in pages."""
    score, member, found = b"", b"", []
    for _ in range(1000):
        score, member, rows = lab.ask(function, process, score, member, most, b"", *words)
        found += rows
        if score == b"":
            return found
    raise AssertionError("a walk without end")


def sessions(lab: Lab, process: Proc, most: int = 2, before: Any = b"") -> dict[bytes, list[Any]]:
    rows = pages(lab, "admin_sessions", process.id, most, before)
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == len(rows), "one is listed twice"
    return found


def acts(lab: Lab) -> list[dict[bytes, bytes]]:
    rows = lab.ask("admin_acts", 100)
    return [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in rows]


def parked(lab: Lab, a: Proc, *partials: bytes) -> int:
    token = a.batch(*partials)
    assert a.fail(token, most=1) == Reply.PARKED
    return token


def test_all_sessions_are_listed_once_however_small_the_pages(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    names = [b"r%d" % i for i in range(9)]
    for name in names:
        a.append(b"1", name)
        lab.advance(5)
    for name in names[3:6]:
        b.append(b"22", name)
    assert sessions(lab, a).keys() | sessions(lab, b).keys() == set(names)
    assert not sessions(lab, a).keys() & sessions(lab, b).keys()
    for most in (1, 3, 100):
        assert len(sessions(lab, a, most)) == 9
    since, members, modifications, partials, size, many = sessions(lab, a)[b"r4"]
    assert (members, modifications, partials, many) == (2, 2, 2, 0)
    assert since == 1_700_000_000_000 + 20
    assert size > 0


def test_entries_of_one_millisecond_are_told_apart(lab: Lab) -> None:
    a = lab.process("a")
    names = [b"same-%d" % i for i in range(40)] + [b"\xff\xfe", b"Z", b"a", "\u00e9".encode()]
    lab.client.zadd(lab.key("registry:a"), dict.fromkeys(names, 7))
    for name in names:
        lab.client.hset(lab.key(b"members:" + name), "a", "1")
    for most in (1, 7, 100):
        assert sessions(lab, a, most).keys() == set(names)


def test_what_ends_between_two_pages_hides_nothing(lab: Lab) -> None:
    a = lab.process("a")
    names = [b"r%d" % i for i in range(6)]
    for name in names:
        a.append(b"1", name)
        lab.advance(5)
    score, member, rows = lab.ask("admin_sessions", b"a", b"", b"", 3, b"", b"")
    assert [row[0] for row in rows] == names[:3]
    for name in names[:3]:
        a.leave(resource=name)
    _, _, rows = lab.ask("admin_sessions", b"a", score, member, 100, b"", b"")
    assert {row[0] for row in rows} >= set(names[3:])


def test_old_sessions_are_told_from_young_ones(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1", b"old")
    lab.advance(1000)
    a.append(b"1", b"young")
    assert sessions(lab, a, before=lab.now_ms - 500).keys() == {b"old"}


def test_sessions_of_one_that_also_has_a_lock_or_a_batch_are_listed(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1")
    a.lock()
    a.append(b"1", b"y")
    token = a.batch(b"2", resource=b"z")
    a.append(b"3", b"z")
    assert sessions(lab, a).keys() == {b"x", b"y", b"z"}
    (row,) = pages(lab, "admin_locks", b"a", 10)
    assert (row[0], row[1][0], row[2], row[4]) == (b"x", b"a/1", 1, 0)
    (batch,) = pages(lab, "admin_batches", b"a", 10)
    assert batch[:2] == [b"z", b"%d" % token]


def test_a_foreign_key_hides_nothing_else(lab: Lab) -> None:
    a = lab.process("a")
    for name in (b"x", b"y"):
        a.append(b"1", name)
    lab.client.delete(lab.key("members:x"))
    lab.client.set(lab.key("members:x"), "somebody else's")
    assert sessions(lab, a).keys() == {b"y"}


def test_a_lock_is_listed_once_with_those_that_wait(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = b.lock()[1]
    assert a.lock(queue=True)[0] == Reply.WAIT
    assert pages(lab, "admin_locks", b"a", 10) == []
    (row,) = pages(lab, "admin_locks", b"b", 10)
    name, holders, holding, waiters, waiting, many = row
    assert (name, holders[:2], holding, waiters) == (b"x", [b"b/1", token], 1, [b"a/1"])
    assert (waiting, many) == (1, 0)


def test_batches_of_a_class_queue_are_listed(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch(b"1")
    a.hand_off(token)
    assert lab.ask("admin_owners") == [[b"a"], [b"class:C"]]
    (row,) = pages(lab, "admin_batches", b"class:C", 10)
    assert row[:2] == [b"x", b"%d" % token]
    assert pages(lab, "admin_batches", b"a", 10) == []


def test_dead_letters_are_listed(lab: Lab) -> None:
    a = lab.process("a")
    first, second = parked(lab, a, b"1", b"2"), parked(lab, a, b"3")
    cursor, found = lab.ask("admin_parked", 0, b"")
    assert cursor == b"0"
    name, entries, more = found
    assert (name, more) == (b"x", b"0")
    assert dict(zip(entries[::4], entries[2::4], strict=True)) == {
        b"%d" % first: 2,
        b"%d" % second: 1,
    }
    assert lab.ask("admin_parked", 0, b"y") == [b"0", []]


def test_many_dead_letters_of_one_resource_are_read_by_themselves(lab: Lab) -> None:
    a = lab.process("a")
    tokens = {parked(lab, a, b"1") for _ in range(70)}
    _, found = lab.ask("admin_parked", 0, b"")
    assert found == [b"x", [], b"more"]
    cursor, entries = lab.ask("admin_letters", b"x", 0)
    assert cursor == b"0"
    assert {int(token) for token in entries[::4]} == tokens


def test_a_replay_waits_for_a_process_that_knows_the_class(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = parked(lab, a, b"1", b"2")
    lab.client.set(lab.key("token"), token + 10**9)  # the clock was set back since
    answer, new = lab.ask("admin_replay", b"x", token, b"class:C", "me")
    assert answer == b"replayed"
    assert int(new) > token
    assert lab.data()["handed"] == {b"class:C"}
    assert lab.data()["registry:class:C"].keys() == {b"x"}
    assert not {"parked", "parked:x"} & lab.data().keys()
    assert b.reap(b"class:C")[3][:2] == [b"x", int(new)]
    assert b.resume(int(new))[-1] == [b"1", b"2"]
    assert b.complete(int(new)) == Reply.DONE
    later = b.batch(b"3")
    assert later > int(new), "tokens go on"
    (act,) = acts(lab)
    assert (act[b"who"], act[b"act"], act[b"resource"]) == (b"me", b"replay", b"x")
    assert (act[b"token"], act[b"detail"]) == (b"%d" % token, new)


def test_a_replay_does_not_disturb_what_runs(lab: Lab) -> None:
    a = lab.process("a")
    token = parked(lab, a, b"1")
    a.batch(b"2")
    before = lab.data()
    assert lab.ask("admin_replay", b"x", token, b"class:C", "me") == [b"running"]
    assert lab.ask("admin_replay", b"x", token + 1, b"class:C", "me") == [b"missing"]
    assert lab.data() == before


def test_a_discard_leaves_nothing_but_its_record(lab: Lab) -> None:
    a = lab.process("a")
    first, second = parked(lab, a, b"1"), parked(lab, a, b"2", b"3")
    assert lab.ask("admin_discard", b"x", first, "me") == [b"discarded", 1]
    assert lab.ask("admin_discard", b"x", first, "me") == [b"missing"]
    assert lab.data()["parked"] == {b"x"}
    assert lab.ask("admin_discard", b"x", second, "me") == [b"discarded", 2]
    assert lab.data().keys() <= {"acts", "lanes"}
    assert [act[b"act"] for act in acts(lab)] == [b"discard", b"discard"]


def test_a_lock_is_broken_under_its_token_only(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.lock()[1]
    b.lock(queue=True)
    before = lab.data()
    assert lab.ask("admin_unlock", b"x", token + 1, "me") == [b"missing"]
    assert lab.data() == before
    assert lab.ask("admin_unlock", b"x", token, "me") == [b"broken", b"a/1"]
    assert b.mail() == [b"b/1"], "the next one is woken"
    assert lab.registry("a") == {}, "its holder is responsible for it no more"
    assert b.lock()[0] == Reply.GRANTED
    assert a.unlock() == Reply.NOT_HELD
    assert [act[b"act"] for act in acts(lab)] == [b"unlock"]


def test_a_share_of_a_lock_is_broken_alone(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    tokens = [process.lock("1s")[1] for process in (a, b)]
    a.append(b"1")
    assert lab.ask("admin_unlock", b"x", tokens[0], "me") == [b"broken", b"a/1s"]
    assert lab.data()["lock:x"].keys() == {b"b/1s"}
    assert lab.registry("a").keys() == {b"x"}, "it is a member still"


def test_an_expired_process_is_marked_and_recorded(lab: Lab) -> None:
    lab.whole("list", "a", 1000, 4, "card", 0)
    assert lab.whole("admin_expire", "b", "me") == b"missing"
    assert lab.whole("admin_expire", "a", "me") == b"expired"
    assert lab.whole("admin_expire", "a", "me") == b"dead"
    assert lab.client.zscore(lab.partitions.prefix + b"processes", "a") == 0
    assert len(lab.whole("admin_acts", 10)) == 1


def test_an_act_that_cannot_be_recorded_is_not_done(lab: Lab) -> None:
    a = lab.process("a")
    token = parked(lab, a, b"1")
    held = a.lock()[1]
    lab.client.set(lab.key("acts"), "somebody else's")
    before = lab.data()
    for function, words in {
        "admin_replay": (b"x", token, b"class:C", "me"),
        "admin_discard": (b"x", token, "me"),
        "admin_unlock": (b"x", held, "me"),
    }.items():
        with refused("WRONGTYPE"):
            lab.ask(function, *words)
    assert lab.data() == before


def test_the_record_is_bounded(lab: Lab) -> None:
    a = lab.process("a")
    lab.client.xadd(lab.key("acts"), {"who": "x", "act": "unlock"}, maxlen=3000)
    with lab.client.pipeline() as pipeline:
        for _ in range(2999):
            pipeline.xadd(lab.key("acts"), {"who": "x", "act": "unlock"})
        pipeline.execute()
    token = parked(lab, a, b"1")
    lab.ask("admin_discard", b"x", token, "me")
    assert lab.client.xlen(lab.key("acts")) < 1200


def test_a_report_goes_with_its_process(lab: Lab) -> None:
    epoch, listing, _ = lab.whole("list", "a", 1000, 4, "card", 0)
    lab.whole("beat", "a", 1000, epoch, listing, 1, 1, 0, "busy", 10**9)
    _, partitions, cursor, rows = lab.whole("admin_roster", 0)
    assert (partitions, cursor) == (b"4", b"0")
    assert rows[0] == b"a"
    assert rows[2:] == [b"card", b"busy"]
    lab.whole("unlist", "a")
    assert lab.whole("admin_roster", 0)[3] == []
    assert not lab.client.exists(lab.partitions.prefix + b"reports")


def test_what_a_process_holds_is_counted(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"1", b"m1")
    lab.advance(10)
    a.append(b"1", b"m2")
    a.lock()
    a.batch(b"2", resource=b"z")
    locks, members, batches, left, oldest, batch, calls, fenced = lab.ask("admin_holdings", "a")
    assert (locks, members, batches, left, fenced) == (1, 2, 1, 0, 0)
    assert (oldest, batch) == (1_700_000_000_000, lab.now_ms)
    assert calls == len(a.sent)
