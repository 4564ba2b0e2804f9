"""Tokens grow strictly per resource, whatever happens to clock and keys (G6)."""

import itertools

import pytest
from steps import Lab, lab_fixture  # noqa: F401 - the fixture is found by its name

# A batch with partials of several classes gives each a token between its own and the next.
SPARE_TOKENS = 1023


def end_session(lab: Lab) -> int:
    a = lab.process("a")
    a.number = lab.now  # grows, as a new process's would not
    token = a.batch()
    a.complete(token)
    return token


def wipe(lab: Lab) -> None:
    lab.client.delete(*(f"{lab.namespace}:{name}" for name in lab.dump()))


def test_tokens_follow_the_clock(lab: Lab) -> None:
    assert end_session(lab) == lab.now * 1_000


def test_tokens_grow_while_the_clock_stands_still(lab: Lab) -> None:
    a = lab.process("a")
    tokens = []
    for _ in range(50):
        tokens.append(a.batch())
        a.complete(tokens[-1])
        tokens.append(a.lock()[2])
        a.unlock()
    batches = tokens[::2]
    assert all(after > before for before, after in itertools.pairwise(tokens))
    assert all(
        after - before > SPARE_TOKENS for before, after in zip(batches, tokens[1::2], strict=True)
    )


def test_tokens_grow_when_all_keys_are_gone(lab: Lab) -> None:
    before = end_session(lab)
    wipe(lab)
    lab.advance(1)
    assert end_session(lab) > before


def test_tokens_grow_when_all_keys_are_gone_after_a_burst(lab: Lab) -> None:
    a = lab.process("a")
    for _ in range(500):
        token = a.batch()
        a.complete(token)
    lab.advance(60_000)
    wipe(lab)
    assert end_session(lab) > token


def test_tokens_grow_when_all_keys_are_gone_after_a_long_burst(lab: Lab) -> None:
    """A thousand tokens a second and more: a loop of lock and unlock hands out four times that."""
    a = lab.process("a")
    a.lock()
    a.unlock()
    lead_ms = 200_000  # as a minute of such a loop leaves it
    lab.client.hset(f"{a.base.decode()}:memory", "token", (lab.now + lead_ms) * 1_000)
    lab.advance(60_000)
    token = a.lock()[2]
    a.unlock()
    passed_ms = lab.client.pttl(a.base + b":memory")
    wipe(lab)  # the memory has expired
    lab.advance(passed_ms)
    assert end_session(lab) > token


@pytest.mark.parametrize("back_ms", [1, 5_000, 3_600_000])
def test_tokens_grow_when_the_clock_is_set_back(lab: Lab, back_ms: int) -> None:
    a = lab.process("a")
    before = a.batch()
    lab.advance(-back_ms)
    a.leave(b"next")
    batch = a.complete(before)[2]
    lock = a.lock()[2]
    assert before < batch < lock
    lab.advance(-back_ms)
    assert a.complete(batch) == [b"done", 0]
    assert lock < a.batch()


def test_a_batch_keeps_its_token_over_its_attempts(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch()
    for attempt in range(1, 4):
        lab.advance(10_000)
        assert a.fail(token, most=9) == [b"retry", 0, token, attempt]
        assert a.resume(token)[:4] == [b"run", 0, token, attempt]


def test_a_parked_batch_and_the_next_have_different_tokens(lab: Lab) -> None:
    a = lab.process("a")
    first = a.batch()
    a.fail(first, most=1)
    assert a.batch() > first


def test_resources_have_tokens_of_their_own(lab: Lab) -> None:
    x, y = lab.process("a", "x"), lab.process("a", "y")
    for _ in range(3):
        x.complete(x.batch())
    assert y.batch() == lab.now * 1_000


def test_tokens_are_exact_where_floats_are_printed_short(lab: Lab) -> None:
    # %.14g would round a number of sixteen digits.
    lab.advance(123_457)
    a = lab.process("a")
    a.lock()
    token = a.batch()
    assert token == lab.now * 1_000 + 1
    assert lab.dump()["{=x}:running"].content[b"token"] == b"%d" % token
    assert a.again()[2] == token
    assert a.complete(token)[0] == b"done"
