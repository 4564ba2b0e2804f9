"""Signal handlers that raise, or stop the process, in the middle of any call."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from phonon import LruCache, Process
from phonon._core import engine as engine_module
from phonon._core.flows import Flow, Send, has_begun
from phonon._transport import sync_io
from phonon.batch import _BatchedEnding, end_all
from phonon.errors import ProcessStoppedError
from support import operations
from support.interrupts import at_call
from support.samples import fresh
from support.world import ALWAYS, Make, Redis, is_settled, key_of, keys_in, wait_until

PROGRAM = Path(__file__).with_name("signals_program.py")
AIO_PROGRAM = PROGRAM.with_name("aio_signals_program.py")
#: The folder of what they import from `support`.
TESTS = Path(__file__).parents[2]
#: Seconds in which no heartbeat finds what was forgotten.
NO_BEAT = 50


class TimeLimit(Exception):  # noqa: N818 - as Celery's soft time limit, an ordinary exception
    """The exception of a signal handler."""


def limit() -> None:
    raise TimeLimit


class Exit(BaseException):
    """The same, which nothing takes for an error of the user's code."""


def leave() -> None:
    raise Exit


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore exceptions in finalizers, as the interpreter does."""
    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)


def run(
    server: Redis,
    namespace: str,
    action: str,
    seed: int,
    count: int,
    kind: str,
    program: Path = PROGRAM,
) -> dict[str, Any]:
    """Run the program; nothing that was acknowledged is lost, nothing comes twice or stays."""
    command = [
        sys.executable,
        str(program),
        action,
        server.url,
        namespace,
        str(seed),
        str(count),
        kind,
    ]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-8000:]
    told: dict[str, Any] = json.loads(ended.stdout)
    wrong = {
        record: (told["acknowledged"].get(record, 0), told["found"].get(record, 0), tried)
        for record, tried in told["tried"].items()
        if not told["acknowledged"].get(record, 0) <= told["found"].get(record, 0) <= tried
    }
    assert not wrong, ended.stderr[-8000:]
    assert told["came"] >= count
    assert sum(told["acknowledged"].values()) > count / 10
    assert keys_in(server, namespace) == set()
    listing = f"{{{namespace}}}:processes"
    with server.client() as client:
        if client.zcard(listing):
            # Of thousands of stops one may leave its listing, and nothing else, to others.
            with Process(url=server.url, namespace=namespace):
                wait_until(lambda: client.zcard(listing) == 1, 120)
        assert client.zcard(listing) == 0
    return told


#: With PHONON_TEST_SIGNALS=1 there are 10,000 interrupts and 1,000 stops, else a tenth of that.
TIMES = 10 if os.environ.get("PHONON_TEST_SIGNALS") else 1


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.leaves_connections
@pytest.mark.parametrize("kind", ["exit", "limit"])
def test_thousands_of_interrupts(server: Redis, namespace: str, kind: str) -> None:
    """Half of them with KeyboardInterrupt, half with an ordinary exception."""
    told = run(server, namespace, "interrupt", 11, 500 * TIMES, kind)
    # At the very entry of `release` nothing of it has begun; a block leaves nothing.
    assert {name for name, times in told["held"].items() if times} <= {"acquire"}


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.leaves_connections
def test_hundreds_of_stops(server: Redis, namespace: str) -> None:
    """As SIGTERM does it: in the middle of a call, a batch, an execution, or of another stop."""
    run(server, namespace, "stop", 11, 100 * TIMES, "exit")


# With an event loop


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.leaves_connections
@pytest.mark.parametrize("kind", ["cancel", "sigint"])
def test_thousands_of_cancelled_awaits(server: Redis, namespace: str, kind: str) -> None:
    """By a handler of the loop's that cancels a task, and by SIGINT as `asyncio.run` takes it."""
    run(server, namespace, "cancel", 11, 500 * TIMES, kind, AIO_PROGRAM)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.leaves_connections
def test_hundreds_of_stops_in_an_event_loop(server: Redis, namespace: str) -> None:
    run(server, namespace, "stop", 11, 100 * TIMES, "stop", AIO_PROGRAM)


@pytest.mark.slow
@pytest.mark.timeout(200 * TIMES)
@pytest.mark.leaves_connections
@pytest.mark.parametrize("kind", ["exit", "limit"])
def test_an_interrupt_in_the_event_loop_itself(server: Redis, namespace: str, kind: str) -> None:
    """It may end the loop, or leave it waiting for ever; what was acknowledged is executed."""
    run(server, namespace, "raise", 11, 50 * TIMES, kind, AIO_PROGRAM)


# Locks


def test_an_interrupt_in_the_middle_of_a_lock_leaves_it_free(make: Make) -> None:
    """A caller that gets the exception does not hold the lock, and cannot release it."""
    process, other = make(heartbeat_interval=NO_BEAT), make()
    entries: list[int] = []
    for reentrant in (False, True):
        lock = process.lock("lock", reentrant=reentrant)

        def work() -> None:
            if lock.acquire():  # noqa: B023 - it is called in this round
                lock.release()  # noqa: B023 - it is called in this round

        for number in itertools.count(1):
            try:
                if not at_call(number, work, limit):
                    break
            except TimeLimit:
                pass
            # At the very entry of release() nothing of it has begun.
            if lock.owned():
                lock.release()
            theirs = other.lock("lock", timeout=20)
            assert theirs.acquire(), number
            theirs.release()
        entries.append(number)
    assert min(entries) > 25


@pytest.mark.parametrize("kind", ["lock", "semaphore"])
def test_an_interrupt_anywhere_in_a_lock_s_block_leaves_it_free(make: Make, kind: str) -> None:
    """Also at the very entry of its end, of which nothing runs then."""
    process, other = make(heartbeat_interval=NO_BEAT), make()

    def made(owner: Process, **options: Any) -> Any:
        return owner.semaphore(kind, 1, **options) if kind == "semaphore" else owner.lock(kind)

    lock = made(process)
    caught = None

    def work() -> None:
        with lock:
            pass

    for number in itertools.count(1):
        try:
            if not at_call(number, work, limit):
                break
        except TimeLimit as error:
            caught = error  # with the frames that it has gone through
        assert not lock.owned(), number
        theirs = made(other, timeout=20)
        assert theirs.acquire(), number
        theirs.release()
    assert caught is not None
    assert number > 25


def test_an_interrupt_anywhere_in_a_batch_ends_it(make: Make, server: Redis) -> None:
    """Or what comes later would be collected in it, acknowledged, and stored nowhere."""
    process = make(heartbeat_interval=NO_BEAT, retry=ALWAYS)
    kind = fresh()
    problems = []

    def work(record: str) -> None:
        with process.batch(), process.batch():
            kind(process, record, doc={"n": 1})

    for number in itertools.count(1):
        try:
            if not at_call(number, partial(work, "broken off"), limit):
                break
        except TimeLimit as error:
            problems.append(error)  # with the frames that it has gone through
        work(f"acknowledged-{number}")
        assert f"partials:test.test.acknowledged-{number}" in keys_in(server, process.namespace)
    assert number > 25
    process.stop()
    docs = kind.docs()
    assert docs.pop("broken off")["n"] <= number
    assert docs == {f"acknowledged-{n}": {"n": 1} for n in range(1, number)}


@pytest.mark.parametrize("how", ["flush", "batch", "ends"])
def test_an_interrupt_anywhere_loses_no_data_that_was_kept(make: Make, how: str) -> None:
    """Because it could not be sent before; or in an update whose session ends."""
    process = make(heartbeat_interval=NO_BEAT)
    engine = process.engine
    kind = fresh()

    def in_a_batch() -> None:
        with process.batch():
            kind(process, "other", doc={"n": 1})

    for number in itertools.count(1):
        names = [f"{number}-{i}" for i in range(3)]
        updates = [kind(process, name, doc={"n": 1}, init_cache=False) for name in names]
        ends = [
            _BatchedEnding(each, partial(engine.outbox.unsent.append, each)) for each in updates
        ]
        flow = end_all(engine, ends)
        if how != "ends":
            engine.outbox.unsent += updates
        works: dict[str, Callable[[], object]] = {
            "flush": process.flush,
            "batch": in_a_batch,
            "ends": partial(engine.run, flow),
        }
        try:
            if not at_call(number, works[how], leave):
                break
        except Exit:
            pass
        process.flush()
        for update in updates if how == "ends" and not has_begun(flow) else ():
            update.end_session()
    assert number > 25
    process.stop()
    # A batch whose execution was interrupted is executed again, under its token.
    written = {(each.record, each.token): each.doc for each in kind.written}
    found = sorted((record, doc["n"]) for (record, _), doc in written.items() if record != "other")
    assert found == sorted((f"{n}-{i}", 1) for n in range(1, number + 1) for i in range(3))


@pytest.mark.parametrize("fails", [False, True])
def test_a_callback_is_called_once_whatever_is_interrupted(make: Make, *, fails: bool) -> None:
    """Also if the interrupt comes between its end and the note of that."""
    process = make(heartbeat_interval=NO_BEAT)
    called: list[int] = []

    def callback() -> None:
        called.append(number)
        if fails:
            raise ValueError(number)

    struck = [0]
    for number in itertools.count(1):
        reference = process.create_reference(f"resource-{number}")

        def strike() -> None:
            struck.append(number)  # noqa: B023 - called in this round
            raise TimeLimit

        with contextlib.suppress(TimeLimit, ValueError):
            at_call(number, partial(reference.dereference, callback), strike)
        wait_until(lambda: is_settled(process))
        assert called.count(number) <= 1
        if struck[-1] != number:
            break
    assert number > 25
    assert called[-1] == number


def test_an_exit_stack_ends_locks_and_batches(make: Make) -> None:
    """It looks their end up in the class."""
    process = make()
    kind = fresh()
    lock = process.lock("lock")
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock)
            stack.enter_context(process.batch())
            stack.enter_context(process.batch())
            kind(process, "record", doc={"n": 1})
            assert process.engine.batch is not None
        assert process.engine.batch is None
        assert not lock.owned()
        with process.batch(), lock:
            kind(process, "record", doc={"n": 1})
    process.stop()
    assert kind.docs() == {"record": {"n": 4}}


def test_an_interrupt_in_the_middle_of_a_lock_taken_again_leaves_the_first(make: Make) -> None:
    process, other = make(heartbeat_interval=NO_BEAT), make()
    lock = process.lock("lock", reentrant=True)

    def work() -> None:
        with lock:
            pass

    for number in itertools.count(1):
        with lock:
            try:
                if not at_call(number, work, limit):
                    break
            except TimeLimit:
                pass
            process.engine.leases.settle()
            assert lock.owned(), number
            assert not other.lock("lock", block=False).acquire(), number
        while lock.owned():  # at the very entry of __exit__
            lock.release()
        theirs = other.lock("lock", timeout=20)
        assert theirs.acquire(), number
        theirs.release()
    assert number > 8


def test_an_interrupt_in_the_middle_of_a_callback_s_lock_leaves_it_free(make: Make) -> None:
    process, other = make(heartbeat_interval=NO_BEAT), make()
    for number in itertools.count(1):
        reference = process.create_reference("resource")
        try:
            if not at_call(number, lambda: reference.dereference(lambda: None), limit):  # noqa: B023 - called in this round
                break
        except TimeLimit:
            pass
        theirs = other.lock("resource", timeout=20)
        assert theirs.acquire(), number
        theirs.release()
    assert number > 30


@pytest.mark.parametrize("block", [True, False])
def test_a_stop_in_the_middle_of_a_lock_leaves_it_free(make: Make, block: bool) -> None:
    """A lock that is granted while the process stops is nobody's."""
    other = make()
    for number in itertools.count(1):
        process = make(heartbeat_interval=NO_BEAT)
        lock = process.lock("lock", block=block)
        came = False
        try:
            came = at_call(number, lock.acquire, process.stop)
        except ProcessStoppedError:
            came = True
        if not came:
            break
        assert not lock.owned(), number
        theirs = other.lock("lock", block=False)
        assert theirs.acquire(), number
        theirs.release()
    assert number > 15


@pytest.mark.parametrize("waits_for", ["lock", "parties"])
def test_a_stop_in_a_wait_does_not_wait_for_itself(
    make: Make, server: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch, waits_for: str
) -> None:
    monkeypatch.setattr(engine_module, "_DISMISSAL", 1000.0)
    process, other = make(), make()
    with other.lock("resource") as held:
        reference = process.create_reference("resource", parties=3)
        wait = process.lock("resource").acquire if waits_for == "lock" else reference.wait

        def signal_it() -> None:
            wait_until(lambda: process.engine.identity.waiters)
            os.kill(os.getpid(), signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, lambda *_: process.stop())
        try:
            with ThreadPoolExecutor(1) as pool, pytest.raises(ProcessStoppedError):
                pool.submit(signal_it)
                wait()
                raise ProcessStoppedError  # reference.wait() says that they have not come
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert not held.waiters()
    with server.client() as client:
        parties = client.hgetall(key_of(namespace, "parties", "resource"))
    assert not [field for field in parties if field.startswith(b">")], "the waiters"


# Stopping


def test_a_worker_that_waits_for_a_lane_of_the_stopped_frame_is_sent_for(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler stops the process while its own frame leads a lane that a worker needs."""
    process = make(retry_timeout=1000)  # after which the worker would give up
    process.lock("lock").locked()
    engine = process.engine
    partition, name = engine.members.place("resource")
    lane = engine.identity.lanes[partition]
    exchange_now = sync_io.exchange_now

    def work() -> Flow[None]:
        yield Send((operations.join(partition, name),))

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(sync_io, "exchange_now", exchange_now)
        engine._ensure("sessions", work, replace=True)
        wait_until(lambda: lane.queue)
        process.stop()
        return None

    monkeypatch.setattr(sync_io, "exchange_now", interrupted)
    with pytest.raises(ProcessStoppedError):
        process.create_reference("resource")
        raise ProcessStoppedError  # it may have been answered in time
    assert not any(worker.is_alive() for worker in engine._workers.values())


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_an_interrupt_has_left_is_executed_by_stop(
    make: Make, server: Redis, namespace: str
) -> None:
    """Not by survivors, half a minute later: also what nothing here knows of any more."""
    kind = fresh()

    def work(process: Process) -> Callable[[], None]:
        update = kind(process, "record", doc={"n": 1})
        return update.end_session

    for number in itertools.count(1, 3):
        process = make(heartbeat_interval=NO_BEAT, retry=ALWAYS)
        came = True
        with contextlib.suppress(TimeLimit):
            came = at_call(number, work(process), limit)
        process.stop()
        assert keys_in(server, namespace) == set(), number
        assert {entry.record for entry in kind.written} == {"record"}, number
        kind.written.clear()
        if not came:
            break
    assert number > 50


def test_nothing_is_expected_behind_an_interrupt(make: Make) -> None:
    """A resource of which a batch is expected for ever would never be executed again."""
    process = make(heartbeat_interval=NO_BEAT, retry=ALWAYS)
    kind = fresh()

    def interrupted(number: int) -> bool:
        update = kind(process, "record", doc={"n": 1})
        try:
            return at_call(number, update.end_session, limit)
        except TimeLimit:
            return True

    for number in itertools.count(1):
        if not interrupted(number):
            break
        # A call that goes on in the background expects an answer; one that has ended does not.
        wait_until(lambda: not process.engine.executor.expects(b"test.test.record"))
    assert number > 30
    process.flush()


def test_a_stop_in_a_frame_that_holds_a_lock_which_a_worker_wants(make: Make) -> None:
    """The worker that ends sessions wants the cache's lock, and stop() waits for the worker."""
    process = make()
    kind = fresh()
    cache: LruCache[Any] = LruCache()
    cache.set("first", kind(process, "first", doc={"n": 1}, soft_session=0.01))
    sessions = process.engine.sessions

    def stop() -> None:
        # The locks that `set` holds during a call.
        with cache._lock:
            waits = threading.Event()
            look = sessions._pop

            def pop(now: float) -> Any:
                due = look(now)
                if due:
                    waits.set()
                return due

            sessions._pop = pop  # type: ignore[method-assign]  # to know when it looks
            cache.set("second", kind(process, "second", doc={"n": 1}, soft_session=0.01))
            assert waits.wait(20)
            process.stop()
            assert cache._lock._is_owned()  # type: ignore[attr-defined]  # as before

    stop()
    assert set(kind.docs()) == {"first", "second"}
