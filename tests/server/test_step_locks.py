"""lock, unlock, renew."""

import pytest
from steps import LEASE, Lab, lab_fixture  # noqa: F401 - the fixture is found by its name

WAITER_MS = 10_000
WOKEN_MS = 2_000
UNTAKEN_MS = 200


def test_a_free_lock_is_granted(lab: Lab) -> None:
    a = lab.process("a")
    kind, clear, token = a.lock()
    assert (kind, clear) == (b"granted", 0)
    assert lab.dump()["{=x}:lock"].content == {
        b"holder": b"a/1",
        b"pid": b"a",
        b"token": b"%d" % token,
        b"until": b"%d" % (lab.now + LEASE),
        b"since": b"%d" % lab.now,
        b"thread": b"main",
    }
    assert a.unlock() == [b"released", 1]


def test_the_holder_gets_its_own_grant_again(lab: Lab) -> None:
    a = lab.process("a")
    granted = a.lock()
    lab.advance(100)
    assert a.lock() == granted


def test_a_taken_lock_is_busy_for_all_others(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    since = lab.now
    lab.advance(100)
    assert b.lock() == [b"busy", 1, LEASE - 100, b"a/1", since, b"main"]
    assert a.lock(name=2) == [b"busy", 0, LEASE - 100, b"a/1", since, b"main"], (
        "two threads exclude too"
    )
    assert not {"{=x}:queue", "{=x}:waiting"} & lab.dump().keys(), "who does not wait, leaves"


def test_a_lock_is_no_membership(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    assert a.count() == 0
    b.join()
    assert b.leave() == [b"last", 1, 0, 0, 1, []]


def test_waiters_get_the_lock_in_the_order_they_came(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    since = lab.now
    a.lock()
    assert b.lock(queue=True) == [b"wait", 1, WAITER_MS // 2, b"a/1", since, b"main"]
    lab.advance(1)
    assert c.lock(queue=True) == [b"wait", 1, WAITER_MS // 2, b"a/1", since, b"main"]
    assert a.unlock() == [b"released", 1]
    assert lab.dump()["{=x}:wake:b/1"].content == [b"%d" % lab.now]
    assert "{=x}:wake:c/1" not in lab.dump()
    assert c.lock(queue=True) == [b"wait", 1, UNTAKEN_MS + 1, b"b/1", lab.now, b""], "it is b's"
    assert a.lock() == [b"busy", 1, UNTAKEN_MS + 1, b"b/1", lab.now, b""]
    assert b.lock(queue=True)[0] == b"granted"
    assert "{=x}:wake:b/1" not in lab.dump(), "the wake-up is used"
    b.unlock()
    assert lab.dump()["{=x}:wake:c/1"].content == [b"%d" % lab.now]
    assert c.lock(queue=True)[0] == b"granted"
    c.unlock()
    assert lab.dump().keys() == {"{=x}:memory"}


def test_a_waiter_is_told_to_ask_when_the_lease_ends(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.do("lock", b"a/1", 1_200, 0, b"main")
    lab.advance(200)
    assert b.lock(queue=True) == [b"wait", 1, 1_000, b"a/1", lab.now - 200, b"main"]


def test_a_lease_that_runs_out_frees_the_lock(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    token = a.lock()[2]
    lab.advance(LEASE - 1)
    assert b.lock() == [b"busy", 1, 1, b"a/1", lab.now - LEASE + 1, b"main"]
    lab.advance(1)
    kind, _, next_token = b.lock()
    assert kind == b"granted"
    assert next_token > token
    assert a.unlock() == [b"lost", 1]
    assert lab.dump()["{=x}:lock"].content[b"holder"] == b"b/1", "it is not taken from b"


def test_a_waiter_that_has_gone_silent_is_passed_over(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock()
    b.lock(queue=True)
    lab.advance(WAITER_MS - 1)
    c.lock(queue=True)
    lab.advance(1)
    a.unlock()
    assert "{=x}:wake:b/1" not in lab.dump()
    assert lab.dump()["{=x}:wake:c/1"].content == [b"%d" % lab.now]


def test_a_woken_waiter_that_does_not_come_is_passed_over(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock()
    b.lock(queue=True)
    lab.advance(1)
    c.lock(queue=True)
    a.unlock()
    assert lab.client.lpop(f"{lab.namespace}:{{=x}}:wake:b/1"), "it is on its way"
    lab.advance(WOKEN_MS - 1)
    assert c.lock(queue=True)[:3] == [b"wait", 1, 1]
    lab.advance(1)
    assert c.lock(queue=True)[0] == b"granted"
    assert lab.dump().keys() == {"{=x}:lock", "{=x}:memory", "{@c}:holds"}, "b has left no trace"


def test_a_waiter_that_does_not_notice_its_wake_up_is_passed_over(lab: Lab) -> None:
    a, b, c, d = (lab.process(name) for name in "abcd")
    a.lock()
    for waiter in (b, c, d):
        waiter.lock(queue=True)
        lab.advance(1)
    a.unlock()
    lab.advance(UNTAKEN_MS)
    assert c.lock(queue=True)[:3] == [b"wait", 1, 1]
    lab.advance(1)
    # Whoever asks sees to it that the next one is woken.
    assert d.lock(queue=True) == [b"wait", 1, UNTAKEN_MS + 1, b"c/1", lab.now, b""]
    assert lab.dump()["{=x}:wake:c/1"].content == [b"%d" % lab.now]
    assert "{=x}:wake:b/1" not in lab.dump()
    assert b.lock(queue=True)[0] == b"wait"
    assert c.lock(queue=True)[0] == b"granted"
    c.unlock()
    assert "{=x}:wake:d/1" in lab.dump(), "b has come back as the last"


def test_a_waiter_that_asks_late_has_not_lost_its_place(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock()
    b.lock(queue=True)
    lab.advance(1)
    c.lock(queue=True)
    a.unlock()
    lab.advance(WOKEN_MS - 1)
    assert b.lock(queue=True)[0] == b"granted"


def test_asking_again_keeps_the_place_in_the_queue(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock()
    b.lock(queue=True)
    lab.advance(1)
    c.lock(queue=True)
    lab.advance(WAITER_MS - 2)
    b.lock(queue=True)
    c.lock(queue=True)
    lab.advance(WAITER_MS - 1)
    a.unlock()
    assert "{=x}:wake:b/1" in lab.dump()


def test_unlock_of_a_waiter_leaves_the_queue(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    b.lock(queue=True)
    assert b.unlock() == [b"lost", 1]
    a.unlock()
    assert lab.dump().keys() == {"{=x}:memory"}, "and nobody is woken"


def test_unlock_of_a_woken_waiter_wakes_the_next(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock()
    b.lock(queue=True)
    lab.advance(1)
    c.lock(queue=True)
    a.unlock()
    assert b.unlock() == [b"lost", 1], "it was promised the lock, and gives up"
    assert lab.dump()["{=x}:wake:c/1"].content == [b"%d" % lab.now]
    assert "{=x}:wake:b/1" not in lab.dump()


def test_unlock_of_a_lock_that_never_was(lab: Lab) -> None:
    assert lab.process("a").unlock() == [b"lost", 1]


def test_locks_and_batches_share_one_row_of_tokens(lab: Lab) -> None:
    a = lab.process("a")
    lock_token = a.lock()[2]
    batch_token = a.batch()
    a.unlock()
    assert lock_token < batch_token < a.lock()[2]


def test_what_belongs_to_locks_expires_by_itself(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    b.lock(queue=True)
    a.unlock()
    dump = lab.dump()
    seconds, _ = lab.client.time()
    for name in ("queue", "waiting", "wake:b/1"):
        assert 0 < dump[f"{{=x}}:{name}"].expires - seconds * 1_000 <= WAITER_MS + 61_000
    b.lock()
    until_ms = lab.dump()["{=x}:lock"].expires - seconds * 1_000
    assert LEASE < until_ms <= LEASE + 62_000, "well after its lease"


def test_renew_prolongs_membership_and_locks(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    a.lock(name=1)
    lab.advance(LEASE - 1)
    assert a.renew(1, 2) == [1, 1, 0]
    lab.advance(LEASE - 1)
    assert a.count() == 1
    assert lab.process("b").lock()[0] == b"busy"
    assert a.unlock() == [b"released", 0]


@pytest.mark.parametrize("name", ["1", "1s"])
def test_renew_that_comes_late_makes_no_lease_shorter(lab: Lab, name: str) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock(name)
    assert a.ask("renew", LEASE, a.holder(name), 3 * LEASE) == [0, 1]
    assert a.ask("renew", LEASE, a.holder(name), LEASE) == [0, 1], "an earlier one that comes now"
    lab.advance(3 * LEASE - 1)
    assert b.lock()[0] == b"busy"
    lab.advance(1)
    assert b.lock()[0] == b"granted"


def test_renew_brings_nothing_back(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    assert a.renew() == [0], "it is no member"
    assert a.count() == 0
    lab.advance(LEASE)
    assert a.renew(1) == [0, 0], "the lease has run out"
    b.lock()
    before = lab.dump()
    assert a.renew(1) == [0, 0], "it is somebody else's"
    assert lab.dump() == before
    a.join()
    lab.advance(LEASE)
    b.leave()
    assert a.renew() == [0], "it was dropped"
    assert a.count() == 0
