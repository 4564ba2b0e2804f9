"""append, complete, fail, resume, fetch: from a stored partial to an executed or parked batch."""

import msgpack
import pytest
from steps import Lab, lab_fixture  # noqa: F401 - the fixture is found by its name


def test_append_stores_and_joins(lab: Lab) -> None:
    a = lab.process("a")
    assert a.append(b"1") == [b"stored", 0]
    assert a.append(b"2") == [b"stored", 0]
    assert a.count() == 1
    assert a.ask("modified") == [b"a", 2]
    assert lab.dump()["{=x}:partials"].content == [b"1", b"2"]


def test_a_batch_stays_until_it_is_completed(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch(b"1")
    assert lab.dump()["{=x}:batch"].content == [b"1"]
    assert lab.dump()["{=x}:running"].content == {
        b"owner": b"a",
        b"token": b"%d" % token,
        b"attempt": b"0",
        b"since": b"%d" % lab.now,
    }
    assert a.complete(token) == [b"done", 1]
    assert not {"{=x}:batch", "{=x}:running"} & lab.dump().keys()


def test_a_batch_cannot_be_completed_twice(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch()
    a.complete(token)
    assert a.complete(token) == [b"lost", 1]


def test_only_the_owner_completes_and_only_with_its_token(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch()
    before = lab.dump()
    assert b.complete(token) == [b"lost", 1]
    assert b.fail(token) == [b"lost", 1]
    assert b.resume(token) == [b"lost", 1]
    assert b.fetch(token, 0, 9) == []
    for wrong in (token - 1, token + 1, 0):
        assert a.complete(wrong) == [b"lost", 0], "it owns a batch, but not this one"
        assert a.fail(wrong) == [b"lost", 0]
        assert a.resume(wrong) == [b"lost", 0]
        assert a.fetch(wrong, 0, 9) == []
    after = lab.dump()
    for name in ("{=x}:running", "{=x}:batch"):
        assert after[name] == before[name]


def test_a_session_that_ends_while_a_batch_runs_is_deferred_to_its_owner(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    b.append(b"2")
    assert b.leave(b"3") == [b"deferred", 1, 0, 0, 1, [b"b", 2]]
    kind, clear, again, attempt, count, partials = a.complete(token)
    assert (kind, clear, attempt, count, partials) == (b"again", 0, 0, 2, [b"2", b"3"])
    assert again > token
    assert a.complete(again) == [b"done", 1]


def test_several_sessions_that_end_while_a_batch_runs_become_one_batch(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch()
    b.leave(b"1")
    b.leave(b"2")
    b.leave()
    assert a.complete(token)[4:] == [2, [b"1", b"2"]]


def test_the_executor_may_be_a_member_and_leave_while_its_batch_runs(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch(b"1")
    a.append(b"2")
    assert a.leave() == [b"deferred", 0, 0, 0, 1, [b"a", 1]]
    assert a.complete(token)[5] == [b"2"]


def test_newcomers_belong_to_the_next_session(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    b.append(b"2")
    assert a.complete(token) == [b"done", 1], "the session of the newcomer goes on"
    assert b.count() == 1
    assert lab.dump()["{=x}:partials"].content == [b"2"]
    assert b.leave()[8] == [b"2"]


def test_newcomers_behind_a_deferred_session_stay_where_they_are(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch(b"1")
    b.leave(b"2")
    c.append(b"3")
    c.append(b"4")
    assert a.complete(token)[4:] == [1, [b"2"]], "the session that has ended, and no more"
    assert lab.dump()["{=x}:partials"].content == [b"3", b"4"]
    assert c.count() == 1
    assert c.leave() == [b"deferred", 1, 0, 0, 1, [b"c", 2]]


def test_a_member_without_data_survives_a_completion(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch()
    b.join()
    b.modify()
    a.complete(token)
    assert b.count() == 1
    assert b.leave() == [b"last", 1, 0, 0, 1, [b"b", 1]]


def test_a_failed_batch_is_kept_for_a_retry(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch(b"1")
    assert a.fail(token, error="boom", delay=700) == [b"retry", 0, token, 1]
    running = lab.dump()["{=x}:running"].content
    assert (running[b"attempt"], running[b"error"]) == (b"1", b"boom")
    assert int(running[b"retry_at"]) == lab.now + 700
    assert a.holds()
    assert a.resume(token) == [b"run", 0, token, 1, 1, [b"1"]]
    assert a.fail(token, error="bang") == [b"retry", 0, token, 2]
    assert lab.dump()["{=x}:running"].content[b"error"] == b"bang"
    assert a.resume(token) == [b"run", 0, token, 2, 1, [b"1"]]
    assert a.complete(token) == [b"done", 1]


def test_a_batch_that_fails_too_often_is_parked(lab: Lab) -> None:
    a = lab.process("a")
    since = lab.now
    a.append(b"1")
    token = a.batch(b"2")
    lab.advance(50)
    a.fail(token, most=2)
    assert a.fail(token, most=2, error="no such table: müll") == [b"parked", 1]
    assert not a.holds()
    dump = lab.dump()
    assert dump.keys() == {"{=x}:parked", f"{{=x}}:parked:{token}", "{=x}:memory"}
    assert dump[f"{{=x}}:parked:{token}"].content == [b"1", b"2"]
    (packed,) = dump["{=x}:parked"].content.values()
    assert msgpack.unpackb(packed) == {
        "error": "no such table: müll",
        "attempts": 2,
        "owner": "a",
        "since": since,
        "at": since + 50,
    }
    assert a.complete(token) == [b"lost", 1]
    assert a.resume(token) == [b"lost", 1]


def test_a_parked_batch_makes_way_for_a_deferred_one(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    b.leave(b"2")
    assert a.fail(token, most=2) == [b"retry", 0, token, 1], "for now it holds up the other"
    kind, clear, again, attempt, count, partials = a.fail(token, most=2)
    assert (kind, clear, attempt, count, partials) == (b"again", 0, 0, 1, [b"2"])
    assert again > token
    assert lab.dump()[f"{{=x}}:parked:{token}"].content == [b"1"]
    assert b"error" not in lab.dump()["{=x}:running"].content
    assert a.complete(again) == [b"done", 1]


def test_several_batches_are_parked_side_by_side(lab: Lab) -> None:
    a = lab.process("a")
    tokens = []
    for partial in (b"1", b"2", b"3"):
        tokens.append(a.batch(partial))
        a.fail(tokens[-1], most=1)
    dump = lab.dump()
    assert set(dump["{=x}:parked"].content) == {b"%d" % token for token in tokens}
    assert [dump[f"{{=x}}:parked:{token}"].content for token in tokens] == [[b"1"], [b"2"], [b"3"]]


@pytest.mark.parametrize("count", [127, 128, 129, 1000])
def test_a_large_batch_is_fetched_piece_by_piece(lab: Lab, count: int) -> None:
    a = lab.process("a")
    partials = [b"%d" % n for n in range(count)]
    for partial in partials[:-1]:
        a.append(partial)
    *_, size, first = a.leave(partials[-1])
    token = a.again()[2]
    assert size == count
    assert first == partials[:128]
    rest = a.fetch(token, 128, 499) + a.fetch(token, 500, count)
    assert first + rest == partials
    assert a.complete(token) == [b"done", 1]
    assert a.fetch(token, 0, 9) == []


def test_fetch_ends_when_the_batch_is_taken_over(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch()
    assert a.fetch(token, 0, 0) == [b"data"]
    lab.client.hset(f"{a.base.decode()}:running", "owner", "b")
    assert a.fetch(token, 0, 0) == []


def test_a_large_deferred_session_is_split_from_its_newcomers(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch()
    for n in range(300):
        b.append(b"%d" % n)
    b.leave()
    for n in range(300, 400):
        c.append(b"%d" % n)
    _, _, again, _, count, first = a.complete(token)
    assert count == 300
    assert first + a.fetch(again, 128, 299) == [b"%d" % n for n in range(300)]
    assert lab.dump()["{=x}:partials"].content == [b"%d" % n for n in range(300, 400)]
