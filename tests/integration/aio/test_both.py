"""The public methods, once for threads, once for asyncio, once for uvloop."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from phonon import LockLostError, Parked, RetryPolicy
from phonon.errors import (
    BatchMissingError,
    ConfigurationError,
    DeadlockError,
    NotStorableError,
    ProcessStoppedError,
)
from support.both import APIS, Api, got, until
from support.world import Redis, key_of

Make = Callable[..., Any]


@pytest.fixture(params=APIS, ids=lambda api: api.name)
def api(request: pytest.FixtureRequest) -> Api:
    found: Api = request.param
    return found


@pytest.fixture
def make(api: Api, server: Redis, namespace: str) -> Make:
    """Makes a process, to be entered."""

    def make_process(**options: Any) -> Any:
        options = {"url": server.url, "namespace": namespace, "retry_timeout": 5.0, **options}
        return api.enter(api.process(**options))

    return make_process


def test_a_process(api: Api, make: Make, namespace: str) -> None:
    async def test() -> None:
        async with make() as process, make() as other:
            assert process.id != other.id
            assert process.namespace == namespace
            assert process.heartbeat_interval == 10
            assert process.heartbeat_hash_name == f"{{{namespace}}}:processes"
            assert process.id in process.registry_key
            assert process.id in repr(process)
            assert await got(process.client.ping())
            assert await got(process.add_to_registry("x")) == 1
            assert await got(process.get_registry()) == ["x"]
            assert await got(other.get_registry(process.registry_key)) == ["x"]
            assert await got(process.remove_from_registry("x")) == 1
            assert await got(process.get_registry()) == []

    api.run(test)


def test_a_process_from_a_url(api: Api, server: Redis, namespace: str) -> None:
    async def test() -> None:
        made = api.process.from_url(server.url, namespace=namespace)
        async with api.enter(made) as process:
            assert type(process) is api.process

    api.run(test)


def test_a_stopped_process(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as process:
            reference = await got(process.create_reference("x"))
            await got(process.stop())
            await got(process.stop())
            with pytest.raises(ProcessStoppedError):
                await got(reference.count())

    api.run(test)


def test_what_it_holds_ends_with_it(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        async with make() as process, make() as other:
            await got(other.create_reference("x"))
            reference = await got(process.create_reference("x"))
            cache = api.cache()
            await got(cache.set(1, kind(process, 1, doc={"n": 1})))
            await got(reference.lock().acquire())
            await got(process.stop())
            assert [entry.doc for entry in kind.written] == [{"n": 1}]
            assert await got((await got(other.create_reference("x"))).count()) == 1
            async with api.enter(other.lock("x", block=False)):
                pass

    api.run(test)


def test_references(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as one, make() as two:
            here = await got(one.create_reference("a"))
            there = await got(two.create_reference("a", block=False))
            assert here.resource_key == "a"
            assert (here.block, there.block) == (True, False)
            assert await got(here.count()) == 2
            await got(here.refresh_session())
            assert {holder.id for holder in await got(here.holders())} == {one.id, two.id}
            await got(there.increment_times_modified())
            await got(there.increment_times_modified())
            assert await got(here.get_times_modified()) == 2
            assert await got(here.modified_by()) == {two.id: 2}
            assert "'a'" in repr(here)
            assert not await got(here.dereference())
            assert await got(there.dereference())
            assert not await got(there.dereference())

    api.run(test)


def test_the_last_one_calls(api: Api, make: Make) -> None:
    async def test() -> None:
        called: list[Any] = []

        def callback(*args: Any, **kwargs: Any) -> None:
            called.append((args, kwargs))

        async with make() as one, make() as two:
            here = await got(one.create_reference("a"))
            there = await got(two.create_reference("a"))
            await got(there.increment_times_modified())
            assert not await got(here.dereference(callback, args=(1,), kwargs={"b": 2}))
            assert called == []
            assert await got(there.dereference(callback, args=(1,), kwargs={"b": 2}))
            assert called == [((1,), {"b": 2})]

    api.run(test)


def test_a_callback_that_raises(api: Api, make: Make) -> None:
    async def test() -> None:
        def callback() -> None:
            raise KeyError("no")

        async with make() as process:
            reference = await got(process.create_reference("a"))
            with pytest.raises(KeyError):
                await got(reference.dereference(callback))
            assert await got(reference.count()) == 1

    api.run(test)


def test_known_parties(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as one, make() as two:
            here = await got(one.create_reference("p", parties=2))
            assert here.parties == 2
            assert not await got(here.wait(timeout=0))
            waiting = api.begin(here.wait)
            there = await got(two.create_reference("p", parties=2))
            assert not await got(there.dereference())
            assert await waiting
            assert await got(here.dereference())
            with pytest.raises(ConfigurationError):
                await got((await got(one.create_reference("q"))).wait())

    api.run(test)


def test_a_lock(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as one, make() as two:
            reference = await got(one.create_reference("a"))
            lock = reference.lock()
            other = two.lock("a", block=False)
            assert (lock.name, lock.lock_key, lock.shared, lock.token) == ("a", "a", False, None)
            async with api.enter(lock) as entered:
                assert entered is lock
                assert type(lock) is api.process.Lock
                assert lock.owned()
                assert lock.token > 0
                assert await got(other.locked())
                assert [holder.id for holder in await got(other.holders())] == [one.id]
                assert await got(lock.extend(20.0))
                assert await got(lock.reacquire())
                await got(lock.check())
                assert not await got(other.acquire())
                with pytest.raises(api.process.AlreadyLocked) as raised:
                    async with api.enter(other):
                        pass
                assert raised.value.holder.id == one.id
                with pytest.raises(DeadlockError):
                    await got(reference.lock().acquire())
            assert not lock.owned()
            assert not await got(other.locked())
            with pytest.raises(LockLostError):
                await got(lock.release())

    api.run(test)


def test_waiting_for_a_lock(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as one, make() as two:
            lock, other = one.lock("a"), two.lock("a")
            await got(lock.acquire())
            assert not await got(other.acquire(timeout=0.05))
            waiting = api.begin(other.acquire, timeout=20)
            await until(lock.waiters)
            begun = time.monotonic()
            await got(lock.release())
            assert await waiting
            assert time.monotonic() - begun < 4.5, "it asks by itself after 5 s"
            await got(other.release())

    api.run(test)


def test_shared_and_reentrant_locks(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as one, make() as two:
            here, there = one.lock("a", shared=True), two.lock("a", shared=True)
            async with api.enter(here), api.enter(there):
                assert not await got(two.lock("a", block=False).acquire())
            lock = one.lock("b", reentrant=True)
            async with api.enter(lock), api.enter(lock):
                assert lock.owned()
            assert not await got(lock.locked())

    api.run(test)


def test_a_semaphore(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as process:
            first, second, third = (process.semaphore("s", 2, block=False) for _ in range(3))
            async with api.enter(first), api.enter(second):
                assert not await got(third.acquire())
                assert len(await got(third.holders())) == 2
            assert await got(third.acquire())
            await got(third.release())
            with pytest.raises(ConfigurationError):
                process.semaphore("s", 0)

    api.run(test)


def test_updates_meet(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        async with make() as one, make() as two:
            here, there = api.cache(), api.cache()
            for cache, process in ((here, one), (here, one), (there, two)):
                await got(cache.set("k", kind(process, "k", doc={"n": 1})))
            await got(here.expire_all())
            assert kind.written == []
            await got(there.expire_all())
            (entry,) = kind.written
            assert entry[:2] == ("k", {"n": 3})
            assert entry.process == two.id

    api.run(test)


def test_an_update(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        async with make() as process:
            update = kind(process, 7, "db.x", "c", spec={"_id": 7}, doc={"n": 1}, init_cache=False)
            assert update.process() is process
            assert update.resource_id == "db%2Ex.c.7"
            assert (update.spec, update.doc) == ({"_id": 7}, {"n": 1})
            assert update.has_unsent()
            await got(update.cache())
            assert not update.has_unsent()
            assert await got(update.ref.count()) == 1
            update.refresh(kind(process, 7, "db.x", "c", doc={"n": 2}, init_cache=False))
            assert not update.is_expired()
            await got(update.end_session())
            assert [entry.doc for entry in kind.written] == [{"n": 3}]
            assert await got(update.ref.count()) == 0

    api.run(test)


def test_forced_expiry(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        async with make() as one, make() as two:
            here, there = kind(one, 1, doc={"n": 1}), kind(two, 1, doc={"n": 2})
            await got(here.cache())
            await got(there.cache())
            await got(here.force_expiry())
            assert [entry.doc for entry in kind.written] == [{"n": 3}]

    api.run(test)


def test_an_update_that_cannot_be_stored(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        async with make() as process:
            with pytest.raises(NotStorableError, match="doc"):
                kind(process, 1, doc={"n": object()})

    api.run(test)


def test_numbers_add_up(api: Api, make: Make) -> None:
    async def test() -> None:
        async with make() as process:
            update = api.sums(process, 1, doc={"a": 1, "b": {"c": 2}}, init_cache=False)
            update.merge(api.sums(process, 1, doc={"a": 2, "b": {"c": 3}}, init_cache=False))
            assert update.doc == {"a": 3, "b": {"c": 5}}
            # Nothing is to be executed, but this process may be a member.
            await got(update.ref.dereference())

    class Sums(api.sums):  # type: ignore[misc,name-defined]  # either of them
        execute = api.user_code(lambda _: None)

    async def executed() -> None:
        async with make() as process:
            await got(Sums(process, 1, doc={"a": 1}).end_session())

    api.run(executed)


def test_a_cache(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        async with make() as process:
            cache = api.cache(max_entries=2)
            assert cache.max_entries == 2
            assert [
                await got(cache.set(key, kind(process, key, doc={"n": 1}))) for key in "aba"
            ] == [True, True, False]
            assert (cache.size(), len(cache), "a" in cache, "c" in cache) == (2, 2, True, False)
            assert (await got(cache.get("a")))._id == "a"
            with pytest.raises(KeyError):
                await got(cache.get("c"))
            assert await got(cache.set("c", kind(process, "c", doc={"n": 1})))
            assert [entry.record for entry in kind.written] == ["b"]
            await got(cache.expire("a"))
            await got(cache.expire_oldest())
            await got(cache.expire_oldest())
            assert [entry.record for entry in kind.written] == ["b", "a", "c"]
            over = kind(process, "d", doc={"n": 1}, soft_session=0.0)
            assert await got(cache.set("d", over))
            await got(cache.purge())
            assert kind.written[-1].record == "d"
            late = kind(process, "e", doc={"n": 1}, soft_session=0.0)
            await got(cache.set("e", late))
            assert await got(cache.set("e", kind(process, "e", doc={"n": 1}))) is None
            assert kind.written[-1][:2] == ("e", {"n": 2})
            assert cache.get_last_failed() is None

    api.run(test)


def test_a_cache_of_other_things(api: Api) -> None:
    class Sync:
        ended = 0

        def end_session(self) -> None:
            self.ended += 1

    class Async(Sync):
        async def end_session(self) -> None:  # type: ignore[override]  # that is the difference
            self.ended += 1

    async def test() -> None:
        cache = api.cache()
        entry = Async() if api.is_async else Sync()
        assert await got(cache.set(1, entry))
        await got(cache.expire_all())
        assert entry.ended == 1
        with pytest.raises(ValueError, match="max_entries"):
            api.cache(0)

    api.run(test)


def test_a_batch(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        async with make() as process, make() as other:
            cache = api.cache()
            async with api.enter(process.batch()):
                for i in range(100):
                    update = kind(process, i % 10, doc={"n": 1}, init_cache=False)
                    await got(cache.set(i % 10, update))
                await got(process.create_reference("x"))
                there = await got(other.create_reference("x"))
                assert await got(there.count()) == 1
            assert await got(there.count()) == 2
            assert not (await got(cache.get(1))).has_unsent()
            async with api.enter(process.batch()):
                await got(cache.expire_all())
                assert kind.written == []
            assert {entry.record: entry.doc["n"] for entry in kind.written} == dict.fromkeys(
                range(10), 10
            )
            await got(process.flush())

    api.run(test)


def test_a_failing_execute(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        fails = [OSError("down")]
        execute = kind.execute

        def failing(update: Any) -> Any:
            if fails:
                raise fails.pop()
            return execute(update)

        kind.execute = api.user_code(failing)
        async with make(retry=RetryPolicy(first_delay=0.05, jitter=0)) as process:
            cache = api.cache()
            await got(cache.set(1, kind(process, 1, doc={"n": 1})))
            with pytest.raises(OSError, match="down"):
                await got(cache.expire(1))
            assert cache.get_last_failed() is not None
            await until(lambda: kind.written)
            assert kind.written[0][:2] == (1, {"n": 1})

    api.run(test)


def test_parked_batches(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        execute = kind.execute

        def failing(update: Any) -> None:
            raise OSError("down")

        kind.execute = api.user_code(failing)
        async with make(retry=RetryPolicy(attempts=1)) as process:
            for _ in range(2):
                with pytest.raises(OSError, match="down"):
                    await got(kind(process, 1, doc={"n": 1}).end_session())
            first, second = await got(process.parked())
            assert isinstance(first, Parked)
            assert (first.resource, first.size) == ("test.test.1", 1)
            (update,) = await got(process.look(first.resource, first.token))
            assert (type(update), update.doc) == (kind, {"n": 1})
            kind.execute = execute
            await got(process.replay(first.resource, first.token))
            assert [entry.doc for entry in kind.written] == [{"n": 1}]
            await got(process.discard(second.resource, second.token))
            with pytest.raises(BatchMissingError):
                await got(process.discard(second.resource, second.token))
            assert await got(process.parked()) == []

    api.run(test)


def test_many_are_executed_at_once(api: Api, make: Make) -> None:
    async def test() -> None:
        kind = api.tally()
        calls: list[int] = []

        def execute_many(cls: Any, updates: Any) -> None:
            calls.append(len(updates))

        kind.execute_many = classmethod(api.user_code(execute_many))
        async with make() as process:
            cache = api.cache()
            async with api.enter(process.batch()):
                for i in range(300):
                    await got(cache.set(i, kind(process, i, doc={"n": 1})))
            await got(cache.expire_all())
        assert sorted(calls) == [50, 250]

    api.run(test)


def test_a_lock_that_is_lost(api: Api, make: Make, server: Redis, namespace: str) -> None:
    async def test() -> None:
        told: list[Any] = []
        errors: list[Exception] = []
        async with make(heartbeat_interval=0.1, on_error=errors.append) as process:
            lock = process.lock("a", on_lost=told.append)
            await got(lock.acquire())
            with server.client() as client:
                assert client.delete(key_of(namespace, "lock", "a"))
            with pytest.raises(LockLostError):
                await got(lock.check())
            await until(lambda: told)
            assert told == [lock]
            assert isinstance(errors[0], LockLostError)

    api.run(test)
