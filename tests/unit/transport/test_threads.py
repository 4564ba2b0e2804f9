"""The driver of threads, with real lanes on real servers."""

import contextlib
import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from redis.exceptions import ResponseError

from phonon._core.flows import (
    CALLER_GONE,
    EXECUTING,
    FLUSH,
    AwaitMail,
    Branch,
    Execute,
    Flow,
    FlowRun,
    Job,
    Outcome,
    Read,
    Send,
    Sleep,
    Wait,
    call,
    single,
)
from phonon._protocol.library import default
from phonon._protocol.operations import Operation
from phonon._transport import sync_io, threads
from phonon._transport.server import after_fork_in_child
from phonon._transport.threads import ThreadDriver, _Leader
from phonon.errors import ConnectionLostError, ServerError
from support import operations as ops
from support.drivers import Identity, calls_of, partials, send, sync_server
from support.interrupts import alarms
from support.proxy import Fault, Proxy
from support.world import Redis, wait_until


class Lab:
    """A driver with its lanes, and the flows that it has given up."""

    def __init__(
        self, path: str, namespace: str, retry_timeout: float = 10.0, **options: Any
    ) -> None:
        self.identity = Identity(namespace)
        self.server = sync_server(path)
        sync_io.run(self.server.start())
        self.driver = ThreadDriver(
            self.server, default(), self.identity, retry_timeout=retry_timeout, **options
        )
        self.identity.deliver = self.driver.deliver
        self.detached: list[FlowRun] = []
        self.ready: list[FlowRun] = []
        self.driver.on_detached = self.detached.append
        self.driver.on_ready = self.ready.append
        self.begin(b"p1")

    def begin(self, process: bytes) -> None:
        opening = self.identity.opening(process)
        replies = sync_io.run(self.server.exchange(opening, 5))
        self.identity.lanes = self.identity.opened(process, replies)

    def append(self, name: bytes, partial: bytes = b"x") -> Any:
        return self.driver.run(single(self.identity.append(name, partial)))

    def reborn(self, process: bytes) -> None:
        steps = self.identity.rebirth(process)
        requests = next(steps)
        with contextlib.suppress(StopIteration):
            while True:
                requests = steps.send(sync_io.run(self.server.exchange(requests, 5)))

    def catch_up(self) -> list[Any]:
        """Do the outbox's work: go on with the flows of callers that have gone."""
        results = []
        deadline = time.monotonic() + 20
        while self.detached or any(lane.has_work for lane in self.identity.lanes):
            assert time.monotonic() < deadline, self.detached
            self.driver.flush()
            for run in [run for run in self.detached if self.driver.detached_ready(run)]:
                self.detached.remove(run)
                results.append(self.driver.resume(run))
        return results

    def close(self) -> None:
        self.driver.close()
        sync_io.run(self.server.close())


Make = Callable[..., Lab]


@pytest.fixture
def make(namespace: str) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make_lab(path: str, **options: Any) -> Lab:
            lab = Lab(path, namespace, **options)
            stack.callback(lab.close)
            return lab

        yield make_lab


@pytest.fixture
def lab(server: Redis, make: Make) -> Lab:
    return make(server.socket)


@pytest.fixture
def proxy(own_server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(own_server.socket)
    yield proxy
    proxy.close()


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Run functions side by side; returns what they return."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(60) for future in [pool.submit(f) for f in functions]]


def settled(lab: Lab) -> None:
    """Nothing is under way, nobody leads, and the next call works."""
    assert not any(lane.has_work for lane in lab.identity.lanes)
    assert not lab.identity.suspects
    lab.append(b"afterwards")
    assert not lab.driver._waiting


# Sending


def test_answers_come_in_order(lab: Lab, server: Redis) -> None:
    names = [b"r%d" % (i % 50) for i in range(2000)]
    sent = [lab.identity.append(name, b"%d" % i) for i, name in enumerate(names)]
    answers = lab.driver.run(send(sent))
    assert all(answer == 1 or answer >= 64 for answer in answers)
    for i in range(50):
        found = partials(server, lab.identity, b"r%d" % i)
        assert found == [b"%d" % j for j in range(i, 2000, 50)]
    settled(lab)


def test_one_operation_is_one_call(lab: Lab, server: Redis) -> None:
    before = calls_of(server)
    assert lab.driver.run(single(ops.join(*lab.identity.place(b"r")))) == 0
    assert lab.driver.run(single(ops.leave(*lab.identity.place(b"r")))) == [3, 0, 1]
    assert calls_of(server) - before == 2
    assert lab.driver.run(send(())) == []


def test_many_partitions_are_one_exchange(make: Make, own_server: Redis, proxy: Proxy) -> None:
    lab = make(proxy.socket)
    lab.append(b"warm")
    before = proxy.connections
    lab.driver.run(send([lab.identity.append(b"r%d" % i, b"x") for i in range(200)]))
    assert proxy.steps.count("append") == 1 + 16
    assert proxy.connections == before


def test_threads_send_for_each_other(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    before = calls_of(own_server)
    in_threads(*[lambda: [lab.append(b"same") for _ in range(250)]] * 8)
    assert len(partials(own_server, lab.identity, b"same")) == 2000
    assert calls_of(own_server) - before < 1500
    settled(lab)


def test_those_that_wait_are_sent_together(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    lab.append(b"same")
    before = calls_of(own_server)
    own_server.pause()
    threads = [threading.Thread(target=lab.append, args=(b"same",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    lane = lab.identity.lanes[lab.identity.partitions.of(b"same")]
    wait_until(lambda: len(lane.queue) == 19)
    own_server.go_on()
    for thread in threads:
        thread.join(20)
    assert calls_of(own_server) - before == 2
    settled(lab)


def test_a_lane_that_is_given_up_is_led_on_at_once(
    make: Make, own_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to look again by himself."""
    monkeypatch.setattr(threads, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(threads, "LOOK_AGAIN", 60.0)
    lab = make(own_server.socket)
    in_threads(*[lambda: [lab.append(b"same") for _ in range(100)]] * 6)
    sent = [lab.identity.append(b"r%d" % i, b"x") for i in range(20)]
    in_threads(
        *[lambda: [lab.append(b"r%d" % i) for i in range(20)], lambda: lab.driver.run(send(sent))]
    )
    settled(lab)


def test_an_operation_that_fails_has_its_own_error(lab: Lab, server: Redis) -> None:
    with server.client() as client:
        client.set(lab.identity.key("members", b"foreign"), "x")
    sent = [lab.identity.append(name, b"x") for name in (b"foreign", b"good")]
    bad, good = lab.driver.run(send(sent))
    assert isinstance(bad, ServerError)
    assert "holds a string where Phonon keeps a hash" in str(bad)
    assert good == 1


@pytest.mark.parametrize("seed", range(3))
def test_answers_that_are_lost(make: Make, own_server: Redis, proxy: Proxy, seed: int) -> None:
    lab = make(proxy.socket)
    proxy.at_random(seed, 0.1)
    names = [b"r%d" % i for i in range(6)]
    in_threads(*[lambda name=name: [lab.append(name) for _ in range(60)] for name in names * 2])
    proxy.plan()
    for name in names:
        assert len(partials(own_server, lab.identity, name)) == 120
    settled(lab)


def test_a_caller_does_not_wait_for_ever(make: Make, own_server: Redis, proxy: Proxy) -> None:
    lab = make(proxy.socket)
    lab.append(b"r")
    lab.driver.retry_timeout = 0.2
    proxy.strike(Fault.LOST_REPLY, gone=True)
    with pytest.raises(ConnectionLostError, match="nothing local is lost"):
        lab.append(b"r", b"kept")
    with pytest.raises(ConnectionLostError):
        lab.driver.run(send([lab.identity.append(b"r", b"a"), lab.identity.append(b"s", b"b")]))
    first, second = lab.detached
    assert first.caller_gone
    lab.driver.flush()
    assert not lab.driver.detached_ready(first)
    lab.driver.retry_timeout = 20
    proxy.back()
    assert lab.catch_up() == [1, [1, 1]]
    assert {id(run) for run in lab.ready} == {id(first), id(second)}
    assert partials(own_server, lab.identity, b"r") == [b"x", b"kept", b"a"]
    assert partials(own_server, lab.identity, b"s") == [b"b"]
    settled(lab)


def test_others_lead_on_after_a_caller_has_gone(
    make: Make, own_server: Redis, proxy: Proxy
) -> None:
    lab = make(proxy.socket)
    lab.append(b"r")
    lab.driver.retry_timeout = 0.2
    proxy.gone()
    with pytest.raises(ConnectionLostError):
        lab.append(b"r", b"first")
    lab.driver.retry_timeout = 20
    proxy.back()
    assert lab.append(b"r", b"second") == 1  # takes the first one along
    assert partials(own_server, lab.identity, b"r") == [b"x", b"first", b"second"]
    assert lab.ready == lab.detached != []
    assert lab.catch_up() == [1]


def test_a_flow_that_goes_on_may_lose_the_server_again(
    make: Make, own_server: Redis, proxy: Proxy
) -> None:
    lab = make(proxy.socket, retry_timeout=0.1)

    def flow() -> Flow[Any]:
        for i in range(3):
            yield Send((lab.identity.append(b"r", b"%d" % i),))
        return (yield CALLER_GONE)

    proxy.gone()
    with pytest.raises(ConnectionLostError):
        lab.driver.run(flow())
    for i in range(2):
        proxy.back()
        lab.driver.flush()
        proxy.strike(Fault.LOST_REQUEST, gone=True)
        (run,) = lab.detached
        lab.detached.clear()
        with pytest.raises(ConnectionLostError):
            lab.driver.resume(run)
        assert lab.detached == [run]
        assert len(partials(own_server, lab.identity, b"r")) == i + 1
    lab.driver.retry_timeout = 20
    proxy.back()
    proxy.plan()
    assert lab.catch_up() == [True]
    assert partials(own_server, lab.identity, b"r") == [b"0", b"1", b"2"]


def test_the_server_is_full(make: Make, own_server: Redis) -> None:
    """A refused operation gets its error, and an operation beside it that frees memory runs."""
    lab = make(own_server.socket)
    names = [b"r%d" % i for i in range(40)]
    lab.driver.run(send([ops.join(*lab.identity.place(name)) for name in names]))
    with own_server.client() as client:
        client.config_set("maxmemory", 1)
        mixed = []
        for name in names:
            mixed += [ops.leave(*lab.identity.place(name)), lab.identity.append(b"n" + name, b"x")]
        answers = lab.driver.run(send(mixed))
        assert answers[::2] == [[3, 0, 1]] * 40
        assert all(isinstance(answer, ServerError) for answer in answers[1::2])
        with pytest.raises(ServerError, match="out of memory"):
            lab.append(b"single")
        client.config_set("maxmemory", 0)
        assert client.exists(*[lab.identity.key("partials", b"n" + name) for name in names]) == 0
    settled(lab)


def test_a_lane_is_fenced_and_its_callers_go_on(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    lab.append(b"r")
    for request in lab.identity.everywhere("fence", b"p1"):
        sync_io.run(lab.server.exchange([request], 5))
    threads = [threading.Thread(target=lab.append, args=(b"r",)) for _ in range(5)]
    threads.append(threading.Thread(target=lab.append, args=(b"other",)))
    for thread in threads:
        thread.start()
    wait_until(lambda: len(lab.identity.suspects) >= 2)
    # Of a lane that was never used nothing is remembered.
    assert {kind for _, kind, _ in lab.identity.suspects} == {"PHONONFENCED", "PHONONLOST"}
    lab.reborn(b"p2")
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(partials(own_server, lab.identity, b"r")) == 6
    lab.identity.suspects.clear()
    settled(lab)


def test_rebirths_all_the_time(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    over = threading.Event()

    def be_reborn() -> None:
        for i in itertools.count(2):
            if over.is_set():
                return
            lab.reborn(b"p%d" % i)
            time.sleep(0.005)

    def work(name: bytes) -> None:
        for i in range(100):
            sent = [lab.identity.append(name, b"%d" % i), lab.identity.append(b"2" + name, b"x")]
            assert lab.driver.run(send(sent)) is not None
            lab.append(name, b"single")

    thread = threading.Thread(target=be_reborn)
    thread.start()
    names = [b"r%d" % i for i in range(4)]
    try:
        in_threads(*[lambda name=name: work(name) for name in names])
    finally:
        over.set()
        thread.join()
    for name in names:
        found = Counter(partials(own_server, lab.identity, name))
        assert found.pop(b"single") == 100
        assert found == Counter(b"%d" % i for i in range(100))
        assert len(partials(own_server, lab.identity, b"2" + name)) == 100


def test_deferred_operations_go_when_they_are_released(lab: Lab) -> None:
    lane = lab.identity.lanes[lab.identity.partitions.of(b"r")]
    lane.defer()
    thread = threading.Thread(target=lab.append, args=(b"r",))
    thread.start()
    wait_until(lambda: lane.deferred)
    assert lab.driver.run(send([ops.join(*lab.identity.place(b"r"))], first=True)) == [0]
    lane.release()
    thread.join(20)
    assert not thread.is_alive()
    settled(lab)


def test_a_background_flow_is_told_that_there_is_no_answer(
    make: Make, own_server: Redis, proxy: Proxy
) -> None:
    lab = make(proxy.socket, retry_timeout=0.1)
    told: list[Any] = []

    def flow() -> Flow[None]:
        try:
            yield Send((lab.identity.append(b"r", b"x"),))
        except ConnectionLostError as error:
            told.append(error)
        told.append((yield Branch(single(lab.identity.append(b"r", b"y")))))

    proxy.gone()
    worker = lab.driver.spawn(flow(), "background")
    worker.join(20)
    assert not worker.is_alive()
    assert isinstance(told[0], ConnectionLostError)
    assert isinstance(told[1].error, ConnectionLostError)
    assert len(lab.detached) == 1
    proxy.back()
    assert lab.catch_up() == [1]
    assert partials(own_server, lab.identity, b"r") == [b"x", b"y"]


def test_the_heartbeat_does_not_wait_for_its_own_rebirth(lab: Lab) -> None:
    lane = lab.identity.lanes[lab.identity.partitions.of(b"r")]
    lane.fence()
    told: list[Any] = []

    def flow() -> Flow[None]:
        try:
            yield Send((lab.identity.append(b"r", b"x"),), first=True)
        except ConnectionLostError as error:
            told.append(error)

    worker = lab.driver.spawn(flow(), "background")
    worker.join(8)
    assert told


# Re-entry and interrupts


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Raised by a signal handler."""


def test_a_signal_handler_calls(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    busy = False
    inner = outer = 0

    def handler() -> None:
        nonlocal busy, inner
        if not busy:
            busy = True
            lab.append(b"same", b"inner")
            inner += 1
            busy = False

    end = time.monotonic() + 2
    with alarms(handler, 0.0005):
        while time.monotonic() < end:
            lab.append(b"same", b"outer")
            sent = [lab.identity.append(b"same", b"outer"), lab.identity.append(b"s", b"x")]
            lab.driver.run(send(sent))
            outer += 2
    assert inner > 100
    found = Counter(partials(own_server, lab.identity, b"same"))
    assert found == {b"inner": inner, b"outer": outer}
    settled(lab)


def test_a_finalizer_calls(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    inner = 0

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            nonlocal inner
            lab.append(b"same", b"inner")
            inner += 1

    before = gc.get_threshold()
    try:
        for i in range(300):
            gc.set_threshold(3 + i % 40)
            Cycle()
            lab.append(b"same", b"outer")
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert inner == 300
    assert Counter(partials(own_server, lab.identity, b"same")) == {b"inner": 300, b"outer": 300}
    settled(lab)


@pytest.mark.slow
@pytest.mark.parametrize("others", [0, 2])
def test_ten_thousand_interrupts(
    make: Make, own_server: Redis, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answered calls count, unanswered ones go on in the background, and none counts twice."""
    # The interpreter ignores exceptions in finalizers.
    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)
    lab = make(own_server.socket)
    over = threading.Event()
    interrupts = 0
    armed = False

    def handler() -> None:
        nonlocal interrupts
        if armed:
            interrupts += 1
            raise Interrupted

    def work_beside() -> int:
        number = 0
        while not over.is_set():
            lab.append(b"same", b"beside")
            number += 1
        return number

    acknowledged: list[bytes] = []
    tried = 0
    wanted = 10_000 if not others else 1_000
    with ThreadPoolExecutor(others or 1) as pool:
        beside = [pool.submit(work_beside) for _ in range(others)]
        with alarms(handler, 0.0002):
            while interrupts < wanted:
                try:
                    armed = True
                    tried += 1
                    partial = b"%d" % tried
                    if tried % 2:
                        lab.append(b"same", partial)
                    else:
                        companion = lab.identity.append(b"companion", b"x")
                        lab.driver.run(send([lab.identity.append(b"same", partial), companion]))
                    armed = False
                    acknowledged.append(partial)
                except Interrupted:
                    pass
                finally:
                    armed = False
                if len(lab.detached) > 100:
                    lab.catch_up()
        over.set()
        lab.catch_up()
        count = sum(future.result(20) for future in beside)
    found = Counter(partials(own_server, lab.identity, b"same"))
    assert found.pop(b"beside", 0) == count
    assert set(found.values()) == {1}
    assert set(acknowledged) <= set(found)
    assert len(found) <= tried
    settled(lab)


def positions(work: Callable[[], None], at: int, then: Callable[[], None]) -> bool:
    """Do something at one bytecode of ours in the middle of some work.

    Returns:
        Whether the work had so many.
    """
    left = at
    there = False

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left, there
        if "/phonon/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                there = True
                sys.settrace(None)
                then()
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return there


def every_bytecode(step: int) -> Iterator[int]:
    return itertools.count(1, step)


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_a_call_in_the_middle_of_a_call_at_every_bytecode(
    make: Make, own_server: Redis, many: bool
) -> None:
    lab = make(own_server.socket)
    lab.append(b"same")

    def work() -> None:
        if many:
            sent = [lab.identity.append(b"same", b"outer"), lab.identity.append(b"s", b"x")]
            lab.driver.run(send(sent))
        else:
            lab.append(b"same", b"outer")

    def then() -> None:
        for _ in range(2):
            lab.append(b"same", b"inner")

    for at in every_bytecode(3 if many else 1):
        before = Counter(partials(own_server, lab.identity, b"same"))
        if not positions(work, at, then):
            break
        found = Counter(partials(own_server, lab.identity, b"same"))
        assert found - before == {b"inner": 2, b"outer": 1}, at
        assert not any(lane.has_work for lane in lab.identity.lanes), at
    assert at > 500
    settled(lab)


# The collector closes the connection that an interrupted call drops, and may meet its socket before
# its owner.
@pytest.mark.filterwarnings("ignore:.*socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_an_interrupt_at_every_bytecode(make: Make, own_server: Redis, many: bool) -> None:
    """No lane stays busy, nothing is done twice, and what was enqueued goes on."""
    lab = make(own_server.socket)
    lab.append(b"same")
    number = itertools.count()
    outcome = ""

    def work() -> None:
        nonlocal outcome
        outcome = "interrupted"
        partial = b"%d" % next(number)
        if many:
            sent = [lab.identity.append(b"same", partial), lab.identity.append(b"s", partial)]
            lab.driver.run(send(sent))
        else:
            lab.append(b"same", partial)
        outcome = "answered"

    def then() -> None:
        raise Interrupted

    went_on = 0
    for at in every_bytecode(3 if many else 1):
        try:
            there = positions(work, at, then)
        except Interrupted:
            there = True
        else:
            assert outcome == "answered"
        detached = len(lab.detached)
        assert lab.append(b"same", b"next") in (1, *range(64, 100_000)), at
        lab.catch_up()
        went_on += detached
        found = Counter(partials(own_server, lab.identity, b"same"))
        others = Counter(partials(own_server, lab.identity, b"s"))
        last = b"%d" % (next(number) - 1)
        number = itertools.count(int(last) + 1)
        assert found[last] <= 1, at
        assert found[last] == 1 or outcome == "interrupted", at
        if many:
            assert others[last] == found[last], at
        with own_server.client() as client:
            client.delete(lab.identity.key("partials", b"same"))
            client.delete(lab.identity.key("partials", b"s"))
        if not there:
            break
    assert at > 500
    assert went_on > 100
    settled(lab)
    gc.collect()


def test_an_error_for_a_call_that_others_have_finished_is_no_reason_to_suspect(lab: Lab) -> None:
    """The outer frame's copy came too late: the server calls it stale."""
    name = b"r"
    lane = lab.identity.lanes[lab.identity.partitions.of(name)]
    lane.enqueue(lab.identity.append(name, b"x"))
    late = lane.next_call()
    assert late is not None
    lab.driver.flush()
    lane.enqueue(lab.identity.append(name, b"y"))
    current = lane.next_call()
    for error in ("PHONONSTALE 2", "PHONONLOST 2", "OOM command not allowed"):
        assert lab.driver._receiver.take(lane, late, ResponseError(error))
    assert lane.call is current
    lab.driver.flush()
    settled(lab)


def test_a_leader_whose_frame_has_ended_is_replaced(lab: Lab) -> None:
    """As after an exception in the very moment between a claim and its cleaning up."""
    lane = lab.identity.lanes[lab.identity.partitions.of(b"r")]

    def claim() -> None:
        assert lab.driver._claims.claim(lane, _Leader())

    in_threads(claim)
    started = time.monotonic()
    lab.append(b"r")
    assert time.monotonic() - started < 8
    settled(lab)


def test_garbage_is_collected_while_a_leader_is_looked_at(tmp_path: Path) -> None:
    """`sys._current_frames` would wait for itself, when garbage has a ``threading.local``."""
    script = tmp_path / "script.py"
    script.write_text(
        "import gc, threading\n"
        "from phonon._transport.threads import _Leader\n"
        "class Node: pass\n"
        "leader = _Leader()\n"
        "def look(): return leader.leads()\n"
        "gc.set_threshold(1)\n"
        "for _ in range(1000):\n"
        "    node = Node()\n"
        "    node.itself, node.local = node, threading.local()\n"
        "    del node\n"
        "    assert look()\n"
    )
    subprocess.run([sys.executable, script], check=True, timeout=30)


def test_an_own_leader_that_was_left_behind_is_replaced(lab: Lab) -> None:
    lane = lab.identity.lanes[lab.identity.partitions.of(b"r")]
    assert lab.driver._claims.claim(lane, _Leader())
    lab.append(b"r")
    settled(lab)


def test_an_interrupt_before_anything_was_sent_ends_the_flow(lab: Lab) -> None:
    undone: list[str] = []

    def flow() -> Flow[None]:
        try:
            yield Sleep(10)
        except Interrupted:
            undone.append("yes")
            raise

    def handler() -> None:
        raise Interrupted

    with pytest.raises(Interrupted), alarms(handler, 0.05):
        lab.driver.run(flow())
    assert undone == ["yes"]
    assert not lab.detached


def test_an_interrupt_after_something_was_sent_lets_the_flow_go_on(lab: Lab, server: Redis) -> None:
    def flow() -> Flow[Any]:
        yield Send((lab.identity.append(b"r", b"1"),))
        yield Sleep(10)
        gone = yield CALLER_GONE
        yield Send((lab.identity.append(b"r", b"2"),))
        return gone

    def handler() -> None:
        raise Interrupted

    with pytest.raises(Interrupted), alarms(handler, 0.05):
        lab.driver.run(flow())
    assert lab.catch_up() == [True]
    assert partials(server, lab.identity, b"r") == [b"1", b"2"]


def test_a_branch_of_an_interrupted_flow_goes_on_once(
    make: Make, own_server: Redis, proxy: Proxy
) -> None:
    lab = make(proxy.socket)
    told: list[Any] = []

    def branch() -> Flow[None]:
        told.append((yield Send((lab.identity.append(b"r", b"branch"),))))

    def flow() -> Flow[None]:
        yield Send((lab.identity.append(b"r", b"first"),))
        yield from call(lambda: stack.enter_context(proxy.stalled()))
        told.append((yield Branch(branch())).error)

    def handler() -> None:
        raise Interrupted

    with contextlib.ExitStack() as stack, pytest.raises(Interrupted), alarms(handler, 0.3):
        lab.driver.run(flow())
    lab.catch_up()
    assert sorted(map(type, told), key=str) == [list, ConnectionLostError]
    assert [1] in told
    assert partials(own_server, lab.identity, b"r") == [b"first", b"branch"]


# Other effects


def test_reading(lab: Lab, server: Redis) -> None:
    def flow() -> Flow[Any]:
        requests = lab.identity.everywhere("survey")
        return (yield Read(requests[:2]))

    with server.client() as client:
        client.delete(lab.identity.partitions.prefixes[1] + b"lanes")
        client.set(lab.identity.partitions.prefixes[1] + b"lanes", "foreign")

    good, bad = lab.driver.run(flow())
    assert good == [b"p1"]
    assert isinstance(bad, ServerError)


def test_reading_gives_up(make: Make, own_server: Redis, proxy: Proxy) -> None:
    lab = make(proxy.socket)
    proxy.gone()

    def flow() -> Flow[Any]:
        return (yield Read(lab.identity.everywhere("survey"), patience=0.1))

    assert all(isinstance(reply, ConnectionLostError) for reply in lab.driver.run(flow()))


def test_signals(lab: Lab) -> None:
    alarm = lab.driver.signal()

    def flow() -> Flow[Any]:
        rung = []
        for seconds in (0.01, 10, 0.01, 10):
            rung.append((yield Wait(alarm, seconds)))  # noqa: PERF401 - a comprehension yields nothing
        return rung

    with ThreadPoolExecutor(1) as pool:
        ringing = pool.submit(lab.driver.run, flow())
        time.sleep(0.05)
        alarm.set()
        alarm.set()
        time.sleep(0.05)
        alarm.set()
        assert ringing.result(20) == [False, True, False, True]


def test_a_flow_without_a_caller_does_not_pause(lab: Lab) -> None:
    def flow() -> Flow[Any]:
        yield Sleep(60)
        mail = yield AwaitMail(0, "p1/1", 60)
        yield FLUSH
        return (yield CALLER_GONE), mail

    def outer() -> Flow[Any]:
        return (yield Branch(flow()))

    assert lab.driver.run(outer()) == Outcome((True, False))


def test_an_effect_that_is_none(lab: Lab) -> None:
    def flow() -> Flow[None]:
        yield "nonsense"  # type: ignore[misc]  # that is the point

    with pytest.raises(TypeError, match="no effect"):
        lab.driver.run(flow())


def raises(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


async def coroutine_function() -> None:
    raise AssertionError("never")


def generator_function() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("pool", [False, True])
def test_executing(make: Make, server: Redis, pool: bool) -> None:
    with ThreadPoolExecutor(3) as executor:
        lab = make(server.socket, executor=executor if pool else None)
        error = KeyError("mine")
        assert lab.driver.run(call(EXECUTING.get)) == Outcome(True)
        assert not EXECUTING.get()
        assert lab.driver.run(call(raises(error))) == Outcome(error=error)
        for stop in (KeyboardInterrupt(), SystemExit(3), StopIteration(7), GeneratorExit()):
            outcome = lab.driver.run(call(raises(stop)))
            if isinstance(stop, StopIteration):
                assert "StopIteration" in str(outcome.error)
            else:
                assert outcome == Outcome(error=stop)
        outcome = lab.driver.run(call(coroutine_function))
        assert "coroutine function" in str(outcome.error)
        outcome = lab.driver.run(call(generator_function))
        assert "never ran" in str(outcome.error)


@pytest.mark.parametrize("pool", [False, True])
def test_a_slice_of_execution(make: Make, server: Redis, pool: bool) -> None:
    with ThreadPoolExecutor(2) as executor:
        lab = make(server.socket, executor=executor if pool else None, slice=0.05)
        jobs = [Job(lambda: time.sleep(0.03)) for _ in range(8)]

        def flow() -> Flow[int]:
            rounds = 0
            while any(job.outcome is None for job in jobs):
                yield Execute([job for job in jobs if job.outcome is None])
                rounds += 1
            return rounds

        assert 2 <= lab.driver.run(flow()) <= 5


def test_an_executor_that_was_shut_down(make: Make, server: Redis) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    lab = make(server.socket, executor=executor)
    assert lab.driver.run(call(lambda: 7)) == Outcome(7)


def test_an_execution_calls(lab: Lab, server: Redis) -> None:
    lab.driver.run(call(lambda: lab.append(b"r", b"nested")))
    assert partials(server, lab.identity, b"r") == [b"nested"]


def test_a_worker_that_fails_is_logged(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    def flow() -> Flow[None]:
        yield FLUSH
        raise KeyError("mine")

    with caplog.at_level(logging.ERROR, "phonon"):
        lab.driver.spawn(flow(), "broken").join(20)
    assert "broken has failed" in caplog.text


# Mail


def waits(lab: Lab, waiter: str, seconds: float = 20.0, partition: int = 0) -> Callable[[], Any]:
    def flow() -> Flow[tuple[Any, float]]:
        begun = time.monotonic()
        woken = yield AwaitMail(partition, waiter, seconds)
        return woken, time.monotonic() - begun

    return lambda: lab.driver.run(flow())


def post(server: Redis, lab: Lab, waiter: str, partition: int = 0) -> None:
    prefix = lab.identity.partitions.prefixes[partition]
    with server.client() as client:
        client.rpush(prefix + b"mailbox:" + lab.identity.lanes[partition].process, waiter)


def blocked(server: Redis) -> int:
    with server.client() as client:
        return int(client.info("clients")["blocked_clients"])


@pytest.fixture(params=[True, False], ids=["colocated", "cluster"])
def colocated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def mailing(make: Make, own_server: Redis, colocated: bool) -> Lab:
    lab = make(own_server.socket)
    lab.server.colocated = colocated  # a cluster cannot wait for all at once
    return lab


def test_mail_wakes_the_thread_that_it_is_for(
    mailing: Lab, own_server: Redis, colocated: bool
) -> None:
    with ThreadPoolExecutor(6) as pool:
        places = {f"p1/{i}": i % 3 for i in range(6)}
        waiting = {w: pool.submit(waits(mailing, w, partition=p)) for w, p in places.items()}
        wait_until(lambda: len(mailing.driver._mail.waiting) == 6)
        wait_until(lambda: blocked(own_server) == (1 if colocated else 3))
        for waiter in reversed(places):
            time.sleep(0.02)
            assert not waiting[waiter].done()
            post(own_server, mailing, waiter, places[waiter])
            woken, _ = waiting[waiter].result(15)
            assert woken
    assert not mailing.driver._mail.groups


def test_mail_is_read_on_when_its_reader_leaves(mailing: Lab, own_server: Redis) -> None:
    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(waits(mailing, "p1/1", 0.3))
        wait_until(lambda: blocked(own_server) == 1)
        other = pool.submit(waits(mailing, "p1/2"))
        assert reader.result(15)[0] is False
        post(own_server, mailing, "p1/2")
        woken, took = other.result(15)
        assert woken
        assert took < 10


def test_mail_that_comes_early_is_kept(mailing: Lab, own_server: Redis) -> None:
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(waits(mailing, "p1/1"))
        post(own_server, mailing, "p1/2")
        post(own_server, mailing, "p1/")  # a nudge
        post(own_server, mailing, "p1/1")
        assert reader.result(15)[0]
    woken, took = waits(mailing, "p1/2")()
    assert woken
    assert took < 5
    assert waits(mailing, "p1/2", 0.1)()[0] is False


@pytest.mark.parametrize("reborn", [True, False])
def test_a_rebirth_wakes_those_that_wait(mailing: Lab, own_server: Redis, reborn: bool) -> None:
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(waits(mailing, f"p1/{i}")) for i in range(4)]
        wait_until(lambda: len(mailing.driver._mail.waiting) == 4)
        wait_until(lambda: blocked(own_server) == 1)
        if reborn:
            mailing.reborn(b"p2")
        else:
            mailing.driver.look_again()  # the process stops
        wait_until(lambda: sum(future.done() for future in waiting) >= 3)
        with own_server.client() as client:
            client.rpush(mailing.identity.partitions.prefixes[0] + b"mailbox:p1", "p1/")
        assert all(future.result(15)[0] for future in waiting)


def test_waiting_for_mail_at_a_server_that_is_gone(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    own_server.kill()
    woken, took = waits(lab, "p1/1", 0.5)()
    assert not woken
    assert 0.4 < took < 10


def test_a_signal_handler_waits_for_mail_in_the_middle_of_the_reader(
    make: Make, own_server: Redis
) -> None:
    lab = make(own_server.socket)
    inner: list[Any] = []

    def handler() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        inner.append(waits(lab, "p1/2", 5)())

    with alarms(handler, 0.2):
        outer = waits(lab, "p1/1", 1)()
    assert outer[0] is False
    assert inner[0][1] < 4
    assert not lab.driver._mail.groups


def test_an_interrupted_reader_lets_another_read(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)

    def handler() -> None:
        raise Interrupted

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(Interrupted), alarms(handler, 0.2):
            waiting = waits(lab, "p1/1")
            threading.Timer(0.1, lambda: others.append(pool.submit(waits(lab, "p1/2")))).start()
            others: list[Any] = []
            waiting()
        wait_until(lambda: others)
        wait_until(lambda: blocked(own_server) >= 1)
        time.sleep(0.1)
        post(own_server, lab, "p1/2")
        assert others[0].result(15)[0]


# Fork


def test_a_forked_child_goes_on_as_another_process(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    lab.append(b"r", b"parent")
    over = threading.Event()
    leading = threading.Thread(
        target=lambda: [lab.append(b"r", b"parent") for _ in iter(over.is_set, True)]
    )
    leading.start()
    time.sleep(0.05)
    child = os.fork()
    if not child:
        status = 1
        try:
            lab.driver.after_fork_in_child()
            after_fork_in_child()
            lab.begin(b"child")
            assert lab.append(b"c", b"child") == 1
            status = 0
        except BaseException:  # noqa: BLE001 - pytest must not go on here
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    over.set()
    leading.join(20)
    assert partials(own_server, lab.identity, b"c") == [b"child"]
    settled(lab)


# Sending while operations are made


class OddError(Exception):
    """The error of making operations."""


def storing(lab: Lab, fails_at: int = -1) -> Flow[Any]:
    sent: list[Operation] = []

    def groups() -> Iterator[None]:
        for i in range(6):
            sent.append(lab.identity.append(b"r%d" % i, b"x"))
            if i == fails_at:
                raise OddError
            yield

    answers = yield Send(sent, more=groups())
    return answers


def stored(server: Redis, lab: Lab) -> list[bytes]:
    return [b"".join(partials(server, lab.identity, b"r%d" % i)) for i in range(6)]


def test_all_are_stored_once(make: Make, own_server: Redis) -> None:
    lab = make(own_server.socket)
    lab.append(b"other")  # there is an idle connection
    assert lab.driver.run(storing(lab)) == [1] * 6
    assert stored(own_server, lab) == [b"x"] * 6
    settled(lab)


def test_a_connection_that_fails_in_the_middle(make: Make, own_server: Redis, proxy: Proxy) -> None:
    lab = make(proxy.socket)
    lab.append(b"other")
    for fault in (Fault.LOST_REQUEST, Fault.LOST_REPLY):
        proxy.strike(fault)
        assert lab.driver.run(storing(lab)) == [1] * 6
    assert stored(own_server, lab) == [b"xx"] * 6
    settled(lab)


def test_an_interrupt_in_the_middle_leaves_no_answer_for_others(
    make: Make, own_server: Redis
) -> None:
    """Those that are in lanes go on in the background; the connection is given up."""
    lab = make(own_server.socket)
    lab.append(b"other")
    with pytest.raises(OddError):
        lab.driver.run(storing(lab, fails_at=4))
    assert lab.append(b"another") == 1
    with contextlib.suppress(OddError):
        lab.catch_up()
    assert stored(own_server, lab) == [b"x"] * 5 + [b""]
    settled(lab)
