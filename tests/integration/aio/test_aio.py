"""Programs with event loops: beside others, several in one, forked, overloaded and cut off."""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import threading
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as aioredis
import uvloop

from phonon import Lock, LruCache, Process, Reference, RetryPolicy, Update
from phonon._core.executor import TOKENS
from phonon.aio import AsyncConflictFreeUpdate, AsyncLruCache, AsyncProcess, AsyncUpdate
from phonon.errors import (
    BacklogFullError,
    ConfigurationError,
    ForkedError,
    ServerUnreachableError,
    UnknownClassError,
)
from phonon.lock import Semaphore
from support.async_member import AsyncEntry, AsyncMember
from support.both import APIS, Api, until
from support.member import BEAT, Crew, Member
from support.nodes import Cluster, Watched
from support.world import ALWAYS, Make, Redis, is_settled, key_for, wait_until

LOOPS = APIS[1:]
ASYNCIO = APIS[1]

AsyncMake = Callable[..., AsyncProcess]


@pytest.fixture(params=LOOPS, ids=lambda api: api.name)
def api(request: pytest.FixtureRequest) -> Api:
    found: Api = request.param
    return found


@pytest.fixture
def make_async(server: Redis, namespace: str) -> AsyncMake:
    """Makes processes of an event loop, to be entered."""

    def make_process(**options: Any) -> AsyncProcess:
        if not {"url", "client"} & options.keys():
            options["url"] = server.url
        return AsyncProcess(**{"namespace": namespace, **options})

    return make_process


@pytest.fixture
def crew(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(server.url, namespace, tmp_path) as crew:
        yield crew


Members = Callable[[], AsyncMember]


@pytest.fixture
def member(crew: Crew) -> Iterator[Members]:
    """Starts programs with an event loop, and kills those that are left."""
    with contextlib.ExitStack() as stack:

        def start() -> AsyncMember:
            made = AsyncMember(crew.journal, crew.defaults)
            stack.callback(made.close)
            return made

        yield start


class Database:
    """Where `Row` writes to, which may be down or busy.

    Attributes:
        rows: What has been written.
        tokens: The tokens of that, by record, in order.
        up: Whether it works.
        gate: What it waits for with each write.
        running: How many write.
        most: How many have done so at once.
    """

    def __init__(self) -> None:
        self.rows: Counter[Any] = Counter()
        self.tokens: dict[Any, list[int]] = {}
        self.up = True
        self.gate: asyncio.Semaphore | None = None
        self.running: Counter[Any] = Counter()
        self.most = 0

    async def write(self, record: Any, n: int, token: int) -> None:
        self.running[record] += 1
        self.most = max(self.most, self.running.total())
        try:
            assert self.running[record] == 1, "two batches of a resource at once"
            if self.gate is not None:
                await self.gate.acquire()
            await asyncio.sleep(0)
            if not self.up:
                raise OSError("the database is down")
            self.rows[record] += n
            self.tokens.setdefault(record, []).append(token)
        finally:
            self.running[record] -= 1


class Row(AsyncUpdate):
    store = Database()

    def merge(self, other: Any) -> None:
        self.doc += other.doc

    async def execute(self) -> None:
        assert self.token is not None
        await self.store.write(self._id, self.doc, self.token)


@pytest.fixture
def database() -> Database:
    Row.store = Database()
    return Row.store


# Beside programs without an event loop


def test_references_are_counted_in_both_apis(api: Api, make: Make, make_async: AsyncMake) -> None:
    process = make()

    async def test() -> None:
        async with make_async() as other:
            here, there = process.create_reference("a"), await other.create_reference("a")
            assert (here.count(), await there.count()) == (2, 2)
            await there.increment_times_modified()
            here.increment_times_modified()
            assert here.modified_by() == {process.id: 1, other.id: 1}
            assert not here.dereference()
            assert await there.dereference()

    api.run(test)


def test_threads_and_tasks_wake_each_other(api: Api, make: Make, make_async: AsyncMake) -> None:
    process = make()

    async def test() -> None:
        async with make_async() as other:
            for _ in range(3):
                of_thread, of_task = process.lock("a"), other.lock("a")
                assert await of_task.acquire()
                waiting = asyncio.create_task(asyncio.to_thread(of_thread.acquire, timeout=50))
                await until(of_task.waiters)
                await of_task.release()
                async with asyncio.timeout(10):
                    assert await waiting
                assert not await of_task.acquire(block=False)
                waiting = asyncio.create_task(of_task.acquire(timeout=50))
                await until(of_thread.waiters)
                of_thread.release()
                async with asyncio.timeout(10):
                    assert await waiting
                await of_task.release()

    api.run(test)


def occupy(member: Member, crew: Crew) -> None:
    """Have it store this and that, and execute something that does not end."""
    for record in ("a", "b", "a", "hang-c"):
        member.do("put", record)
    member.begin("end", "hang-c")
    wait_until(lambda: crew.journal.begun("hang-c"))


def test_a_killed_program_is_inherited_by_another(
    api: Api, crew: Crew, member: Members, make_async: AsyncMake
) -> None:
    """Survivors take over its stored data, its running batches, and its locks."""
    doomed = member()
    doomed.do("acquire", "x")
    occupy(doomed, crew)

    async def test() -> None:
        async with make_async(heartbeat_interval=BEAT) as process:
            running = key_for(process, "running", "test.test.hang-c")
            token = int(await process.client.hget(running, "token"))
            waiting = asyncio.create_task(process.lock("x").acquire(timeout=50))
            doomed.kill()
            crew.journal.open("hang-c")
            await until(lambda: len(crew.journal.lines()) == 3)
            assert await waiting
            assert crew.journal.applied() == {"a": {"n": 2}, "b": {"n": 1}, "hang-c": {"n": 1}}
            assert {line.process for line in crew.journal.lines()} == {process.id}
            assert crew.journal.lines("hang-c")[0].token == token * TOKENS, "the same as before"

    api.run(test)


def test_a_killed_program_without_an_event_loop_is_inherited(
    api: Api, crew: Crew, make_async: AsyncMake
) -> None:
    """Ordinary classes are executed too, if they are imported: in threads."""
    doomed = crew.member()
    occupy(doomed, crew)

    async def test() -> None:
        async with make_async(heartbeat_interval=BEAT) as process:
            (crew.journal.folder / "begun-hang-c").unlink()
            doomed.kill()
            # The event loop goes on while an ordinary execute hangs.
            await until(lambda: crew.journal.begun("hang-c"))
            assert await (await process.create_reference("x")).count() == 1
            assert crew.journal.lines("hang-c") == []
            crew.journal.open("hang-c")
            await until(lambda: len(crew.journal.lines()) == 3)
            assert crew.journal.applied() == {"a": {"n": 2}, "b": {"n": 1}, "hang-c": {"n": 1}}
            assert {line.process for line in crew.journal.lines()} == {process.id}

    api.run(test)


def heirs(process: Process) -> list[bytes]:
    """The classes that batches are left to."""
    names: set[bytes] = set()
    for prefix in process.engine.identity.partitions.prefixes:
        names |= process.client.smembers(prefix + b"handed")
    return sorted(names)


#: What a process without an event loop logs, once.
LEFT = "batches of support.async_member.AsyncEntry are left to an AsyncProcess that has imported it"


def said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """How often something was logged."""
    return sum(text in record.message for record in caplog.records)


def test_who_has_no_event_loop_leaves_a_dead_ones_batches(
    crew: Crew, member: Members, make_async: AsyncMake, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Exception] = []
    doomed, survivor = member(), crew.process(on_error=told.append)
    for i in range(5):
        doomed.do("put", f"r{i}", i + 1)
    with caplog.at_level(logging.WARNING, "phonon"):
        doomed.kill()
        wait_until(lambda: heirs(survivor) == [b"class:support.async_member.AsyncEntry"])
        wait_until(lambda: not survivor.get_registry())
        wait_until(lambda: told and said(caplog, LEFT))
    assert said(caplog, LEFT) == 1, "once, not for each of them"
    assert [type(error) for error in told] == [UnknownClassError]
    assert "run an AsyncProcess that imports it" in str(told[0])
    assert crew.journal.lines() == []
    assert survivor.parked() == []

    async def later() -> None:
        async with make_async(heartbeat_interval=BEAT) as process:
            await until(lambda: len(crew.journal.lines()) == 5)
            assert {line.process for line in crew.journal.lines()} == {process.id}
            assert crew.journal.applied() == {f"r{i}": {"n": i + 1} for i in range(5)}
            await until(lambda: not heirs(survivor))

    ASYNCIO.run(later)


def test_who_has_no_event_loop_is_the_last_one_out(
    crew: Crew, make_async: AsyncMake, caplog: pytest.LogCaptureFixture
) -> None:
    last = crew.process()

    async def test() -> None:
        async with make_async(heartbeat_interval=BEAT) as process:
            update = AsyncEntry(process, "a", doc={"n": 1})
            await update.cache()
            reference = last.create_reference(update.resource_id)
            await update.end_session()
            assert crew.journal.lines() == []
            with caplog.at_level(logging.WARNING, "phonon"):
                assert reference.dereference()
            assert said(caplog, LEFT) == 1
            await until(crew.journal.lines)
            (line,) = crew.journal.lines()
            assert (line.record, line.doc, line.process) == ("a", {"n": 1}, process.id)

    ASYNCIO.run(test)


class SyncRow(Update):
    """The same records as `Row`, for threads."""

    def merge(self, other: Any) -> None:
        self.doc += other.doc

    def execute(self) -> None:
        Row.store.rows[self._id, "sync"] += self.doc


def test_updates_of_both_apis_share_a_session(
    api: Api, make: Make, make_async: AsyncMake, database: Database
) -> None:
    process = make()

    async def test() -> None:
        async with make_async() as other:
            here, there = SyncRow(process, 1, doc=1), Row(other, 1, doc=10)
            assert here.resource_id == there.resource_id
            await there.cache()
            assert here.ref.count() == 2
            here.end_session()
            assert not database.rows
            await there.end_session()
            assert database.rows == {1: 10, (1, "sync"): 1}

    api.run(test)


# Several event loops


def run_in(factory: Any, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run something in an event loop of its own."""
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work())


def test_event_loops_side_by_side(make_async: AsyncMake) -> None:
    """In threads, each with processes of its own: all that they count is there once."""
    written: Counter[Any] = Counter()
    writing = threading.Lock()

    class Sums(AsyncConflictFreeUpdate):
        async def execute(self) -> None:
            await asyncio.sleep(0)
            with writing:
                written[self._id] += self.doc["n"]

    factories = [None, uvloop.new_event_loop, None, uvloop.new_event_loop]
    keys, rounds = range(10), 10
    together = threading.Barrier(len(factories))

    async def work() -> None:
        async with make_async() as process:
            await asyncio.to_thread(together.wait)
            cache: AsyncLruCache[Sums] = AsyncLruCache()

            async def fill(key: int) -> None:
                for _ in range(rounds):
                    async with process.lock(f"lock-{key}"):
                        await cache.set(key, Sums(process, key, doc={"n": 1}))

            async with asyncio.TaskGroup() as tasks:
                for key in keys:
                    tasks.create_task(fill(key))
            await asyncio.to_thread(together.wait)
            await cache.expire_all()

    async def checked() -> None:
        await work()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with ThreadPoolExecutor(len(factories)) as pool:
        list(pool.map(run_in, factories, [checked] * len(factories)))
    assert written == dict.fromkeys(keys, rounds * len(factories))


def test_another_loops_process_is_refused(
    api: Api, make_async: AsyncMake, database: Database
) -> None:
    async def test() -> None:
        async with make_async() as process:
            cache: AsyncLruCache[Row] = AsyncLruCache()
            await cache.set("a", Row(process, "a", doc=1))
            reference = await process.create_reference("x")
            update = await cache.get("a")
            assert update is not None
            lock = process.lock("x")

            async def batch() -> None:
                async with process.batch():
                    pass

            async def elsewhere() -> None:
                attempts: list[Callable[[], Awaitable[Any]]] = [
                    lambda: process.create_reference("y"),
                    reference.count,
                    lock.acquire,
                    lock.__aenter__,
                    batch,
                    process.flush,
                    process.stop,
                    update.cache,
                    update.end_session,
                    cache.expire_all,
                    lambda: cache.set("b", Row(process, "b", doc=1)),
                ]
                for attempt in attempts:
                    with pytest.raises(ConfigurationError, match="make one in each loop"):
                        await attempt()

            for factory in (None, uvloop.new_event_loop):
                await asyncio.to_thread(run_in, factory, elsewhere)
            assert await reference.count() == 1
            assert not await lock.locked()
            assert sorted(await process.get_registry()) == ["test.test.a", "x"]
            await cache.expire_all()
            assert database.rows == {"a": 1}

    api.run(test)


# Objects of the other API


def test_ordinary_code_cannot_call_it(api: Api, make_async: AsyncMake, database: Database) -> None:
    """It is told what to do instead, and nothing has happened."""

    async def test() -> None:
        async with make_async() as process, make_async() as other:
            update = Row(process, "a", doc=1, init_cache=False)
            reference = await process.create_reference("x")
            attempts: list[Callable[[], Any]] = [
                lambda: Reference(process, "y"),
                lambda: Lock(process, "y").acquire(),
                lambda: Semaphore(process, "y", 2).acquire(),
                lambda: Process.create_reference(process, "y"),  # type: ignore[arg-type]  # as above
                lambda: LruCache[Row]().set("a", update),
                lambda: Update.cache(update),
                lambda: Update.end_session(update),
                lambda: Update.force_expiry(update),
                lambda: SyncRow(process, "b", doc=1),  # type: ignore[arg-type]  # it is refused
            ]
            for attempt in attempts:
                with pytest.raises(ConfigurationError, match="await the method of its asyncio"):
                    attempt()
                with pytest.raises(ConfigurationError, match="await the method of its asyncio"):
                    await asyncio.to_thread(attempt)
            # A call that is not awaited has not begun.
            for call in (process.create_reference("y"), reference.dereference(), process.stop()):
                call.close()
            # Nor does it happen later.
            await process.flush()
            assert is_settled(process)  # type: ignore[arg-type]  # its twin
            assert await process.get_registry() == ["x"]
            assert await reference.count() == 1
            assert await other.lock("y").acquire(block=False)
            assert update.doc == 1
            await update.end_session()
            assert database.rows == {"a": 1}

    api.run(test)


def test_an_async_execute_without_an_event_loop(make: Make) -> None:
    """It is refused where its class is defined; later, it says so, and the data is kept."""
    rows: Counter[Any] = Counter()

    async def execute_never(update: Any) -> None:
        rows[update._id] += 1000

    async def execute_none(cls: Any, updates: Any) -> None:
        rows.update({update._id: 1000 for update in updates})

    for method in ({"execute": execute_never}, {"execute_many": classmethod(execute_none)}):
        with pytest.raises(TypeError, match=r"execute.* is a coroutine function.*phonon\.aio"):
            type("Refused", (Update,), method)

    class Mistaken(Update):
        def merge(self, other: Any) -> None:
            self.doc += other.doc

    class Many(Mistaken):
        pass

    Mistaken.execute = execute_never  # type: ignore[method-assign,assignment]  # the mistake
    Many.execute_many = classmethod(execute_none)  # type: ignore[method-assign,assignment]  # as above

    def execute(update: Any) -> None:
        rows[update._id] += update.doc

    process = make(retry=RetryPolicy(attempts=1))
    for kind in (Mistaken, Many):
        with pytest.raises(TypeError, match=r"execute.* is a coroutine function.*phonon\.aio"):
            kind(process, kind.__name__, doc=7).end_session()
    cache: LruCache[Many] = LruCache()
    for i in range(3):
        cache.set(i, Many(process, i, doc=i + 1))
    with pytest.raises(ExceptionGroup) as group:
        cache.expire_all()
    assert {type(error) for error in group.value.exceptions} == {TypeError}
    assert not rows
    Mistaken.execute = execute  # type: ignore[method-assign,assignment]  # as it should have been
    Many.execute_many = Update.execute_many  # type: ignore[method-assign]  # as above
    for parked in process.parked():
        process.replay(parked.resource, parked.token)
    assert rows == {"Mistaken": 7, "Many": 7, 0: 1, 1: 2, 2: 3}


def test_an_async_callback_without_an_event_loop(process: Process) -> None:
    async def callback(_: int, *, n: int) -> None:
        pass

    reference = process.create_reference("x")
    with pytest.raises(TypeError, match=r"callback is a coroutine function.*phonon\.aio"):
        reference.dereference(callback, args=(1,), kwargs={"n": 2})
    assert reference.count() == 1, "as before the call"


def test_async_updates_need_an_async_process(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="needs an AsyncProcess"):
        Row(make(), 1, doc=1)  # type: ignore[arg-type]  # it is refused


# After a fork


def test_a_forked_child_cannot_use_it(api: Api, make_async: AsyncMake, database: Database) -> None:
    """It is told so; the parent goes on, undisturbed by how the child ends."""

    async def test() -> None:
        async with make_async(heartbeat_interval=BEAT) as process:
            cache: AsyncLruCache[Row] = AsyncLruCache()
            await cache.set("a", Row(process, "a", doc=1))
            reference = await process.create_reference("x")
            lock = process.lock("x")
            await lock.acquire()
            child = os.fork()
            if not child:
                try:
                    _in_the_child(process, lock, reference.count, cache)
                except BaseException:  # noqa: BLE001 - told by the status
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert await reference.count() == 1
            await lock.check()
            identity = process.engine.identity
            beats = identity.lives_until
            await until(lambda: identity.lives_until > beats)
            await cache.set("a", Row(process, "a", doc=1))
            await lock.release()
        assert database.rows == {"a": 2}

    api.run(test)


def _in_the_child(
    process: AsyncProcess, lock: Any, count: Callable[[], Any], cache: "AsyncLruCache[Row]"
) -> None:
    async def attempt(call: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(ForkedError, match="make one in the child"):
            await call()

    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: process.create_reference("y"),
        lambda: cache.set("a", Row(process, "a", doc=1)),
        lock.release,
        count,
        process.stop,
    ]
    assert not lock.owned()
    assert cache.size() == 0, "the parent sends what it has cached"
    for call in calls:
        # Where it was: the task goes on in the child.
        with pytest.raises(StopIteration):
            attempt(call).send(None)
        # In an event loop of the child's own.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, attempt(call)).result()

    async def anew() -> None:
        async with AsyncProcess(url=process._url, namespace=process.namespace) as mine:
            assert await (await mine.create_reference("x")).count() == 2

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, anew()).result()
    gc.collect()


# Many at once


def test_so_many_execute_at_once_and_no_more(
    api: Api, make_async: AsyncMake, database: Database
) -> None:
    """Those of one resource one after the other, whoever ends the sessions."""
    tasks, rounds, keys = 40, 5, 8

    async def test() -> None:
        async with make_async(max_concurrent=3) as process:

            async def work(n: int) -> None:
                cache: AsyncLruCache[Row] = AsyncLruCache()
                for i in range(rounds):
                    await cache.set("any", Row(process, (n + i) % keys, doc=1))
                    await cache.expire_all()

            async with asyncio.TaskGroup() as group:
                for n in range(tasks):
                    group.create_task(work(n))
            await until(lambda: database.rows.total() == tasks * rounds)
            assert database.most == 3
            assert database.rows == dict.fromkeys(range(keys), tasks * rounds // keys)
            assert all(tokens == sorted(set(tokens)) for tokens in database.tokens.values())

    api.run(test)


def test_a_thousand_tasks_on_a_hundred_resources(
    api: Api, make_async: AsyncMake, database: Database, server: Redis
) -> None:
    """Locks let one in at a time, the last one out calls, and all numbers arrive."""
    inside: Counter[str] = Counter()
    calls: Counter[int] = Counter()

    async def test() -> None:
        async with make_async() as process:
            cache: AsyncLruCache[Row] = AsyncLruCache()
            references = {n: await process.create_reference(f"r{n}") for n in range(100)}

            async def work(n: int) -> None:
                resource = f"r{n % 100}"
                async with process.lock(resource):
                    inside[resource] += 1
                    assert inside[resource] == 1
                    await asyncio.sleep(0)
                    inside[resource] -= 1
                await cache.set(resource, Row(process, resource, doc=1))

            async with asyncio.TaskGroup() as tasks:
                for n in range(1000):
                    tasks.create_task(work(n))
            await cache.expire_all()
            for n, reference in references.items():
                assert await reference.dereference(calls.update, ([n],))
            assert await process.get_registry() == []
        assert database.rows == {f"r{n}": 10 for n in range(100)}
        assert calls == dict.fromkeys(range(100), 1)

    api.run(test)


# Errors in the background


def test_an_error_without_a_caller_is_told(
    api: Api, make_async: AsyncMake, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """To a callback, ``async`` or not, which may raise; the process goes on."""

    async def test(on_error: Callable[[Exception], object], told: list[Exception]) -> None:
        options = {"retry": ALWAYS, "heartbeat_interval": BEAT, "on_error": on_error}
        async with make_async(**options) as process:
            database.up = False
            with pytest.raises(OSError, match="the database is down"):
                await Row(process, len(told), doc=1).end_session()
            await until(lambda: told)
            database.up = True
            await until(lambda: database.rows.total() == 1)
        assert {str(error) for error in told} == {"the database is down"}

    for is_async in (False, True):
        told: list[Exception] = []

        def plain(error: Exception, told: list[Exception] = told) -> None:
            told.append(error)
            raise ValueError("a mistake of the callback's")

        async def awaited(error: Exception, plain: Callable[[Exception], None] = plain) -> None:
            await asyncio.sleep(0)
            plain(error)

        database.rows.clear()
        with caplog.at_level(logging.ERROR, "phonon"):
            api.run(functools.partial(test, awaited if is_async else plain, told))
        assert "a mistake of the callback's" in caplog.text
        caplog.clear()


def test_a_heartbeat_that_ends_is_begun_again(
    api: Api, make_async: AsyncMake, caplog: pytest.LogCaptureFixture
) -> None:
    """A task in the background that ends unbidden is told of, and the next call starts another."""

    async def test() -> None:
        async with make_async(heartbeat_interval=BEAT) as process:
            identity = process.engine.identity
            begun = identity.lives_until
            await until(lambda: identity.lives_until > begun)
            (heart,) = (task for task in asyncio.all_tasks() if "heartbeat" in task.get_name())
            with caplog.at_level(logging.ERROR, "phonon"):
                heart.cancel()
                await until(heart.done)
            assert "has died" in caplog.text
            await process.create_reference("x")
            before = identity.lives_until
            await until(lambda: identity.lives_until > before)

    api.run(test)


def test_while_the_server_is_away(api: Api, make_async: AsyncMake, database: Database) -> None:
    """Calls wait for it and are carried out; other tasks go on meanwhile; nothing is doubled."""

    async def test() -> None:
        async with make_async(url=server.url, heartbeat_interval=BEAT) as process:
            cache: AsyncLruCache[Row] = AsyncLruCache()
            await cache.set("a", Row(process, "a", doc=1))
            server.kill()
            setting = asyncio.create_task(cache.set("b", Row(process, "b", doc=1)))
            ticks = 0
            while ticks < 20:
                await asyncio.sleep(0.005)
                ticks += 1
            assert not setting.done()
            await asyncio.to_thread(server.start)
            await setting
            await cache.set("a", Row(process, "a", doc=1))
            await cache.expire_all()
        assert database.rows == {"a": 2, "b": 1}

    persistent = Redis("--appendonly", "yes", "--appendfsync", "always")
    with contextlib.closing(persistent) as server:
        api.run(test)


def test_a_server_that_stays_away(api: Api, own_server: Redis, make_async: AsyncMake) -> None:
    async def test() -> None:
        own_server.kill()
        with pytest.raises(ServerUnreachableError, match=own_server.socket):
            async with make_async(url=own_server.url, retry_timeout=0.2):
                pass

    api.run(test)


def test_a_new_update_waits_for_room(api: Api, make_async: AsyncMake, database: Database) -> None:
    """Its task does; others go on, and it is let in as soon as the database is there again."""

    async def test() -> None:
        database.up = False
        async with make_async(retry=ALWAYS, heartbeat_interval=BEAT, max_backlog=2) as process:
            cache: AsyncLruCache[Row] = AsyncLruCache()
            for key in ("a", "b"):
                with pytest.raises(OSError, match="the database is down"):
                    await Row(process, key, doc=1).end_session()
            setting = asyncio.create_task(cache.set("c", Row(process, "c", doc=1)))
            assert await process.lock("y").acquire()
            assert not setting.done()
            database.up = True
            await setting
            await cache.expire_all()
        assert database.rows == {"a": 1, "b": 1, "c": 1}

    api.run(test)


def test_a_new_update_is_refused(api: Api, make_async: AsyncMake, database: Database) -> None:
    async def test() -> None:
        database.up = False
        options = {"retry": ALWAYS, "max_backlog": 1, "overflow": "raise"}
        async with make_async(heartbeat_interval=BEAT, **options) as process:
            cache: AsyncLruCache[Row] = AsyncLruCache()
            with pytest.raises(OSError, match="the database is down"):
                await Row(process, "a", doc=1).end_session()
            with pytest.raises(BacklogFullError):
                await cache.set("b", Row(process, "b", doc=1))
            database.up = True
            await until(lambda: not process.engine.outbox.full)
            assert database.rows == {"a": 1}
            await cache.set("b", Row(process, "b", doc=1))
            await cache.expire_all()
        assert database.rows == {"a": 1, "b": 1}

    api.run(test)


# Where the server is


async def _works(process: AsyncProcess, database: Database) -> None:
    database.rows.clear()
    async with process, process.batch():
        cache: AsyncLruCache[Row] = AsyncLruCache()
        for n in range(40):
            await cache.set(n % 20, Row(process, n % 20, doc=1))
        async with process.lock("x"):
            await cache.expire_all()
    assert database.rows == dict.fromkeys(range(20), 2)


def test_on_a_cluster(api: Api, namespace: str, database: Database, cluster: Cluster) -> None:
    """From an address, and with a client of the user's, which stays open."""

    async def test() -> None:
        await _works(AsyncProcess(url=cluster.url, namespace=namespace), database)
        async with aioredis.RedisCluster.from_url(f"redis://{cluster.pair()[0].address}") as client:
            await _works(AsyncProcess(client=client, namespace=namespace), database)
            assert await client.ping(target_nodes="primaries")

    api.run(test)


def test_with_a_client_of_the_users(
    api: Api, namespace: str, database: Database, server: Redis
) -> None:
    """It stays open, whatever it decodes."""

    async def test() -> None:
        for decodes in (False, True):
            async with aioredis.Redis.from_url(server.url, decode_responses=decodes) as client:
                await _works(AsyncProcess(client=client, namespace=namespace), database)
                assert await client.ping()

    api.run(test)


def test_a_failover(api: Api, namespace: str, database: Database) -> None:
    """A call goes on at the primary that the sentinels name then."""

    async def test() -> None:
        url = f"redis+sentinel://{watched.addresses}/main/1"
        async with AsyncProcess(url=url, namespace=namespace, retry_timeout=45) as process:
            cache: AsyncLruCache[Row] = AsyncLruCache()
            await cache.set("a", Row(process, "a", doc=1))
            assert await asyncio.to_thread(watched.primary.replicates)
            watched.primary.kill()
            await cache.set("a", Row(process, "a", doc=1))
            await cache.expire_all()
        assert watched.replica.is_primary()
        assert database.rows == {"a": 2}

    with contextlib.closing(Watched(1)) as watched:
        api.run(test)
