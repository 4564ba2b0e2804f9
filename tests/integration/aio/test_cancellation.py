"""Calls that are cancelled, at each of the places where they wait: nothing is lost or doubled."""

import asyncio
import contextlib
import types
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any, ClassVar

import pytest

from phonon import RetryPolicy
from phonon.aio import AsyncLruCache, AsyncProcess, AsyncUpdate
from phonon.errors import AlreadyLockedError
from support.both import until

Work = Callable[[], Awaitable[Any]]


class Stepper:
    """Cancels a call at one of the places where it waits.

    Args:
        place: Which one, from 0 on.

    Attributes:
        reached: Whether the call came to that place.
    """

    def __init__(self, place: int) -> None:
        self._place = place
        self.reached = False

    @types.coroutine
    def run(self, work: Awaitable[Any]) -> Generator[Any, Any, Any]:
        """Run the call."""
        steps = work.__await__()
        place = 0
        try:
            pending = steps.send(None)
            while True:
                if place == self._place:
                    self.reached = True
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                place += 1
                try:
                    value = yield pending
                except BaseException as error:  # noqa: BLE001 - for whoever waits in there
                    pending = steps.throw(error)
                else:
                    pending = steps.send(value)
        except StopIteration as stop:
            return stop.value


async def cancelled_at(place: int, work: Awaitable[Any]) -> bool:
    """Cancel a call at a place. Returns whether it came there."""
    stepper = Stepper(place)

    async def call() -> None:
        await stepper.run(work)

    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.create_task(call())
    return stepper.reached


class Row(AsyncUpdate):
    rows: ClassVar[Counter[Any]] = Counter()
    tokens: ClassVar[set[tuple[Any, int]]] = set()

    def merge(self, other: Any) -> None:
        self.doc += other.doc

    async def execute(self) -> None:
        await asyncio.sleep(0)
        assert self.token is not None
        # As a database with the token beside the record.
        if (self._id, self.token) not in self.tokens:
            self.tokens.add((self._id, self.token))
            self.rows[self._id] += self.doc
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _empty() -> None:
    Row.rows = Counter()
    Row.tokens = set()


class Lab:
    """Processes of a test.

    Args:
        url: The server's.
        namespace: The test's.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._options: dict[str, Any] = {"url": url, "namespace": namespace}

    def make(self, heartbeat_interval: float = 0.25) -> AsyncProcess:
        """One of them. It tries failed batches again soon, and its death is noticed soon."""
        retry = RetryPolicy(first_delay=0.01, longest_delay=0.05)
        return AsyncProcess(**self._options, heartbeat_interval=heartbeat_interval, retry=retry)

    @contextlib.asynccontextmanager
    async def process(self) -> AsyncIterator[AsyncProcess]:
        """One of them, started, and stopped in the end."""
        async with self.make() as process:
            yield process

    def run(self, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a test that leaves no task behind."""

        async def checked() -> None:
            before = asyncio.all_tasks()
            async with asyncio.timeout(100):
                await test()
            assert asyncio.all_tasks() == before

        asyncio.run(checked())


@pytest.fixture(params=["server", "cluster"])
def lab(request: pytest.FixtureRequest, namespace: str) -> Lab:
    """On one server; and on a cluster, where more exchanges are needed and can be cancelled."""
    return Lab(request.getfixturevalue(request.param).url, namespace)


async def at_each_place(attempt: Callable[[int], Coroutine[Any, Any, bool]], least: int) -> None:
    """Try one place after the other, until the call ends before it comes there."""
    place = 0
    while await attempt(place):
        place += 1
    assert place >= least, "it never waits there"


def test_acquiring(lab: Lab) -> None:
    async def test() -> None:
        async with lab.process() as process, lab.process() as other:

            async def attempt(place: int) -> bool:
                lock = process.lock(f"free-{place}")
                reached = await cancelled_at(place, lock.acquire())
                if not reached:
                    await lock.release()
                async with asyncio.timeout(10), other.lock(f"free-{place}"):
                    assert not lock.owned()
                return reached

            await at_each_place(attempt, 1)

    lab.run(test)


def test_a_refusal_that_nobody_waits_for(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """It is no failure, and not logged as one."""

    async def test() -> None:
        async with lab.process() as process, lab.process() as other, other.lock("a"):

            async def enter() -> None:
                with contextlib.suppress(AlreadyLockedError):
                    async with process.lock("a", block=False):
                        pass

            async def attempt(place: int) -> bool:
                return await cancelled_at(place, enter())

            await at_each_place(attempt, 1)

    lab.run(test)
    assert "in the background" not in caplog.text


def test_waiting_for_a_lock(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with lab.process() as process, lab.process() as other:

            async def attempt(place: int) -> bool:
                held = other.lock(f"taken-{place}")
                await held.acquire()
                lock = process.lock(f"taken-{place}")
                waiting = asyncio.create_task(cancelled_at(place, lock.acquire(timeout=0.3)))
                reached = await waiting
                await until(lambda: _so_many_wait(held, 0))
                await held.release()
                async with asyncio.timeout(10), other.lock(f"taken-{place}"):
                    assert not lock.owned()
                return reached

            await at_each_place(attempt, 3)

    lab.run(test)
    assert "in the background" not in caplog.text


def test_a_waiter_that_is_cancelled_does_not_hold_up_the_next(lab: Lab) -> None:
    async def test() -> None:
        async with lab.process() as one, lab.process() as two, lab.process() as three:
            held = one.lock("a")
            await held.acquire()
            second = asyncio.create_task(two.lock("a").acquire())
            await until(held.waiters)
            third = asyncio.create_task(three.lock("a").acquire(timeout=20))
            await until(lambda: _so_many_wait(held, 2))
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            await held.release()
            async with asyncio.timeout(10):
                assert await third

    lab.run(test)


async def _so_many_wait(lock: Any, count: int) -> bool:
    return len(await lock.waiters()) == count


def test_releasing(lab: Lab) -> None:
    async def test() -> None:
        async with lab.process() as process, lab.process() as other:

            async def attempt(place: int) -> bool:
                lock = process.lock(f"held-{place}")
                await lock.acquire()
                reached = await cancelled_at(place, lock.release())
                async with asyncio.timeout(10), other.lock(f"held-{place}"):
                    assert not lock.owned()
                return reached

            await at_each_place(attempt, 1)

    lab.run(test)


def test_leaving_a_locked_block(lab: Lab) -> None:
    """A task that is cancelled in the block lets go of the lock."""

    async def test() -> None:
        async with lab.process() as process, lab.process() as other:
            inside = asyncio.Event()

            async def work() -> None:
                async with process.lock("a"):
                    inside.set()
                    await asyncio.sleep(1000)

            task = asyncio.create_task(work())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not await other.lock("a").locked()

    lab.run(test)


def test_references(lab: Lab) -> None:
    """Created or not, and let go of or not: in the end nobody holds it."""

    async def test() -> None:
        async def attempt(place: int) -> bool:
            async with lab.process() as process, lab.process() as other:
                name = f"resource-{place}"
                joined = await cancelled_at(place, process.create_reference(name))
                reference = await process.create_reference(name)
                left = await cancelled_at(place, reference.dereference())
                await process.stop()
                mine = await other.create_reference(name)
                assert await mine.count() == 1
                assert await mine.dereference()
            return joined or left

        await at_each_place(attempt, 1)

    lab.run(test)


def test_setting(lab: Lab) -> None:
    """The process has what it was given, and stores and writes it once."""

    async def test() -> None:
        async def attempt(place: int) -> bool:
            key = f"set-{place}"
            async with lab.process() as process:
                cache: AsyncLruCache[Row] = AsyncLruCache()
                await cache.set(key, Row(process, key, doc=1))
                reached = await cancelled_at(place, cache.set(key, Row(process, key, doc=10)))
                await cache.set(key, Row(process, key, doc=100))
            assert Row.rows[key] == 111
            return reached

        await at_each_place(attempt, 1)

    lab.run(test)


def test_ending_a_session(lab: Lab) -> None:
    async def test() -> None:
        async def attempt(place: int) -> bool:
            key = f"end-{place}"
            async with lab.process() as process, lab.process() as other:
                cache: AsyncLruCache[Row] = AsyncLruCache()
                await cache.set(key, Row(process, key, doc=1))
                reached = await cancelled_at(place, cache.expire(key))
                # A cancelled call is finished, while the process goes on.
                await until(lambda: Row.rows[key])
                update = Row(other, key, doc=10)
                await update.end_session()
            assert Row.rows[key] == 11
            return reached

        await at_each_place(attempt, 3)

    lab.run(test)


def test_what_was_cut_off_does_not_wait_for_the_heartbeat(lab: Lab) -> None:
    async def test() -> None:
        async def attempt(place: int) -> bool:
            key = f"soon-{place}"
            async with lab.make(heartbeat_interval=50) as process:
                update = Row(process, key, doc=1)
                reached = await cancelled_at(place, update.end_session())
                if reached:
                    await until(lambda: Row.rows[key])
            assert Row.rows[key] == 1
            return reached

        await at_each_place(attempt, 2)

    lab.run(test)


def test_many_at_once(lab: Lab) -> None:
    async def test() -> None:
        async def attempt(place: int) -> bool:
            async with lab.process() as process:
                cache: AsyncLruCache[Row] = AsyncLruCache()
                keys = [f"many-{place}-{i}" for i in range(5)]

                async def work() -> None:
                    async with process.batch():
                        for key in keys:
                            await cache.set(key, Row(process, key, doc=1))
                    await cache.expire_all()

                reached = await cancelled_at(place, work())
            assert [Row.rows[key] for key in keys] == [1] * 5
            return reached

        await at_each_place(attempt, 4)

    lab.run(test)


def test_timeouts_of_asyncio(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with lab.process() as process, lab.process() as other, process.lock("a"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await other.lock("a").acquire()
            await until(lambda: _so_many_wait(other.lock("a"), 0))
            with pytest.raises(AlreadyLockedError):
                async with other.lock("a", block=False):
                    pass

    lab.run(test)
    assert "in the background" not in caplog.text


def test_stopping(lab: Lab) -> None:
    """Others do the work that was left undone."""

    async def test() -> None:
        async def attempt(place: int) -> bool:
            key = f"stop-{place}"
            async with lab.process() as other:
                process = await lab.make().start()
                cache: AsyncLruCache[Row] = AsyncLruCache()
                await cache.set(key, Row(process, key, doc=1))
                reached = await cancelled_at(place, process.stop())
                await process.stop()
                await Row(other, key, doc=10).end_session()
                await until(lambda: Row.rows[key] == 11)
            return reached

        await at_each_place(attempt, 3)

    lab.run(test)
