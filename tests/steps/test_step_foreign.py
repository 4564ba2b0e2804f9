"""A key of ours that holds something else: the operation fails, or does not need that key.

Either way nothing is half done, and the other operations of the call go on.
"""

from collections.abc import Callable

import pytest

from phonon._core.compaction import digest
from phonon._protocol.answers import Reply
from phonon._protocol.operations import FORCE, MODIFICATIONS, Operation
from steps.lab import Lab, Proc, lab_fixture  # noqa: F401 - the fixture is found by its name
from support import operations as ops

TYPES = (
    *("members", "left", "partials", "running", "batch", "parked", "parties"),
    *("lock", "queue", "woken", "leases"),
)
Make = Callable[[Proc, Proc], Operation]


def of_leave(flags: int = 0, partial: bytes = b"p") -> Make:
    return lambda _a, _b: ops.leave(0, b"x", partial, flags)


def leave_among_others(a: Proc, b: Proc) -> Operation:
    b.append(b"1")
    a.modify()
    return ops.leave(0, b"x", b"2")


def leave_deferred(a: Proc, b: Proc) -> Operation:
    b.batch(b"1")
    a.append(b"2")
    return ops.leave(0, b"x", b"3")


def leave_parties(a: Proc, b: Proc) -> Operation:
    b.join()
    a.meet(3)
    return ops.leave(0, b"x", b"3")


def complete_again(a: Proc, b: Proc) -> Operation:
    token = a.batch(b"1")
    b.leave(b"2")
    return ops.complete(0, b"x", token)


def park_again(a: Proc, b: Proc) -> Operation:
    token = a.batch(b"1")
    b.leave(b"2")
    return ops.fail(0, b"x", token, b"e", 0, 1)


def retry(a: Proc, _b: Proc) -> Operation:
    return ops.fail(0, b"x", a.batch(), b"e", 0, 3)


def parked(a: Proc) -> int:
    token = a.batch(b"1")
    a.fail(token, most=1)
    return token


def lock_waiting(a: Proc, b: Proc) -> Operation:
    b.lock(lease=10)
    a.lock(queue=True)
    b.unlock()
    return ops.lock(0, b"x", "a/1", queue=True, lease_ms=50, thread="t")


def unlock_with_waiter(a: Proc, b: Proc) -> Operation:
    a.lock(lease=1000)
    b.lock(queue=True)
    return ops.unlock(0, b"x", "a/1")


def compact(a: Proc, b: Proc) -> Operation:
    b.batch(b"0")
    a.leave(b"1")
    a.append(b"2")
    a.append(b"3")
    return ops.compact(0, b"x", 1, 2, digest([b"2", b"3"]), [b"m"])


CASES: dict[str, Make] = {
    "join": lambda _a, _b: ops.join(0, b"x"),
    "append": lambda _a, _b: ops.append(0, b"x", b"1"),
    "modify": lambda _a, _b: ops.modify(0, b"x", 2),
    "restore": lambda _a, _b: ops.restore(0, b"x", {b"a": 1, b"q": 2}),
    "meet": lambda _a, _b: ops.meet(0, b"x", 2, b"a"),
    "leave, nobody": of_leave(),
    "leave by force": of_leave(FORCE | MODIFICATIONS),
    "leave, alone": lambda a, _b: (a.join(), ops.leave(0, b"x", b"p"))[1],
    "leave, alone with partials": lambda a, _b: (a.append(), ops.leave(0, b"x", b"p"))[1],
    "leave, among others": leave_among_others,
    "leave, deferred": leave_deferred,
    "leave, of parties": leave_parties,
    "complete": lambda a, _b: ops.complete(0, b"x", a.batch()),
    "complete, again": complete_again,
    "fail, retry": retry,
    "fail, park, again": park_again,
    "resume": lambda a, _b: ops.resume(0, b"x", a.batch()),
    "hand off": lambda a, _b: ops.hand_off(0, b"x", a.batch(), b"class:C"),
    "replay": lambda a, _b: ops.replay(0, b"x", parked(a)),
    "discard": lambda a, _b: ops.discard(0, b"x", parked(a)),
    "compact": compact,
    "lock": lambda _a, _b: ops.lock(0, b"x", "a/1", queue=True, lease_ms=9, thread="t"),
    "lock, shared": lambda _a, _b: ops.lock(0, b"x", "a/1s", queue=True, lease_ms=9, thread="t"),
    "lock, waiting": lock_waiting,
    "unlock": lambda a, _b: (a.lock(), ops.unlock(0, b"x", "a/1"))[1],
    "unlock, waiters": unlock_with_waiter,
    "renew": lambda a, _b: (a.lock(lease=50), ops.renew(0, b"x", "a/1", 90))[1],
    "await": lambda a, _b: (a.meet(2), ops.await_parties(0, b"x", "a/1"))[1],
    "reap": lambda _a, b: (b.append(b"1"), b.lock(), ops.reap(0, b.id, 9, recovers=True))[2],
}


def lone_unlock_with_waiter(a: Proc, b: Proc) -> Operation:
    a.lock()
    b.lock(queue=True)
    return ops.unlock(0, b"x", "a/1")


def lone_lock_in_turn(a: Proc, b: Proc) -> Operation:
    b.lock()
    a.lock(queue=True)
    b.unlock()
    return ops.lock(0, b"x", "a/1", queue=True)


LONE = [CASES[name] for name in CASES if "lock" in name]
LONE += [lone_unlock_with_waiter, lone_lock_in_turn]


@pytest.mark.parametrize("suffix", ["lock", "leases", "queue", "woken", "members", "running"])
@pytest.mark.parametrize("make", LONE)
def test_a_lock_alone_in_its_call_that_meets_a_foreign_key_changes_nothing(
    lab: Lab, make: Make, suffix: str
) -> None:
    a, b = lab.process("a"), lab.process("b")
    operation = make(a, b)
    key = lab.key(f"{suffix}:x")
    lab.client.delete(key)
    lab.client.set(key, "somebody else's")
    before = lab.data()
    answer = a.do(operation)
    after = lab.data()
    assert after[f"{suffix}:x"] == b"somebody else's"
    if isinstance(answer, list) and answer[0] == Reply.FAILED:
        assert b"WRONGTYPE" in answer[1]
        for books in (before, after):
            books.pop("registry:a", None)
        assert before == after


@pytest.mark.parametrize("suffix", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_an_operation_that_meets_a_foreign_key_changes_nothing(
    lab: Lab, name: str, suffix: str
) -> None:
    a, b = lab.process("a"), lab.process("b")
    operation = CASES[name](a, b)
    key = lab.key(f"{suffix}:x")
    lab.client.delete(key)
    lab.client.set(key, "somebody else's")
    before = lab.data()
    first, answer, last = a.answers(ops.join(0, b"y"), operation, ops.append(0, b"y", b"1"))
    assert (first, last) == (Reply.JOINED, Reply.STORED), "the others go on"
    after = lab.data()
    if suffix == "batch" and name.startswith("complete"):
        # Its own key is deleted, whatever it holds: to look first would cost a command each time.
        assert after.get("batch:x") in (None, [b"2"])
        return
    assert after[f"{suffix}:x"] == b"somebody else's"
    wrong = isinstance(answer, list) and answer[0] == Reply.REAPED and answer[4]
    if wrong or (isinstance(answer, list) and answer[0] == Reply.FAILED):
        error = answer[4][1] if wrong else answer[1]
        assert b"WRONGTYPE" in error or b"PHONONSTATE" in error, error
        ignored = {"registry:a", "registry:b", "members:y", "partials:y"}
        kept = [{k: v for k, v in keys.items() if k not in ignored} for keys in (before, after)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("key", ["lane:a", "registry:a"])
def test_foreign_books_refuse_the_whole_call(lab: Lab, key: str) -> None:
    a = lab.process("a")
    lab.client.delete(lab.key(key))
    lab.client.set(lab.key(key), "somebody else's")
    before = lab.dump()
    with pytest.raises(Exception, match="WRONGTYPE"):
        a.append()
    assert lab.dump() == before


def test_a_foreign_registry_fails_a_lock_that_is_alone_in_its_call(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    a.do(ops.lock(0, b"y", "a/2", queue=False, lease_ms=9000))
    b.do(ops.lock(0, b"z", "b/1", queue=False))
    lab.client.delete(lab.key("registry:a"))
    lab.client.set(lab.key("registry:a"), "somebody else's")
    before = lab.data()
    tries = [
        ops.unlock(0, b"x", "a/1"),
        ops.unlock(0, b"y", "a/2"),
        ops.lock(0, b"new", "a/3", queue=False),
        ops.lock(0, b"z", "a/4", queue=True),
    ]
    for operation in tries:
        code, error = a.do(operation)
        assert code == Reply.FAILED
        assert b"registry:a" in error
    assert lab.data() == before


def test_a_foreign_mailbox_does_not_keep_a_lock_from_being_freed(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    b.lock(queue=True)
    lab.client.set(lab.key("mailbox:b"), "somebody else's")
    assert a.unlock() == Reply.RELEASED
    assert b.lock(queue=True)[0] == Reply.GRANTED
    assert b.unlock() == Reply.RELEASED


def test_a_foreign_token_starts_nothing(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    token = c.batch(b"1", resource=b"z")
    a.append(b"1")
    b.join(b"y")
    lab.client.delete(lab.key("token"))
    lab.client.rpush(lab.key("token"), "somebody else's")
    before = lab.data()
    told = [a.leave(), a.leave(b"", FORCE), b.leave(b"1", resource=b"y"), b.lock()]
    assert [answer[0] for answer in told] == [Reply.FAILED] * 4
    assert lab.data() == before
    assert c.complete(token, b"z") == Reply.DONE, "which needs no token"
