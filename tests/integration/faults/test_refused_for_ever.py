"""Data that the server always refuses raises at once, and does not affect other data."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit
from typing import Any, NamedTuple

import pytest
import redis
from redis.exceptions import ResponseError

from phonon import LruCache, Process
from phonon._transport import failures
from phonon.aio import AsyncLruCache, AsyncProcess
from phonon.errors import ConnectionLostError, NotStorableError, ServerError
from support.both import APIS, Api, got
from support.samples import Tally, fresh
from support.world import Redis, wait_until

LIMIT = 1 << 20


@pytest.fixture(scope="module", params=["proto-max-bulk-len", "client-query-buffer-limit"])
def small_server(request: pytest.FixtureRequest) -> Iterator[Redis]:
    """A server that hangs up on what is longer than a megabyte."""
    server = Redis(f"--{request.param}", str(LIMIT))
    yield server
    server.close()


@pytest.fixture
def process(small_server: Redis, namespace: str) -> Iterator[Process]:
    with Process(url=small_server.url, namespace=namespace, retry_timeout=3) as process:
        yield process


@pytest.fixture
def kind() -> type[Tally]:
    return fresh()


def doc(size: int = 2 * LIMIT) -> dict[str, Any]:
    return {"n": 1, "text": "x" * size}


def test_a_value_that_is_too_large_is_refused_where_it_is_made(
    process: Process, kind: type[Tally]
) -> None:
    with pytest.raises(NotStorableError) as caught:
        kind(process, "record", doc=doc())
    text = str(caught.value)
    assert "test.test.record" in text
    assert "2,097" in text
    assert "1,044,480" in text
    assert "proto-max-bulk-len" in text


def test_its_companions_go_through(process: Process, kind: type[Tally]) -> None:
    cache: LruCache[Tally] = LruCache()
    with pytest.raises(NotStorableError), process.batch():
        for record, size in (("one", 1), ("large", 2 * LIMIT), ("two", 1)):
            cache.set(record, kind(process, record, doc=doc(size)))
    process.flush()
    with pytest.raises(ExceptionGroup) as caught:
        cache.expire_all()
    assert len(caught.value.exceptions) == 1
    assert {entry.record for entry in kind.written} == {"one", "two"}
    # Its data is still in its update, in its cache.
    assert len(cache) == 1
    large = cache.get("large")
    assert large is not None
    large.doc = {"n": 5}
    cache.expire_all()
    assert {entry.record for entry in kind.written} == {"one", "two", "large"}


def test_stopping_names_it(small_server: Redis, namespace: str, kind: type[Tally]) -> None:
    process = Process(url=small_server.url, namespace=namespace, retry_timeout=3)
    large = kind(process, "large", doc=doc(), init_cache=False)
    kind(process, "small", doc={"n": 1})
    with pytest.raises(NotStorableError, match=r"test\.test\.large"):
        process.stop()
    assert large.doc["n"] == 1
    assert {entry.record for entry in kind.written} == {"small"}


def test_a_name_that_is_too_long(process: Process) -> None:
    for call in (process.create_reference, lambda name: process.lock(name).acquire()):
        with pytest.raises(ServerError, match="2,097"):
            call("x" * 2 * LIMIT)
    assert process.create_reference("x").count() == 1


def test_what_grows_too_large_while_it_is_merged(process: Process) -> None:
    """Partials are merged on the way, but not beyond what the server takes."""

    class Text(Tally, name="text that grows"):
        def merge(self, other: Any) -> None:
            self.doc["text"] = self.doc["text"] + other.doc["text"]

        def execute(self) -> None:
            lengths.append(len(self.doc["text"]))

    lengths: list[int] = []
    update = Text(process, "record", doc={"text": ""})
    for _ in range(150):
        update.doc = {"text": "x" * 20_000}
        update.cache()
    update.end_session()
    assert lengths == [150 * 20_000]


def test_a_value_that_is_too_large_with_an_event_loop(small_server: Redis, namespace: str) -> None:
    api = APIS[1]
    kind = api.tally()

    async def tried() -> None:
        async with AsyncProcess(url=small_server.url, namespace=namespace) as process:
            cache: Any = AsyncLruCache()
            with pytest.raises(NotStorableError):
                await cache.set("large", kind(process, "large", doc=doc()))
            await cache.set("small", kind(process, "small", doc={"n": 1}))
        assert [entry.record for entry in kind.written] == ["small"]

    asyncio.run(tried())


# A server that was demoted


@pytest.mark.parametrize("api", APIS[:2], ids=lambda api: api.name)
def test_a_replica_names_its_primary(api: Api, own_server: Redis, namespace: str) -> None:
    async def tried() -> None:
        process = api.process(url=own_server.url, namespace=namespace, retry_timeout=1)
        if api.is_async:
            await process.start()
        with own_server.client() as client:
            client.replicaof("127.0.0.1", 1)
            with pytest.raises(ConnectionLostError) as caught:
                await got(process.create_reference("resource"))
            assert "it is a replica now, and its primary is at 127.0.0.1:1" in str(caught.value)
            client.replicaof("NO", "ONE")
        with contextlib.suppress(ConnectionLostError):
            await got(process.flush())
        await got(process.stop())

    asyncio.run(tried())


# A server that takes nothing in, for a while or until somebody sees to it


class Trouble(NamedTuple):
    """Something that a server refuses calls for.

    Attributes:
        begin: Make it so.
        end: See to it.
        told: What the error says, the remedy included.
        at_once: Whether callers are told before `retry_timeout`.
    """

    begin: Callable[[Redis, Any], object]
    end: Callable[[Redis, Any], object]
    told: str
    at_once: bool


def fill_disk(server: Redis, client: Any) -> None:
    """Let no file grow: a write of the append-only file fails as on a full disk."""
    assert server.popen is not None
    prlimit(server.popen.pid, RLIMIT_FSIZE, (0, RLIM_INFINITY))
    with contextlib.suppress(redis.ResponseError):
        client.set("written", 1)

    def is_full() -> bool:
        with contextlib.suppress(redis.ResponseError):
            client.set("written", 2)
        return bool(client.info("persistence")["aof_last_write_status"] == "err")

    wait_until(is_full)


def free_disk(server: Redis, client: Any) -> None:
    assert server.popen is not None
    prlimit(server.popen.pid, RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))
    wait_until(lambda: client.info("persistence")["aof_last_write_status"] == "ok")


TROUBLES = {
    "full disk": Trouble(fill_disk, free_disk, "MISCONF .* make room there", at_once=True),
    "right": Trouble(
        lambda _, client: client.execute_command("ACL SETUSER default -fcall"),
        lambda _, client: client.execute_command("ACL SETUSER default +fcall"),
        r"NOPERM .* ACL SETUSER <user> \+fcall",
        at_once=True,
    ),
    "keys": Trouble(
        lambda _, client: client.execute_command("ACL SETUSER default resetkeys ~other"),
        lambda _, client: client.execute_command("ACL SETUSER default allkeys"),
        "NOPERM .* ACL SETUSER",
        at_once=True,
    ),
    "replicas": Trouble(
        lambda _, client: client.config_set("min-replicas-to-write", 1),
        lambda _, client: client.config_set("min-replicas-to-write", 0),
        "NOREPLICAS .* start them, or lower its min-replicas-to-write",
        at_once=False,
    ),
    "replica": Trouble(
        lambda _, client: client.replicaof("127.0.0.1", 1),
        lambda _, client: client.replicaof("NO", "ONE"),
        "its primary is at 127.0.0.1:1",
        at_once=False,
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
@pytest.mark.parametrize("api", APIS[:2], ids=lambda api: api.name)
def test_a_server_that_takes_nothing_in_says_what_to_do(
    api: Api, namespace: str, trouble: Trouble
) -> None:
    """The calls are kept, and carried out once; those to come are told the same."""
    patience = 1000 if trouble.at_once else 0.3

    async def tried(server: Redis, client: Any) -> None:
        process = api.process(
            url=server.url, namespace=namespace, retry_timeout=patience, heartbeat_interval=50
        )
        if api.is_async:
            await process.start()
        update = api.tally()(process, "record", doc={"n": 1}, init_cache=False)
        trouble.begin(server, client)
        for call in (
            update.cache,
            lambda: process.create_reference("resource"),
            process.lock("lock", timeout=1).acquire,
        ):
            with pytest.raises(ConnectionLostError, match=trouble.told) as caught:
                await got(call())
            assert "nothing local is lost" in str(caught.value)
            assert "does not answer (" not in str(caught.value) or not trouble.at_once
        trouble.end(server, client)
        await got(process.flush())
        await got(update.end_session())
        await got(process.stop())
        assert [entry.doc for entry in type(update).written] == [{"n": 1}]

    server = Redis("--appendonly", "yes", "--appendfsync", "everysec")
    with contextlib.closing(server), server.client() as client:
        asyncio.run(tried(server, client))


def test_a_flush_says_what_is_wrong(own_server: Redis, namespace: str) -> None:
    with own_server.client() as client:
        process = Process(url=own_server.url, namespace=namespace, retry_timeout=0.3)
        client.config_set("min-replicas-to-write", 1)
        with pytest.raises(ConnectionLostError):
            process.create_reference("resource")
        with pytest.raises(ConnectionLostError, match="min-replicas-to-write") as caught:
            process.flush()
        assert "call flush() again" in caught.value.__notes__[0]
        client.config_set("min-replicas-to-write", 0)
        process.stop()


@pytest.mark.parametrize("word", sorted(failures.REMEDIES))
def test_each_answer_of_a_server_in_trouble_has_its_remedy(word: str) -> None:
    error = failures.lost("redis://host", ResponseError(f"{word} this is so"))
    assert str(error).startswith(
        f"redis://host answered: {word} this is so; {failures.REMEDIES[word]}; nothing local"
    )


# A cache that outlives its event loop


def test_a_cache_serves_one_loop_after_the_other(server: Redis, namespace: str) -> None:
    cache: Any = AsyncLruCache()
    kind = APIS[1].tally()

    async def use(record: str) -> None:
        async with AsyncProcess(url=server.url, namespace=namespace) as process:
            await cache.purge()
            await cache.expire_all()
            await cache.expire_oldest()
            with pytest.raises(KeyError):
                await cache.get("missing")
            await cache.set(record, kind(process, record, doc={"n": 1}))

    for record in ("one", "two", "three"):
        asyncio.run(use(record))
    assert [entry.record for entry in kind.written] == ["one", "two", "three"]
