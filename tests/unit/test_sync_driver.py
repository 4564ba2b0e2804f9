"""The driver for threads, against a server that is played."""

import contextlib
import logging
import os
import random
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import pytest

from conftest import wait_until
from phonon.drivers import sync
from phonon.drivers.server import Server
from phonon.drivers.sync import Guard, SyncDriver, Task
from phonon.errors import ConnectionLostError, ServerError, StaleOperationError
from phonon.protocol.effects import Call, Effect, Execute, Flow, Outcome, Wait

LOST = ConnectionLostError("gone")


class Played:
    """A server that does what it is told once per operation number, and counts.

    Attributes:
        fate: Called with each call; may return an error in place of the answer, which then was
            lost on its way ("reply") or never came to be ("request").
        done: For each resource, what was done, in order.
        exchanges: The calls, as they came together.
        stale: Calls that came after one with a higher number.
    """

    def __init__(self) -> None:
        self.fate: Callable[[Call], str | BaseException | None] = lambda _: None
        self.done: dict[bytes, list[str]] = defaultdict(list)
        self.exchanges: list[list[Call]] = []
        self.stale: list[Call] = []
        self._last: dict[bytes, tuple[int, Any]] = defaultdict(lambda: (0, None))
        self._lock = threading.Lock()

    def call(self, call: Call) -> Any:
        return self.exchange([call])[0]

    def exchange(self, calls: Sequence[Call]) -> list[Any]:
        self.exchanges.append(list(calls))
        return [self._answer(call) for call in calls]

    def wait(self, key: bytes, timeout: float) -> bool:  # noqa: ARG002 - the server's signature
        return True

    def _answer(self, call: Call) -> Any:
        fate = self.fate(call)
        if isinstance(fate, Exception):
            return fate
        if isinstance(fate, BaseException):
            raise fate
        if fate == "request":
            return LOST
        with self._lock:
            last, answer = self._last[call.base]
            if call.numbered and call.number < last:
                self.stale.append(call)
                return StaleOperationError(f"{call.step} has number {call.number}, after {last}")
            if not call.numbered or call.number > last:
                self.done[call.base].append(call.step)
                answer = len(self.done[call.base])
                if call.numbered:
                    self._last[call.base] = call.number, answer
        return LOST if fate == "reply" else answer


def gone(fate: str = "request") -> Callable[[Call], str]:
    return lambda _: fate


@pytest.fixture
def server() -> Iterator[Played]:
    server = Played()
    yield server
    assert not server.stale


@pytest.fixture
def driver(server: Played) -> SyncDriver:
    return SyncDriver(cast("Server", server))


def step(name: str, base: bytes = b"r", *, keep: bool = True, numbered: bool = True) -> Call:
    return Call(name, base, (), numbered=numbered, keep=keep)


def flow(*effects: Effect) -> Flow[list[Any]]:
    """A flow that yields effects one after the other."""
    replies: list[Any] = []
    for effect in effects:
        replies += [(yield effect)]
    return replies


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def joined(thread: threading.Thread) -> None:
    thread.join(20)
    assert not thread.is_alive()


# One flow


def test_a_flow_runs_to_its_end(driver: SyncDriver, server: Played) -> None:
    told: list[Any] = []
    execute = Execute(lambda: "executed")
    result = driver.run(b"r", flow(step("a"), execute, step("b"), Wait(b"w", 1)), told.append)
    assert result == [1, Outcome("executed"), 2, True]
    assert told == [result]
    assert server.done == {b"r": ["a", "b"]}


def test_numbers_grow(driver: SyncDriver, server: Played) -> None:
    for name in "abc":
        driver.run(b"r", flow(step(name)))
    driver.run_all([Task(b"r", flow(step("d"))), Task(b"s", flow(step("e", b"s")))])
    numbers = [call.number for exchange in server.exchanges for call in exchange]
    assert numbers == sorted(set(numbers))
    assert server.done == {b"r": ["a", "b", "c", "d"], b"s": ["e"]}


def test_calls_without_effect_on_the_server_get_no_number(
    driver: SyncDriver, server: Played
) -> None:
    driver.run(b"r", flow(step("a", numbered=False)))
    assert server.exchanges[0][0].number == 0


def test_an_error_of_the_server_is_the_flows(driver: SyncDriver, server: Played) -> None:
    server.fate = lambda _: ServerError("no")

    def catches() -> Flow[str]:
        try:
            yield step("a")
        except ServerError as error:
            return f"caught {error}"
        return ""

    assert driver.run(b"r", catches()) == "caught no"
    with pytest.raises(ServerError):
        driver.run(b"r", flow(step("a")))
    assert not driver.suspended


# No answer


@pytest.mark.parametrize("fate", ["request", "reply"])
@pytest.mark.parametrize("many", [False, True])
def test_a_kept_call_goes_on_with_the_rest_of_its_flow(
    driver: SyncDriver, server: Played, fate: str, many: bool
) -> None:
    told: list[Any] = []
    server.fate = gone(fate)
    if many:
        task = Task(b"r", flow(step("a"), step("b")), told.append)
        driver.run_all([task])
        assert task.error is LOST
    else:
        with pytest.raises(ConnectionLostError):
            driver.run(b"r", flow(step("a"), step("b")), told.append)
    driver.resume()
    assert (driver.suspended, told) == (1, [])
    server.fate = lambda _: None
    driver.resume()
    assert server.done == {b"r": ["a", "b"]}
    assert (driver.suspended, told) == (0, [[1, 2]])


@pytest.mark.parametrize("fate", ["request", "reply"])
def test_another_call_is_not_kept(driver: SyncDriver, server: Played, fate: str) -> None:
    server.fate = gone(fate)
    with pytest.raises(ConnectionLostError):
        driver.run(b"r", flow(step("a", keep=False)))
    server.fate = lambda _: None
    driver.resume()
    assert server.done == ({b"r": ["a"]} if fate == "reply" else {})


@pytest.mark.parametrize("many", [False, True])
def test_what_is_kept_goes_before_the_next_operation(
    driver: SyncDriver, server: Played, many: bool
) -> None:
    server.fate = gone("reply")
    with pytest.raises(ConnectionLostError):
        driver.run(b"r", flow(step("a")))
    server.fate = lambda _: None
    if many:
        driver.run_all([Task(b"r", flow(step("b")))])
    else:
        driver.run(b"r", flow(step("b")))
    assert server.done == {b"r": ["a", "b"]}
    assert [call.step for exchange in server.exchanges for call in exchange] == ["a", "a", "b"]


def test_what_is_kept_holds_up_no_other_resource(driver: SyncDriver, server: Played) -> None:
    server.fate = lambda call: "request" if call.base == b"r" else None
    with pytest.raises(ConnectionLostError):
        driver.run(b"r", flow(step("a")))
    assert driver.run(b"s", flow(step("a", b"s"))) == [1]
    driver.run_all([Task(b"s", flow(step("b", b"s")))])
    assert server.done == {b"s": ["a", "b"]}
    assert len(server.exchanges) == 3


def test_while_it_is_still_lost_later_calls_are_kept_behind_it(
    driver: SyncDriver, server: Played
) -> None:
    """The lock of somebody who gives up must be released all the same."""
    server.fate = gone("reply")
    for name in "abc":
        with pytest.raises(ConnectionLostError):
            driver.run(b"r", flow(step(name)))
    with pytest.raises(ConnectionLostError):
        driver.run(b"r", flow(step("not kept", keep=False)))
    task = Task(b"r", flow(step("d")))
    driver.run_all([task])
    assert task.error is LOST
    assert driver.suspended == 4
    server.fate = lambda _: None
    driver.resume()
    assert server.done == {b"r": ["a", "b", "c", "d"]}
    assert not driver.suspended


def test_to_wait_for_the_server_once_is_enough(
    driver: SyncDriver, server: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "LOCK_STEP", 2)
    bases = [b"%d" % i for i in range(6)]
    server.fate = gone("reply")
    tasks = [Task(base, flow(step("a", base, keep=base != b"5"))) for base in [*bases, b"0"]]
    driver.run_all(tasks)
    assert all(task.error is LOST for task in tasks)
    assert len(server.exchanges) == 1
    driver.resume()
    assert len(server.exchanges) == 2
    server.fate = lambda _: None
    driver.resume()
    assert server.done == {base: ["a"] for base in bases[:5]} | {b"0": ["a", "a"]}
    assert max(len(exchange) for exchange in server.exchanges) == 2
    assert not driver.suspended


def test_a_kept_flow_that_fails_reports_it(
    driver: SyncDriver, server: Played, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[BaseException] = []
    server.fate = gone()
    driver.run_all([Task(b"r", flow(step("a")), failed=failed.append)])
    refused = ServerError("no")
    server.fate = lambda call: refused if call.step == "a" else None
    with caplog.at_level(logging.ERROR):
        assert driver.run(b"r", flow(step("b"))) == [1]
    assert failed == [refused]
    assert "a call that had been kept has failed: no" in caplog.text
    assert not driver.suspended


# Several threads


def test_who_waits_for_a_resource_comes_after_what_is_kept_meanwhile(
    driver: SyncDriver, server: Played
) -> None:
    asked, lose = threading.Event(), threading.Event()

    def fate(call: Call) -> str | None:
        if call.step != "a" or asked.is_set():
            return None
        asked.set()
        lose.wait(20)
        return "reply"

    server.fate = fate
    first, lost = in_thread(lambda: driver.run(b"r", flow(step("a"))))
    assert asked.wait(20)
    second, answer = in_thread(lambda: driver.run(b"r", flow(step("b"))))
    wait_until(lambda: driver._guard._queues)
    lose.set()
    joined(first)
    joined(second)
    assert (lost, answer) == ([LOST], [[2]])
    assert server.done == {b"r": ["a", "b"]}


@pytest.mark.parametrize("fate", ["request", "reply"])
@pytest.mark.parametrize("many", [False, True])
def test_what_is_kept_while_user_code_runs_goes_before_its_flow(
    driver: SyncDriver, server: Played, fate: str, many: bool
) -> None:
    def execute() -> None:
        server.fate = gone(fate)
        with pytest.raises(ConnectionLostError):
            driver.run(b"r", flow(step("other")))
        server.fate = lambda _: None

    task = Task(b"r", flow(step("leave"), Execute(execute), step("complete")))
    if many:
        driver.run_all([task])
    else:
        driver.run(b"r", task.flow)
    driver.resume()
    assert server.done == {b"r": ["leave", "other", "complete"]}


@pytest.mark.parametrize("fate", ["request", "reply"])
def test_a_flow_whose_turn_does_not_come_after_user_code_is_kept(
    driver: SyncDriver, server: Played, fate: str
) -> None:
    def execute() -> None:
        executed.append(True)
        server.fate = gone(fate)
        with pytest.raises(ConnectionLostError):
            driver.run(b"r", flow(step("other")))

    executed: list[bool] = []
    with pytest.raises(ConnectionLostError):
        driver.run(b"r", flow(step("leave"), Execute(execute), step("complete")))
    assert driver.suspended == 2
    server.fate = lambda _: None
    driver.resume()
    assert server.done == {b"r": ["leave", "other", "complete"]}
    assert len(executed) == 1
    assert not driver.suspended


def test_a_resource_is_free_while_user_code_runs(driver: SyncDriver, server: Played) -> None:
    def execute() -> None:
        thread, answer = in_thread(lambda: driver.run(b"r", flow(step("its"))))
        joined(thread)
        assert answer == [[2]]
        assert driver.run(b"r", flow(step("mine"))) == [3]

    result = driver.run(b"r", flow(step("leave"), Execute(execute), step("complete")))
    assert result == [1, Outcome(), 4]


def test_a_kept_flow_executes_with_its_resource_free(driver: SyncDriver, server: Played) -> None:
    def execute() -> None:
        assert driver.run(b"r", flow(step("mine"))) == [2]

    server.fate = gone()
    with pytest.raises(ConnectionLostError):
        driver.run(b"r", flow(step("leave"), Execute(execute), step("complete")))
    server.fate = lambda _: None
    assert driver.run(b"r", flow(step("next"))) == [4]
    assert server.done == {b"r": ["leave", "mine", "complete", "next"]}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_each_operation_is_done_once_and_in_order(
    driver: SyncDriver, server: Played, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test's schedule
    bases = [b"r", b"s", b"t"]
    server.fate = lambda _: chance.choice(["request", "reply", None, None])
    expected: dict[bytes, list[str]] = {base: [] for base in bases}

    def use(thread: int) -> None:
        for i in range(30):
            name = f"{thread}-{i}"
            chosen = chance.sample(bases, chance.randint(1, 3))
            execute = Execute(lambda: driver.resume() if chance.random() < 0.1 else None)
            tasks = [
                Task(base, flow(step(name, base), execute, step(f"{name}-then", base)))
                for base in chosen
            ]
            for base in chosen:
                expected[base] += [name, f"{name}-then"]
            if len(tasks) > 1:
                driver.run_all(tasks)
                continue
            with contextlib.suppress(ConnectionLostError):
                driver.run(chosen[0], tasks[0].flow)

    threads = [in_thread(partial(use, thread)) for thread in range(8)]
    for thread, outcome in threads:
        joined(thread)
        assert outcome == [None]
    server.fate = lambda _: None
    driver.resume()
    assert not driver.suspended
    for base in bases:
        assert sorted(server.done[base]) == sorted(expected[base])
        for name in expected[base]:
            if name.endswith("-then"):
                done = server.done[base]
                assert done.index(name.removesuffix("-then")) < done.index(name)


# Interrupts


@pytest.mark.parametrize("many", [False, True])
def test_an_interrupt_in_mid_call_loses_nothing(
    driver: SyncDriver, server: Played, many: bool
) -> None:
    server.fate = lambda _: KeyboardInterrupt()
    calls = flow(step("a"), step("b"))
    with pytest.raises(KeyboardInterrupt):
        driver.run_all([Task(b"r", calls)]) if many else driver.run(b"r", calls)
    server.fate = lambda _: None
    assert driver.run(b"r", flow(step("c"))) == [3]
    assert server.done == {b"r": ["a", "b", "c"]}


def test_an_interrupt_is_told_to_a_call_that_is_not_kept(
    driver: SyncDriver, server: Played
) -> None:
    server.fate = lambda _: KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        driver.run_all([Task(b"r", flow(step("a", keep=False)))])
    assert not driver.suspended


def test_an_interrupt_loses_no_flow_beside(driver: SyncDriver, server: Played) -> None:
    """One is to execute, another one calls."""
    executed: list[str] = []
    execute = Execute(lambda: executed.append("r"))

    def fate(call: Call) -> BaseException | None:
        return KeyboardInterrupt() if call.step == "b" and not executed else None

    server.fate = fate
    with pytest.raises(KeyboardInterrupt):
        driver.run_all(
            [
                Task(b"r", flow(step("a"), execute, step("c"))),
                Task(b"s", flow(step("a", b"s"), step("b", b"s"))),
            ]
        )
    server.fate = lambda _: None
    driver.resume()
    assert executed == ["r"]
    assert server.done == {b"r": ["a", "c"], b"s": ["a", "b"]}


def test_an_interrupt_while_waiting_for_ones_turn_loses_no_outcome(
    driver: SyncDriver, server: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[bool] = []
    acquire = Guard.acquire

    def interrupted(guard: Guard, bases: set[bytes]) -> None:
        if len(executed) == 1:
            executed.append(True)
            raise KeyboardInterrupt
        acquire(guard, bases)

    monkeypatch.setattr(Guard, "acquire", interrupted)
    execute = Execute(lambda: executed.append(True))
    with pytest.raises(KeyboardInterrupt):
        driver.run(b"r", flow(step("a"), execute, step("b")))
    driver.resume()
    assert server.done == {b"r": ["a", "b"]}
    assert len(executed) == 2
    assert driver.run(b"r", flow(step("c"))) == [3]


def test_an_interrupt_before_the_turn_of_what_has_executed_keeps_the_order(
    driver: SyncDriver, server: Played
) -> None:
    def execute() -> None:
        server.fate = gone()
        with pytest.raises(ConnectionLostError):
            driver.run(b"r", flow(step("other")))
        server.fate = lambda _: KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        driver.run(b"r", flow(step("leave"), Execute(execute), step("complete")))
    server.fate = lambda _: None
    driver.resume()
    assert server.done == {b"r": ["leave", "other", "complete"]}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_what_user_code_raises_is_its_outcome(
    driver: SyncDriver, server: Played, error: type[BaseException]
) -> None:
    def execute() -> None:
        raise error

    _, outcome, _ = driver.run(b"r", flow(step("leave"), Execute(execute), step("fail")))
    assert isinstance(outcome.error, error)
    assert server.done == {b"r": ["leave", "fail"]}


# Turns


def waiting(guard: Guard) -> int:
    """How many wait."""
    return len({turn for queue in list(guard._queues.values()) for turn in list(queue)})


def test_overlapping_sets_get_their_turns() -> None:
    guard = Guard()
    held: set[bytes] = set()
    chance = random.Random(1)  # noqa: S311 - a test's schedule

    def use() -> None:
        for _ in range(200):
            bases = {b"%d" % i for i in chance.sample(range(6), chance.randint(1, 6))}
            guard.acquire(bases)
            assert held.isdisjoint(bases)
            held.update(bases)
            held.difference_update(bases)
            guard.release(bases)

    for thread, outcome in [in_thread(use) for _ in range(8)]:
        joined(thread)
        assert outcome == [None]
    assert not guard._queues


def test_who_wants_many_is_not_passed_over() -> None:
    """Somebody always holds one of the two, and yet both are to be had."""
    guard = Guard()
    guard.acquire_one(b"1")
    both, outcome = in_thread(lambda: guard.acquire({b"1", b"2"}))
    wait_until(lambda: waiting(guard) == 1)
    later, _ = in_thread(lambda: guard.acquire_one(b"2"))
    wait_until(lambda: waiting(guard) == 2)
    guard.acquire_one(b"3")  # nobody waits for that one
    guard.release_one(b"1")
    joined(both)
    assert outcome == [None]
    assert later.is_alive()
    guard.release({b"1", b"2"})
    joined(later)


def test_who_gives_up_waiting_is_in_nobodys_way() -> None:
    guard = Guard()
    guard.acquire_one(b"1")

    def interrupt() -> None:
        wait_until(lambda: waiting(guard) == 1)
        later, _ = in_thread(lambda: guard.acquire_one(b"2"))
        wait_until(lambda: waiting(guard) == 2)
        os.kill(os.getpid(), signal.SIGINT)
        joined(later)

    thread, outcome = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        guard.acquire({b"1", b"2"})
    joined(thread)
    assert outcome == [None]
    guard.release({b"1", b"2"})
    guard.acquire({b"1", b"2"})
