"""Tokens grow strictly, whatever the clock does, and keep all their digits."""

import pytest

from phonon._protocol.answers import Reply
from steps.lab import EPOCH_US, Lab, lab_fixture  # noqa: F401 - found by its name


def test_tokens_follow_the_clock(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch()
    assert token == lab.now
    lab.advance(3600_000)
    a.complete(token)
    assert a.batch() == lab.now


@pytest.mark.parametrize("back_ms", [0, 1, 5_000, 3_600_000])
def test_tokens_grow_when_the_clock_is_set_back(lab: Lab, back_ms: int) -> None:
    a, b = lab.process("a"), lab.process("b")
    last = a.batch()
    a.complete(last)
    lab.advance(-back_ms)
    for process in (a, b, a):
        token = process.batch()
        assert token > last
        process.complete(token)
        last = process.lock()[1]
        assert last > token
        process.unlock()
    assert int(lab.dump()["token"]) == last


def test_tokens_of_one_call_differ(lab: Lab) -> None:
    a = lab.process("a")
    tokens = [a.batch(resource=b"r%d" % i) for i in range(5)]
    assert tokens == sorted(set(tokens))


def test_tokens_grow_when_all_keys_are_gone(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch()
    lab.client.delete(*lab.client.keys(lab.prefix + b"*"))
    assert lab.process("a").batch() > token


@pytest.mark.parametrize("base", [2**53 - 2**20, EPOCH_US + 1, 2**52 + 1])
def test_all_digits_are_kept(lab: Lab, base: int) -> None:
    """Lua would print 14 of them."""
    lab.set_clock(base)
    a, b = lab.process("a"), lab.process("b")
    token = a.batch(b"1")
    assert token == lab.now
    assert lab.dump()["running:x"][b"token"] == b"%d" % token
    assert lab.dump()["token"] == b"%d" % token
    assert lab.ask("verify", "a", 2**50, 0)[5] in ([b"x", token], [])
    assert a.resume(token)[3] == token
    assert lab.ask("fetch", "a", "x", token, 0, 0) == [b"1"]
    assert a.fail(token, most=1) == Reply.PARKED
    assert lab.ask("look", "x", token, 0, 0) == [b"1"]
    new = b.replay(token)[3]
    assert new == lab.now
    assert b.complete(new - 1) == Reply.LOST
    assert b.complete(new) == Reply.DONE
    assert a.lock()[1] == a.lock()[1] > new


def test_a_batch_keeps_its_token_over_attempts_and_owners(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.batch()
    a.fail(token)
    assert a.resume(token)[3] == token
    assert b.reap(a)[3][1] == token
