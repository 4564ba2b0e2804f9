"""A program with an event loop whose signal handler breaks off any await; as signals_program.py.

A handler of the loop's cancels the task (``cancel``) or stops the process (``stop``), and SIGINT
cancels it as `asyncio.Runner` does it (``sigint``). What a handler of `signal.signal` raises
(``raise``) may end the event loop itself: then it goes on with a new process in a new loop.
"""

import asyncio
import contextlib
import faulthandler
import math
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from phonon import Model, PhononError
from phonon.aio import AsyncAdmin, AsyncConflictFreeUpdate, AsyncLruCache, AsyncProcess
from phonon.fields import ID, Sum
from support.interrupted import HANG, LATEST, SOON, SOONEST, TimeLimit, main, told

#: Seconds after which an event loop that an exception has gone through is given up.
GIVE_UP = 1

Call = Callable[[], Awaitable[Any]]


class Tally(AsyncConflictFreeUpdate, name="interrupted tally of tasks"):
    """Its database knows a batch that it has had by its token."""

    written: ClassVar[dict[tuple[Any, int], int]] = {}

    async def execute(self) -> None:
        assert self.token is not None
        await asyncio.sleep(0)
        self.written[self._id, self.token] = self.doc["n"]


class Views(Model, name="interrupted views of tasks"):
    """The same as a model."""

    user: ID[str]
    n: Sum[int] = Sum()

    async def on_complete(self) -> None:
        assert self.token is not None
        Tally.written[self.user, self.token] = self.n


class World:
    """What is done with a process; it counts what was tried, and what was acknowledged."""

    def __init__(self, process: AsyncProcess, chance: random.Random, most: float = 1) -> None:
        self.process = process
        self.chance = chance
        self.most = most  # members, if processes whose loops are gone count for a while
        self.cache: AsyncLruCache[Tally] = AsyncLruCache(max_entries=3)
        self.views = process.collect(Views, max_entries=3)
        self.lock = process.lock("lock", timeout=1)
        self.another = process.lock("another", timeout=1)
        self.semaphore = process.semaphore("semaphore", 2, timeout=1)
        self.admin = AsyncAdmin(client=process.client, namespace=process.namespace)
        self.tried: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()
        self.calls: list[Call] = [
            self.count,
            self.modify,
            self.refer,
            self.store,
            self.keep,
            self.collect,
            self.gather,
            self.add,
            self.add_many,
            self.end,
            self.take,
            self.acquire,
            self.take_place,
            self.contend,
            self.look,
            self.administrate,
            self.process.flush,
        ]

    async def count(self) -> None:
        reference = await self.process.create_reference("resource")
        assert await reference.count() <= self.most

    async def modify(self) -> None:
        reference = await self.process.create_reference("resource")
        self.tried["modified"] += 1
        await reference.increment_times_modified()
        self.acknowledged["modified"] += 1

    async def refer(self) -> None:
        reference = await self.process.create_reference("another resource")
        called: list[bool] = []
        if await reference.dereference(lambda: called.append(True)):
            assert called == [True]

    async def store(self) -> None:
        record = f"record-{self.chance.randrange(4)}"
        self.tried[record] += 1
        await self.cache.set(record, Tally(self.process, record, doc={"n": 1}))
        self.acknowledged[record] += 1

    async def keep(self) -> None:
        self.tried["kept"] += 1
        await Tally(self.process, "kept", doc={"n": 1}, init_cache=False).end_session()
        self.acknowledged["kept"] += 1

    async def collect(self) -> None:
        self.tried["collected"] += 3
        async with self.process.batch():
            for _ in range(3):
                await self.cache.set("collected", Tally(self.process, "collected", doc={"n": 1}))
        self.acknowledged["collected"] += 3

    async def gather(self) -> None:
        """Several tasks of one call: each is cancelled with it."""
        async with asyncio.TaskGroup() as group:
            for call in (self.store, self.store, self.keep, self.count):
                group.create_task(call())

    async def add(self) -> None:
        user = f"user-{self.chance.randrange(4)}"
        self.tried[user] += 1
        await self.views.add(user, n=1)
        self.acknowledged[user] += 1

    async def add_many(self) -> None:
        self.tried["many"] += 3
        assert not await self.views.add_many([{"user": "many", "n": 1}] * 3)
        self.acknowledged["many"] += 3

    async def end(self) -> None:
        await self.cache.expire_all()
        await self.views.expire_all()

    async def take(self) -> None:
        async with self.another:
            await asyncio.sleep(0)

    async def acquire(self) -> None:
        if await self.lock.acquire():
            try:
                await asyncio.sleep(0)
            finally:
                await self.lock.release()

    async def take_place(self) -> None:
        async with self.semaphore:
            pass

    async def contend(self) -> None:
        """Two tasks that want one lock: one of them waits."""

        async def hold() -> None:
            async with self.process.lock("wanted"):
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            group.create_task(hold())
            group.create_task(hold())

    async def look(self) -> None:
        await self.process.get_registry()
        await self.lock.locked()
        assert await self.process.parked() == []

    async def administrate(self) -> None:
        async with AsyncAdmin(
            client=self.process.client, namespace=self.process.namespace
        ) as admin:
            await admin.processes()
            async for _ in admin.sessions():
                pass


def watch() -> None:
    """End the program, and show where all threads are, if the next step takes too long."""
    faulthandler.dump_traceback_later(HANG, exit=True)


async def free(process: AsyncProcess) -> None:
    """Show that all locks are free for others, while the process lives."""
    async with AsyncProcess(client=process.client, namespace=process.namespace) as other:
        for lock in (
            other.lock("lock", timeout=HANG / 2),
            other.lock("another", timeout=HANG / 2),
            other.lock("wanted", timeout=HANG / 2),
            other.semaphore("semaphore", 2, timeout=HANG / 2),
            other.semaphore("semaphore", 2, timeout=HANG / 2),
        ):
            assert await lock.acquire(), (lock, await lock.holders())


async def until(left: Call) -> None:
    """Wait until nothing is left."""
    while await left():  # noqa: ASYNC110 - other processes, by their heartbeats
        await asyncio.sleep(0.01)


async def others(process: AsyncProcess) -> int:
    return int(await process.client.zcard(process.heartbeat_hash_name)) - 1


async def members(process: AsyncProcess) -> list[bytes]:
    keys = process.client.scan_iter(f"{{{process.namespace}/*", count=1000)
    return [key async for key in keys if b"}:members:" in key]


async def modified(process: AsyncProcess) -> int:
    reference = await process.create_reference("resource")
    return (await reference.modified_by()).get(process.id, 0)


class Breaker:
    """Breaks calls off by a timer."""

    def __init__(self, kind: str, chance: random.Random) -> None:
        self.kind = kind
        self.chance = chance
        self.came = 0
        if kind == "sigint":
            signal.signal(signal.SIGALRM, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        self.came += 1
        signal.raise_signal(signal.SIGINT)

    async def around(self, call: Call, then: Callable[[], object]) -> None:
        """Await something, and let a handler of the loop's come in between."""

        def handle() -> None:
            self.came += 1
            then()

        loop = asyncio.get_running_loop()
        if self.kind != "sigint":
            loop.add_signal_handler(signal.SIGALRM, handle)
        # A call that is being cancelled may be cancelled again.
        again = self.chance.choice((0.0, 0.0, 0.0003)) if self.kind == "cancel" else 0.0
        signal.setitimer(signal.ITIMER_REAL, self.chance.uniform(SOONEST, LATEST), again)
        try:
            await call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self.kind != "sigint":
                loop.remove_signal_handler(signal.SIGALRM)
                signal.signal(signal.SIGALRM, signal.SIG_IGN)


def cancel(url: str, namespace: str, seed: int, count: int, kind: str) -> dict[str, Any]:
    """Cancel so many calls: by a handler of the loop's, or by SIGINT."""
    chance = random.Random(seed)  # noqa: S311 - a test's schedule
    breaker = Breaker(kind, chance)

    async def undisturbed(call: Call) -> None:
        await call()

    async def one(call: Call) -> None:
        task = asyncio.ensure_future(call())
        current = asyncio.current_task()
        assert current is not None
        target = task if kind == "cancel" else current
        await breaker.around(lambda: task, target.cancel)

    with asyncio.Runner() as runner:
        process = AsyncProcess(url=url, namespace=namespace, retry=SOON, heartbeat_interval=0.5)
        runner.run(process.start())
        world = World(process, chance)
        while breaker.came < count:
            call = chance.choice(world.calls)
            watch()
            try:
                # On a busy machine the timer is always sooner than the call: one without it.
                runner.run(undisturbed(chance.choice(world.calls)))
                runner.run(one(call))
            except (asyncio.CancelledError, KeyboardInterrupt, PhononError, ExceptionGroup):
                continue
            except RuntimeError as error:
                # A signal behind the end of one run leaves asyncio's loop stopped for the next one.
                if "Event loop stopped before" not in str(error):
                    raise
        watch()
        runner.run(free(process))
        found = runner.run(modified(process))
        watch()
        runner.run(process.stop())
    return told(world.tried, world.acknowledged, Tally.written, found) | {"came": breaker.came}


def stop(url: str, namespace: str, seed: int, count: int, kind: str) -> dict[str, Any]:
    """Stop so many processes by a handler of the loop's, in the middle of anything."""
    chance = random.Random(seed)  # noqa: S311 - a test's schedule
    breaker = Breaker(kind, chance)
    tried: Counter[str] = Counter()
    acknowledged: Counter[str] = Counter()

    async def one() -> None:
        process = await AsyncProcess(url=url, namespace=namespace).start()
        world = World(process, chance)
        stopping: list[asyncio.Task[None]] = []
        await world.collect()  # without the timer, which may always be sooner than a call

        def end() -> None:
            stopping.append(asyncio.ensure_future(process.stop()))

        while not stopping:
            with contextlib.suppress(PhononError, ExceptionGroup):
                await breaker.around(chance.choice([*world.calls, process.stop]), end)
            if process.engine.stopped:
                break
        await asyncio.gather(*stopping)
        await process.stop()
        tried.update(world.tried)
        acknowledged.update(world.acknowledged)

    for _number in range(count):
        watch()
        asyncio.run(one())
    for counts in (tried, acknowledged):
        del counts["modified"]
    return told(tried, acknowledged, Tally.written) | {"came": breaker.came}


async def finish(options: dict[str, Any]) -> None:
    """Take over what broken loops have left."""
    async with AsyncProcess(**options) as last:
        await until(lambda: others(last))
        await free(last)
        await until(lambda: members(last))


class Striker:
    """Raises out of a handler of `signal.signal`, wherever the event loop is."""

    def __init__(self, error: type[BaseException], chance: random.Random) -> None:
        self.error = error
        self.chance = chance
        self.came = 0
        self._is_on = False
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, *_: object) -> None:
        if self._is_on:
            self.came += 1
            raise self.error

    def limit(self, seconds: float) -> None:
        """Raise then, and again later: what was to wake a task may be what the first has hit."""
        self._is_on = True
        signal.setitimer(signal.ITIMER_REAL, seconds, 2 * GIVE_UP)

    async def around(self, call: Call) -> None:
        self.limit(self.chance.uniform(SOONEST, LATEST))
        async with asyncio.timeout(GIVE_UP):
            await call()

    def end(self) -> None:
        self._is_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def strike(url: str, namespace: str, seed: int, count: int, kind: str) -> dict[str, Any]:
    """Raise so often, in the event loop's own code too; go on in a new loop where that ends one."""
    error: type[BaseException] = {"exit": KeyboardInterrupt, "limit": TimeLimit}[kind]
    chance = random.Random(seed)  # noqa: S311 - a test's schedule
    striker = Striker(error, chance)
    # The last one is asyncio's: "Event loop stopped before Future completed."
    broken = (error, TimeoutError, asyncio.CancelledError, RuntimeError)
    expected = (*broken, PhononError, BaseExceptionGroup)
    options: dict[str, Any] = {"url": url, "namespace": namespace, "heartbeat_interval": 0.1}
    tried: Counter[str] = Counter()
    acknowledged: Counter[str] = Counter()
    loops = 0

    async def still_works(process: AsyncProcess) -> None:
        async with asyncio.timeout(GIVE_UP):
            async with process.lock("lock"):
                await process.get_registry()

    def use(runner: asyncio.Runner) -> None:
        process = AsyncProcess(retry=SOON, retry_timeout=GIVE_UP / 2, **options)
        runner.run(process.start())
        world = World(process, chance, most=math.inf)
        try:
            while striker.came < count:
                watch()
                with contextlib.suppress(*expected):
                    runner.run(striker.around(chance.choice(world.calls)))
                striker.end()
                runner.run(still_works(process))
                runner.run(world.collect())
            striker.limit(2 * GIVE_UP)
            runner.run(process.stop())
        finally:
            striker.end()
            tried.update(world.tried)
            acknowledged.update(world.acknowledged)

    while striker.came < count:
        loops += 1
        watch()
        runner = asyncio.Runner()
        with contextlib.suppress(*expected):
            use(runner)
        # asyncio waits for ever for a task whose wake-up was hit: the loop is left as it is.
        with contextlib.suppress(*expected):
            striker.limit(2 * GIVE_UP)
            runner.close()
        striker.end()
    watch()
    asyncio.run(finish(options))
    for counts in (tried, acknowledged):
        del counts["modified"]
    return told(tried, acknowledged, Tally.written) | {"came": striker.came, "loops": loops}


if __name__ == "__main__":
    main({"cancel": cancel, "stop": stop, "raise": strike})
