"""What stays in Redis: nothing but one small key, and not for long (G11)."""

import pytest
from scenarios import SCENARIOS, prepare
from steps import Lab, Process, lab_fixture, settled  # noqa: F401 - the fixture is found by its name

MEMORY_MS = 60_000
PUSH_MS = 10_000
MEMORY = "{=x}:memory"


def expires_in(lab: Lab, name: str) -> int:
    seconds, micros = lab.client.time()
    return lab.dump()[name].expires - seconds * 1_000 - micros // 1_000


@pytest.mark.parametrize("colocated", [True, False])
def test_a_session_leaves_only_its_memory(lab: Lab, colocated: bool) -> None:
    a, b, c = (lab.process(name, colocated=colocated) for name in "abc")
    a.append(b"1")
    b.modify(2)
    c.join(a=1)
    a.lock()
    b.lock(queue=True)
    a.unlock()
    b.lock(queue=True)
    b.unlock()
    a.leave(b"2")
    b.leave()
    token = c.leave()[2]
    a.leave(b"3")
    c.fail(token)
    c.resume(token)
    again = c.complete(token)[2]
    assert c.complete(again) == [b"done", 1]
    assert lab.dump().keys() == {MEMORY}
    # Tokens are a little ahead of a clock that stands still; the memory may wait for it.
    assert 0 < expires_in(lab, MEMORY) <= MEMORY_MS + PUSH_MS + 10


def test_a_session_without_data_leaves_only_its_memory(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.join()
    b.join()
    a.leave()
    b.leave()
    assert lab.dump().keys() == {MEMORY}


def test_the_memory_of_a_process_that_only_asks_expires_too(lab: Lab) -> None:
    lab.process("a").complete(1)
    assert lab.dump().keys() == {MEMORY}
    assert 0 < expires_in(lab, MEMORY) <= MEMORY_MS + PUSH_MS


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_data_expires_by_itself_and_everything_else_does(lab: Lab, name: str) -> None:
    process, step, args = prepare(lab, name)
    process.do(step, *args)
    for key, (_, expires) in lab.dump().items():
        words = (":memory", ":lock", ":share", ":queue", ":waiting", ":wake:", ":fence")
        passing = any(word in key for word in words)
        assert (expires != -1) == passing, key


def pushes(process: Process) -> bool:
    """Whether a step of the process sets the memory's expiry anew."""
    client, key = process.lab.client, process.base + b":memory"
    client.pexpire(key, 10**9)
    process.join()
    return bool(client.pttl(key) <= MEMORY_MS + PUSH_MS)


def test_the_memory_outlives_its_last_use_by_a_minute(lab: Lab) -> None:
    a = lab.process("a")
    a.join()
    for _ in range(3):
        lab.advance(PUSH_MS)
        assert not pushes(a), "a minute is left of seventy seconds"
        lab.advance(1)
        assert pushes(a)


def test_a_process_that_comes_pushes_the_expiry(lab: Lab) -> None:
    lab.process("a").join()
    lab.advance(PUSH_MS)
    assert pushes(lab.process("b"))


def remembered(lab: Lab) -> set[bytes]:
    return set(lab.dump()[MEMORY].content)


def crowd(lab: Lab, first: int, last: int) -> set[bytes]:
    for n in range(first, last + 1):
        lab.process(f"p{n}").complete(1)
    return {b"p%d" % n for n in range(first, last + 1)}


def test_a_busy_resource_forgets_silent_processes(lab: Lab) -> None:
    a = lab.process("a")
    token = a.batch()
    a.complete(token)
    crowd(lab, 1, 28)
    lab.advance(MEMORY_MS + PUSH_MS + 1)
    b = lab.process("b")
    b.join()
    assert len(remembered(lab)) == 31
    lab.process("c").join()
    assert remembered(lab) == {b"token", b"b", b"c"}
    assert int(lab.dump()[MEMORY].content[b"token"]) >= token, "this is never forgotten"


def test_no_process_is_forgotten_within_a_minute_of_its_last_call(lab: Lab) -> None:
    old = crowd(lab, 1, 20)
    a = lab.process("a")
    a.append(b"1")
    lab.advance(PUSH_MS)
    a.append(b"2")  # does not push
    lab.advance(MEMORY_MS)
    assert crowd(lab, 21, 31) | old | {b"a"} == remembered(lab), "pruned, but nobody was silent"
    before = settled(lab.dump())
    assert a.again() == [b"stored", 0]
    assert settled(lab.dump()) == before
    lab.advance(1)
    new = crowd(lab, 32, 63)
    assert remembered(lab) == new | {b"p%d" % n for n in range(21, 32)}


def test_many_processes_that_come_and_go_leave_a_small_memory(lab: Lab) -> None:
    most = 0
    for n in range(300):
        process = lab.process(f"p{n}")
        process.append(b"data")
        process.complete(process.leave()[2])
        lab.advance(5_000)
        most = max(most, len(remembered(lab)))
    assert most <= 48, "those of the last 70 s, and at most 32 more"
