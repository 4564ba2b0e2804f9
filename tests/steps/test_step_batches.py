"""Append, complete, fail, park, replay, discard, resume, hand off."""

import msgpack
import pytest

from phonon._protocol.answers import Reply
from steps.lab import BATCH_SCORE, Lab, lab_fixture  # noqa: F401 - found by its name
from support import operations as ops

QUEUE = b"class:C"


def test_append_joins_and_counts_a_modification(lab: Lab) -> None:
    a = lab.process("a")
    assert [a.append(b"1"), a.append(b"2")] == [Reply.STORED] * 2
    assert lab.data() == {
        "members:x": {b"a": b"2"},
        "partials:x": [b"1", b"2"],
        "registry:a": {b"x": (lab.now - 10) // 1000},
    }


def test_append_and_leave_say_when_it_is_time_to_merge(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    b.join()
    told = [a.append(b"%d" % i) for i in range(128)]
    assert [i for i, answer in enumerate(told) if answer != Reply.STORED] == [63, 127]
    assert (told[63], told[127]) == (64, 128)
    for i in range(63):
        a.append(b"%d" % i)
    assert a.leave(b"last") == [Reply.HELD, 1, 0, 192]


@pytest.mark.parametrize("count", [127, 128, 129, 500])
def test_a_large_batch_is_fetched_piece_by_piece(lab: Lab, count: int) -> None:
    a = lab.process("a")
    partials = [b"%d" % i for i in range(count)]
    a.answers(*(ops.append(0, b"x", partial) for partial in partials))
    *_, token, size, _, _, _, content = a.leave()
    assert (size, content) == (count, partials[:128])
    while len(content) < size:
        content += lab.ask("fetch", "a", "x", token, len(content), len(content) + 99)
    assert content == partials
    assert lab.ask("fetch", "b", "x", token, 0, 9) == []
    assert lab.ask("fetch", "a", "x", token + 1, 0, 9) == []


def test_large_contents_are_left_to_be_fetched(lab: Lab) -> None:
    a = lab.process("a")
    big = b"b" * 700_000
    for name in (b"x", b"y"):
        for _ in range(9):
            a.append(big, name)
    answer = a.leave()
    assert (answer[4], len(answer[-1])) == (9, 1), "a megabyte at most, but one"
    assert len(lab.ask("fetch", "a", "x", answer[3], 1, 8)) == 1


def test_the_contents_of_one_answer_are_bounded(lab: Lab) -> None:
    a = lab.process("a")
    names = [b"r%d" % i for i in range(12)]
    for name in names:
        a.append(b"b" * 600_000, name)
    told = a.answers(*(ops.leave(0, name) for name in names))
    assert [len(answer[-1]) for answer in told] == [1] * 7 + [0] * 5


def test_only_the_owner_completes_and_only_with_its_token(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    assert b.complete(token) == Reply.LOST
    assert a.complete(token - 1) == Reply.LOST
    assert lab.dump()["batch:x"] == [b"1"]
    assert a.complete(token) == Reply.DONE
    assert a.complete(token) == Reply.LOST
    assert lab.data() == {}


def test_sessions_that_end_meanwhile_are_one_batch_of_the_same_owner(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch(b"1")
    assert b.leave(b"2") == [Reply.DEFERRED, 0, 1]
    assert c.leave(b"3") == [Reply.DEFERRED, 0, 1]
    c.append(b"newcomer")
    again = a.complete(token)
    assert again[:3] == [Reply.AGAIN, 0, 0]
    assert again[3] > token
    assert again[4:] == [2, 0, 0, None, [b"2", b"3"]]
    assert lab.dump()["partials:x"] == [b"newcomer"]
    assert a.complete(again[3]) == Reply.DONE
    assert c.leave()[-1] == [b"newcomer"]


def test_a_member_without_data_survives_a_completion(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch()
    b.join()
    a.join()
    assert a.complete(token) == Reply.DONE
    assert set(lab.registry("a")) == {b"x"}
    assert lab.registry("a")[b"x"] < BATCH_SCORE
    assert lab.ask("count", "x") == 2


def test_a_failed_batch_is_kept_for_a_retry_under_its_token(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch(b"1")
    assert a.fail(token, error=b"boom", delay=500) == [Reply.RETRY, 1]
    running = lab.dump()["running:x"]
    assert running[b"error"] == b"boom"
    assert int(running[b"retry_at"]) == lab.now_ms + 500
    assert a.resume(token) == [Reply.RUN, 0, 0, token, 1, 1, 0, None, [b"1"]]
    assert b"retry_at" not in lab.dump()["running:x"]
    assert a.fail(token) == [Reply.RETRY, 2]
    b = lab.process("b")
    assert b.resume(token) == Reply.LOST
    assert b.fail(token) == Reply.LOST


def test_a_batch_that_fails_too_often_is_parked(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1", b"2")
    a.fail(token, most=2)
    assert a.fail(token, most=2, error=b"worse") == Reply.PARKED
    assert lab.ask("parked") == [b"x"]
    (got, entry, size) = lab.ask("entries", "x")
    assert (int(got), size) == (token, 2)
    found = msgpack.unpackb(entry)
    assert (found["error"], found["attempts"], found["owner"]) == ("worse", 2, "a")
    assert found["at"] == lab.now_ms >= found["since"] > 0
    assert lab.ask("look", "x", token, 0, 9) == [b"1", b"2"]
    assert lab.registry("a") == {}
    assert b.replay(token + 1) == Reply.MISSING
    again = b.replay(token)
    assert again[3] > token
    assert again[4:] == [2, 0, 0, None, [b"1", b"2"]]
    assert lab.registry("b")[b"x"] >= BATCH_SCORE
    assert b.complete(again[3]) == Reply.DONE
    assert lab.data() == {}


def test_a_replay_waits_for_the_running_batch(lab: Lab) -> None:
    a = lab.process("a")
    first = a.batch(b"1")
    a.fail(first, most=1)
    second = a.batch(b"2")
    assert a.replay(first) == Reply.RUNNING
    a.fail(second, most=1)
    assert a.discard(first) == Reply.DISCARDED
    assert a.discard(first) == Reply.MISSING
    assert lab.ask("parked") == [b"x"]
    assert a.discard(second) == Reply.DISCARDED
    assert lab.data() == {}


def test_a_parked_batch_makes_way_for_a_session_that_has_ended(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    b.leave(b"2")
    answer = a.fail(token, most=1)
    assert (answer[0], answer[-1]) == (Reply.AGAIN, [b"2"])


def test_a_batch_is_handed_to_one_that_knows_the_class(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = a.batch(b"1")
    a.fail(token)
    assert c.hand_off(token) == Reply.LOST
    assert a.hand_off(token, QUEUE) == Reply.HANDED
    assert lab.registry("a") == {}
    assert lab.registry("class:C") == {b"x": lab.now_ms}
    assert lab.ask("verify", "b", lab.now_ms, 0)[4] == [QUEUE]
    assert a.complete(token) == Reply.LOST
    assert b.reap(QUEUE) == [Reply.REAPED, 0, 0, [b"x", token, 0], [], 1]
    assert b.resume(token)[3:7] == [token, 1, 1, 0], "no death is counted"
    assert b.complete(token) == Reply.DONE
    assert lab.data() == {}


def test_a_member_that_hands_a_batch_off_stays_a_member(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch()
    a.join()
    a.hand_off(token)
    assert 0 < lab.registry("a")[b"x"] < BATCH_SCORE


def test_a_partial_may_be_any_bytes(lab: Lab) -> None:
    a = lab.process("a")
    partials = [bytes(range(256)), b"\0", b"\xc1" * 70_000, b"-1", b"nan"]
    for partial in partials:
        a.append(partial)
    assert a.leave()[-1] == partials


def test_due_although_the_list_is_gone_is_no_trouble(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    b.leave(b"2")
    lab.client.delete(lab.key("partials:x"))
    assert a.complete(token) == Reply.DONE
    assert lab.data() == {}
