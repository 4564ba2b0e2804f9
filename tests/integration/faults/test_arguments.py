"""Every argument is checked where it is given; errors name it, its value and the remedy."""

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import phonon
import phonon.aio
from phonon import ConflictFreeUpdate, Durability, LruCache, Process, RetryPolicy, Update
from phonon.aio import AsyncConflictFreeUpdate, AsyncLruCache, AsyncProcess
from phonon.errors import ConfigurationError
from support.both import got
from support.world import Redis


class Anything:
    """Of no type that is wanted anywhere."""

    def __repr__(self) -> str:
        return "Anything()"


async def coroutine_function(*_: Any) -> None:
    """Cannot be awaited without an event loop."""


NAN, INFINITY = float("nan"), float("inf")
NO_NAME = [None, 42, b"x", Anything(), ["x"]]
NO_FLAG = ["yes", 5, 0.5, [], Anything()]
NO_COUNT = [2.5, 8 / 2, "3", True, NAN, Anything()]
NO_TIME = ["5", -2, -0.001, NAN, True, [], Anything()]
NO_SECONDS = [*NO_TIME, 0, -1, INFINITY]
NO_FUNCTION = [5, "print", [], Anything()]
NO_PROCESS: list[Any] = ["redis://localhost", 5, Process, Anything()]
NO_KEY: list[Any] = [[], {}, set()]

#: Arguments that may be anything, or whose values are checked by somebody else, and by whom.
ANYTHING = {
    "_id": "NotStorableError",
    "spec": "NotStorableError",
    "doc": "NotStorableError",
    "options": "the constructor",
    "name": "the class",
    "messages": "the block itself",
    "message_id": "the block itself",
    "window": "the block itself",
    "dedupe": "the block itself",
}

OF_PROCESS: dict[str, list[Any]] = {
    "session_length": [*NO_SECONDS, None, 5],
    "host": [*NO_NAME, "redis://localhost"],
    "port": [*NO_COUNT, -1],
    "db": [*NO_COUNT, -1],
    "heartbeat_interval": [*NO_SECONDS, None],
    "recover_failed_processes": [*NO_FLAG, None],
    "hosts": ["localhost:7000", [], [7000], 5, {"localhost:7000": 1}, b"localhost"],
    "url": [42, b"redis://localhost", "", "localhost", "redis://localhost?retry=3"],
    "client": ["redis://localhost", 5, Anything(), Process],
    "namespace": NO_NAME,
    "partitions": [*NO_COUNT, 0, -1, 16385],
    "serializer": [json, "json", 5, phonon.ExactSerializer, Anything()],
    "retry": [3, None, (1, 2), RetryPolicy()._replace(jitter=3)],
    "retry_timeout": [*NO_SECONDS, None],
    "durability": [True, 1, "fsync", Durability()._replace(replicas=-1)],
    "on_error": NO_FUNCTION,
    "max_backlog": [*NO_COUNT, None, 0],
    "overflow": [None, "drop", 5, []],
}
OF_LOCK: dict[str, list[Any]] = {
    "block": NO_FLAG,
    "shared": [*NO_FLAG, None],
    "reentrant": [*NO_FLAG, None],
    "lease": NO_SECONDS,
    "on_lost": NO_FUNCTION,
    "timeout": NO_TIME,
}
REGISTRY_KEYS = [42, b"x", "", "another key", Anything()]
#: Methods, by class and name: what is refused in each argument.
TABLE: dict[tuple[str, str], dict[str, list[Any]]] = {
    ("Process", "create_reference"): {
        "resource": NO_NAME,
        "block": [*NO_FLAG, None, 2],
        "parties": [*NO_COUNT, 0, -1],
    },
    ("Process", "lock"): {"lock_key": NO_NAME, **OF_LOCK},
    ("Process", "semaphore"): {
        "name": NO_NAME,
        "places": [*NO_COUNT, None, 0, -1],
        **{name: OF_LOCK[name] for name in ("block", "lease", "on_lost", "timeout")},
    },
    ("Process", "batch"): {"durable": [*NO_FLAG, None]},
    ("Process", "add_to_registry"): {"resource": NO_NAME, "registry_key": REGISTRY_KEYS},
    ("Process", "remove_from_registry"): {"resource": NO_NAME, "registry_key": REGISTRY_KEYS},
    ("Process", "get_registry"): {"registry_key": REGISTRY_KEYS},
    ("Process", "look"): {"resource": NO_NAME, "token": [*NO_COUNT, None]},
    ("Process", "replay"): {"resource": NO_NAME, "token": [*NO_COUNT, None]},
    ("Process", "discard"): {"resource": NO_NAME, "token": [*NO_COUNT, None]},
    ("Reference", "lock"): OF_LOCK,
    ("Reference", "wait"): {"timeout": NO_TIME},
    ("Reference", "dereference"): {
        "callback": NO_FUNCTION,
        "args": ["x", b"x", 5, {"x": 1}, Anything()],
        "kwargs": ["x", 5, [1], {1: 2}, Anything()],
        "block": NO_FLAG,
    },
    ("Lock", "acquire"): {
        "block": NO_FLAG,
        "timeout": NO_TIME,
        "blocking": NO_FLAG,
        "blocking_timeout": NO_TIME,
    },
    ("Lock", "extend"): {"additional_time": NO_SECONDS, "replace_ttl": [*NO_FLAG, None]},
    ("Update", "set_force_expiry"): {"value": [*NO_FLAG, None]},
    ("Update", "refresh"): {"other": [None, 5, "x", {}, Anything()]},
    ("LruCache", "set"): {"key": NO_KEY, "update": [None, 5, "x", {}]},
    ("LruCache", "get"): {"key": NO_KEY},
    ("LruCache", "expire"): {"key": NO_KEY},
}
#: Arguments of methods that are given where another one is tested.
GIVEN: dict[str, dict[str, Any]] = {
    "create_reference": {"resource": "x"},
    "lock": {"lock_key": "x"},
    "semaphore": {"name": "x", "places": 1},
    "add_to_registry": {"resource": "x"},
    "remove_from_registry": {"resource": "x"},
    "look": {"resource": "x", "token": 5},
    "replay": {"resource": "x", "token": 5},
    "discard": {"resource": "x", "token": 5},
    "dereference": {"callback": print},
}


def cases(table: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    for name, values in table.items():
        for value in values:
            yield name, value


def ids(case: Any) -> str:
    return "-".join(map(str, case)) if isinstance(case, tuple) else repr(case)[:30]


def check(error: ConfigurationError, name: str, value: Any) -> None:
    """The message names the argument, or says what it is; and the value; and the remedy."""
    text = str(error)
    assert name.split("_", maxsplit=1)[0] in text or name == "url", text
    inner = [value]
    if isinstance(value, RetryPolicy | Durability):
        inner = list(value)
    elif isinstance(value, list):
        inner = [value, *value]
    # A URL may have a password in it.
    shown = (
        name in {"url", "client"} or "://" in str(value) or any(str(item) in text for item in inner)
    )
    assert shown or getattr(value, "__name__", "nothing") in text, text
    assert ": " in text or " or " in text or "give" in text, text


async def refusal(function: Callable[[], Any]) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        result = await got(function())
        if isinstance(result, AsyncProcess):
            await result.start()
    return caught.value


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


@pytest.mark.parametrize("kind", [Process, AsyncProcess])
def test_a_process(kind: type, server: Redis) -> None:
    async def tried() -> None:
        for name, value in cases(OF_PROCESS):
            where = {} if name in {"host", "port", "db", "hosts", "url", "client"} else server_url
            error = await refusal(lambda: kind(**{**where, name: value}))  # noqa: B023 - awaited here
            check(error, name, value)

    server_url = {"url": server.url}
    run(tried)


def test_what_only_one_api_has(server: Redis) -> None:
    async def tried() -> None:
        with ProcessPoolExecutor(1) as pool:
            executors: list[Any] = [4, "threads", Anything(), pool]
            for value in executors:
                await refusal(lambda: Process(url=server.url, executor=value))  # noqa: B023
        await refusal(lambda: Process(url=server.url, on_error=coroutine_function))
        for value in (*NO_COUNT, None, 0):
            error = await refusal(lambda: AsyncProcess(url=server.url, max_concurrent=value))  # type: ignore[arg-type]  # noqa: B023
            check(error, "max_concurrent", value)

    run(tried)


class World:
    """One object of each class, of both APIs."""

    def __init__(self, *, is_async: bool, url: str, namespace: str) -> None:
        self.is_async = is_async
        self.process: Any = (AsyncProcess if is_async else Process)(url=url, namespace=namespace)
        self.sums = _AsyncSums if is_async else _Sums

    async def object(self, cls: str) -> Any:
        """Return an object of a class."""
        process = self.process
        if cls == "Process":
            return process
        if cls == "Reference":
            return await got(process.create_reference("resource", parties=1))
        if cls == "Lock":
            lock = process.lock("lock", lease=60)
            await got(lock.acquire())
            return lock
        if cls == "Update":
            return self.sums(process, "record", doc={"n": 1})
        return AsyncLruCache() if self.is_async else LruCache()


class _Sums(ConflictFreeUpdate):
    def execute(self) -> None:
        """Write nothing."""


class _AsyncSums(AsyncConflictFreeUpdate):
    async def execute(self) -> None:
        """Write nothing."""


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("method", TABLE, ids=ids)
def test_a_method(method: tuple[str, str], is_async: bool, server: Redis, namespace: str) -> None:
    async def tried() -> None:
        world = World(is_async=is_async, url=server.url, namespace=namespace)
        if is_async:
            await world.process.start()
        try:
            cls, called = method
            given = {} if cls != "Process" and called == "lock" else GIVEN.get(called, {})
            for name, value in cases(TABLE[method]):
                subject = await world.object(cls)
                try:
                    arguments = {**given, name: value}
                    if cls == "LruCache" and called == "set":
                        arguments.setdefault("key", "key")
                        arguments.setdefault("update", await world.object("Update"))
                    call = getattr(subject, called)
                    error = await refusal(lambda: call(**arguments))  # noqa: B023 - awaited here
                    if cls not in {"LruCache", "Update"} and name != "registry_key":
                        check(error, name, value)
                finally:
                    if cls == "Lock":
                        await got(subject.release())
        finally:
            await got(world.process.stop())

    run(tried)


def test_the_constructor_of_an_update(server: Redis, namespace: str) -> None:
    refused: dict[str, list[Any]] = {
        "database": [None, 5, b"x"],
        "collection": [None, 5, b"x"],
        "init_cache": [*NO_FLAG, None],
        "block": [*NO_FLAG, None],
        "hard_session": [*NO_TIME, -1],
        "soft_session": [*NO_TIME, -1],
    }

    async def tried() -> None:
        for is_async in (False, True):
            world = World(is_async=is_async, url=server.url, namespace=namespace)
            if is_async:
                await world.process.start()
            for name, value in cases(refused):
                error = await refusal(lambda: world.sums(world.process, "x", **{name: value}))  # noqa: B023
                check(error, name, value)
            for value in NO_PROCESS:
                check(await refusal(lambda: world.sums(value, "x")), "process", value)  # noqa: B023
            await got(world.process.stop())

    run(tried)


@pytest.mark.parametrize("value", NO_PROCESS, ids=ids)
def test_what_is_no_process(value: Any) -> None:
    for module, prefix in ((phonon, ""), (phonon.aio, "Async")):
        for name, arguments in (("Reference", ("x",)), ("Lock", ("x",)), ("Semaphore", ("x", 1))):
            with pytest.raises(ConfigurationError) as caught:
                getattr(module, prefix + name)(value, *arguments)
            check(caught.value, "process", value)


@pytest.mark.parametrize("kind", [LruCache, AsyncLruCache])
def test_a_cache(kind: type) -> None:
    for value in (*NO_COUNT, None, 0, -1):
        with pytest.raises(ConfigurationError) as caught:
            kind(max_entries=value)
        check(caught.value, "max_entries", value)


def test_the_name_of_a_class() -> None:
    for value in (5, b"x", "", Anything()):
        with pytest.raises(ConfigurationError):
            type("Named", (Update,), {}, name=value)


def test_nothing_is_left_out() -> None:
    """Each argument of each public method is in the table."""
    for kind in (phonon.Process, phonon.Reference, phonon.Lock, phonon.Update, phonon.LruCache):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if name.startswith("_") or method.__module__ not in _MODULES or name in _OWN_TESTS:
                continue
            wanted = set(inspect.signature(method).parameters) - {"self", *ANYTHING}
            listed = set(TABLE.get((kind.__name__, name), ())) | set(_ELSEWHERE.get(name, ()))
            assert wanted <= listed, (kind.__name__, name, wanted - listed)


_MODULES = {f"phonon.{name}" for name in ("process", "reference", "lock", "update", "cache")}
#: Methods whose arguments are tested with what they are for.
_OWN_TESTS = {"collect", "source", "on"}
#: Methods that others call, or that take what they get for compatibility, or whose own tests exist.
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "merge": ("other",),
    "end_session": ("block",),
    "storing": ("engine",),
    "ending": ("engine",),
    "beginning": ("engine",),
    "endings_for": ("engine",),
    "forget_for": ("engine",),
    "deadline": ("key",),
    "entering": ("attempt",),
    "releasing": ("taken",),
    "take_over": ("key", "now", "sessions"),
    "restore": ("key", "update"),
}
