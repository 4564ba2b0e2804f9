"""Code of the user's that never ran does not count as done: return values are looked at."""

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phonon import LruCache, Process, RetryPolicy, Update
from phonon.aio import AsyncProcess, AsyncUpdate
from support.world import Redis, retry_now

LATER = RetryPolicy(first_delay=600)
_numbers = itertools.count()


async def coroutine(*_: Any) -> None:
    """Nobody awaits it."""


def generator(*_: Any) -> Iterator[None]:
    yield


@pytest.fixture
def process(server: Redis, namespace: str) -> Iterator[Process]:
    process = Process(url=server.url, namespace=namespace, retry=LATER)
    yield process
    with contextlib.suppress(TypeError, ValueError, ExceptionGroup):  # it fails once more
        process.stop()


def kind(**methods: Any) -> type[Update]:
    """A class with some methods, which its definition does not show what they return."""

    def merge(self: Any, other: Any) -> None:
        self.doc["n"] += other.doc["n"]

    body = {"merge": merge, "execute": lambda _: None, **methods}
    return type("Made", (Update,), body, name=f"made-{next(_numbers)}")


def end(process: Process, made: type[Update], *records: str) -> None:
    cache: LruCache[Update] = LruCache()
    for record in records or ("record",):
        cache.set(record, made(process, record, doc={"n": 1}, init_cache=False))
    cache.expire_all()


def is_kept(process: Process | AsyncProcess, record: str = "record") -> bool:
    """Return whether a batch is still to be executed."""
    return any(due.name.endswith(record.encode()) for due in process.engine.outbox._due.values())


@pytest.mark.parametrize(
    "returned", [generator, coroutine, lambda _: map(print, "x"), lambda _: filter(None, "x")]
)
def test_an_execute_that_never_ran_has_failed(
    process: Process, returned: Callable[..., Any]
) -> None:
    made = kind(execute=lambda self: returned(self))  # noqa: PLW0108 - it hides what it is
    with pytest.raises(ExceptionGroup) as caught:
        end(process, made)
    assert caught.group_contains(TypeError)
    assert is_kept(process)


def test_an_execute_that_returns_what_is_left_of_its_work_has_run(
    process: Process, tmp_path: Path
) -> None:
    """A cursor or a file is an iterator, too."""
    database = sqlite3.connect(tmp_path / "database")
    database.execute("CREATE TABLE written (n INTEGER)")
    end(process, kind(execute=lambda _: database.execute("INSERT INTO written VALUES (1)")))
    with (tmp_path / "file").open("w") as file:
        end(process, kind(execute=lambda _: file))
    assert database.execute("SELECT * FROM written").fetchall() == [(1,)]
    assert not is_kept(process)
    database.close()


@pytest.mark.parametrize(
    "returned",
    [
        generator,
        coroutine,
        lambda _: True,
        list,
        lambda updates: [(update, "bad") for update in updates],
        lambda updates: [(object(), ValueError()) for _ in updates],
    ],
)
def test_an_execute_many_that_returns_something_else_has_failed(
    process: Process, returned: Callable[..., Any]
) -> None:
    made = kind(execute_many=classmethod(lambda _, updates: returned(updates)))
    with pytest.raises(ExceptionGroup) as caught:
        end(process, made, "one", "two")
    assert caught.group_contains(TypeError)
    assert is_kept(process, "one")
    assert is_kept(process, "two")


def test_pairs_may_come_from_an_iterator(process: Process) -> None:
    """It can be read once, and several records have failed."""
    failing = ["one", "three"]

    def execute_many(_: Any, updates: Any) -> Any:
        failed = [update for update in updates if update._id in failing]
        return zip(failed, map(ValueError, failing), strict=True)

    made = kind(execute_many=classmethod(execute_many))
    with pytest.raises(ExceptionGroup) as caught:
        end(process, made, "one", "two", "three")
    assert sorted(str(error) for error in caught.value.exceptions) == failing[::1]
    assert [is_kept(process, record) for record in ("one", "two", "three")] == [True, False, True]
    failing.clear()
    retry_now(process)
    assert not is_kept(process, "one")


def test_a_pair_without_an_error_has_not_failed(process: Process) -> None:
    end(process, kind(execute_many=classmethod(lambda _, updates: [(u, None) for u in updates])))
    assert not is_kept(process)


@pytest.mark.parametrize("name", ["clear", "reset_states"])
@pytest.mark.parametrize("returned", [generator, coroutine, lambda _: [1], lambda _: {1: 2}])
def test_data_that_was_not_cleared_is_not_sent_twice(
    process: Process, name: str, returned: Callable[..., Any]
) -> None:
    """Nor lost: it is in its update until the method does what it should."""
    written: list[int] = []
    good: list[bool] = []
    made = kind(
        execute=lambda self: written.append(self.doc["n"]),
        **{name: lambda self: None if good else returned(self)},
    )
    update = made(process, "record", doc={"n": 7}, init_cache=False)
    with pytest.raises(TypeError):
        update.end_session()
    assert update.doc == {"n": 7}
    good.append(True)
    update.end_session()
    assert written == [7]


@pytest.mark.parametrize("returned", [generator, coroutine, lambda self, _: self])
def test_a_merge_that_returns_something_has_failed(
    process: Process, returned: Callable[..., Any]
) -> None:
    made = kind(merge=lambda self, other: returned(self, other))  # noqa: PLW0108 - as above
    cache: LruCache[Update] = LruCache()
    cache.set("x", made(process, "x", doc={"n": 1}, init_cache=False))
    with pytest.raises(TypeError, match=r"merge\(\) returned"):
        cache.set("x", made(process, "x", doc={"n": 1}, init_cache=False))


@pytest.mark.parametrize("state", [None, [1], {1: 2}])
def test_a_state_that_is_no_state_is_refused_where_the_update_is_made(
    process: Process, state: Any
) -> None:
    made = kind(state=lambda _: state)
    with pytest.raises(TypeError, match="a dict of attributes by name"):
        made(process, "record")


def test_an_is_expired_that_nobody_awaits(process: Process) -> None:
    made = kind(is_expired=lambda _: coroutine())
    update = made(process, "record", doc={"n": 1})
    with pytest.raises(TypeError, match=r"is_expired\(\) returned"):
        update.end_session()
    made.is_expired = Update.is_expired  # type: ignore[method-assign]  # for the end
    update.end_session()


@pytest.mark.parametrize(
    "returned", [generator, coroutine, lambda: map(print, "x")], ids=["yield", "async", "map"]
)
def test_a_callback_that_never_ran_leaves_the_reference_held(
    process: Process, returned: Callable[..., Any]
) -> None:
    reference = process.create_reference("resource")
    with pytest.raises(TypeError):
        reference.dereference(lambda: returned())  # noqa: PLW0108 - as above
    assert reference.count() == 1


@pytest.mark.parametrize("name", ["merge", "state", "clear", "reset_states", "is_expired"])
@pytest.mark.parametrize("base", [Update, AsyncUpdate])
@pytest.mark.parametrize("method", [generator, coroutine])
@pytest.mark.parametrize("beside", [False, True], ids=["own", "of a class beside it"])
def test_what_would_never_run_is_refused_where_the_class_is_defined(
    name: str, base: type, method: Callable[..., Any], beside: bool
) -> None:
    bases = (type("Mixin", (), {name: method}), base) if beside else (base,)
    with pytest.raises(TypeError, match=rf"Made\.{name}"):
        type("Made", bases, {} if beside else {name: method}, name=f"made-{next(_numbers)}")


@pytest.mark.parametrize("returned", ["text", bytearray(b"x"), None, 5])
def test_a_serializer_that_returns_no_bytes(server: Redis, namespace: str, returned: Any) -> None:
    class Odd:
        name = "odd"

        def dumps(self, _: Any) -> Any:
            return returned

        def loads(self, data: bytes) -> Any:
            return data

    with (
        Process(url=server.url, namespace=namespace, serializer=Odd()) as process,
        pytest.raises(TypeError, match=r"dumps\(\) returned .*: it returns bytes"),
    ):
        kind()(process, "record", doc={"n": 1})


def test_an_execute_of_a_process_with_an_event_loop(server: Redis, namespace: str) -> None:
    """The returned value may be awaitable; then its result is checked as well."""

    class Made(AsyncUpdate, name=f"made-{next(_numbers)}"):
        def merge(self, other: Any) -> None:
            """There is nothing to merge."""

        async def execute(self) -> Any:
            return map(print, "x")

    async def tried() -> None:
        process = await AsyncProcess(url=server.url, namespace=namespace, retry=LATER).start()
        with pytest.raises(TypeError, match="never called"):
            await Made(process, "record", doc={}).end_session()
        assert is_kept(process)
        with contextlib.suppress(TypeError):  # it fails once more
            await process.stop()

    asyncio.run(tried())
