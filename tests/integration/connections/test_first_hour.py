"""The first lines that people type work, or raise one sentence with the remedy."""

import asyncio
from typing import Any

import pytest

from phonon import ConflictFreeUpdate, LruCache, Process
from phonon.aio import AsyncProcess
from phonon.errors import AlreadyLockedError, ConfigurationError, LockLostError
from support.world import Make, Redis, retry_now


@pytest.fixture
def tcp(own_server: Redis) -> int:
    """The port of a server."""
    with own_server.client() as client:
        for port in range(20_000 + own_server_offset(own_server), 60_000):
            try:
                client.config_set("port", str(port))
            except Exception:  # noqa: BLE001, S112 - taken: the next one
                continue
            return port
    raise AssertionError("no port is free")


def own_server_offset(server: Redis) -> int:
    assert server.popen is not None
    return server.popen.pid % 30_000


def test_a_url_is_the_first_argument(tcp: int) -> None:
    for scheme in ("redis", "valkey"):
        with Process(f"{scheme}://localhost:{tcp}/1") as process:
            assert process.client.ping()


def test_valkeys_speaks_tls() -> None:
    # The plain server that would answer is not asked: the connection is one with TLS.
    with pytest.raises(ConfigurationError, match="TLS"):
        Process("valkey://localhost/0?ssl_cert_reqs=none")
    with pytest.raises(Exception, match="valkeys://localhost:1"):
        Process("valkeys://localhost:1/0", retry_timeout=0.1)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("localhost",), 'write "redis://localhost"'),
        (("localhost:6380",), 'write "redis://localhost:6380"'),
        ((object.__new__(type("Redis", (), {"execute_command": 0})),), "give it as client="),
    ],
)
@pytest.mark.parametrize("cls", [Process, AsyncProcess])
def test_another_first_argument_says_what_to_write(
    cls: Any, arguments: tuple[Any, ...], remedy: str
) -> None:
    with pytest.raises(ConfigurationError, match=remedy):
        cls(*arguments)


def test_a_cache_says_what_it_holds(process: Process) -> None:
    with pytest.raises(ConfigurationError, match=r"a cache holds updates, not \{'n': 1\}"):
        LruCache[Any]().set("ada", {"n": 1})


class Failing(ConflictFreeUpdate):
    is_down = True

    def execute(self) -> None:
        if self.is_down:
            raise RuntimeError("the database is down")


def test_an_error_names_no_database_that_the_user_never_named(
    monkeypatch: pytest.MonkeyPatch, process: Process
) -> None:
    update = Failing(process, "ada", doc={"n": 1})
    with pytest.raises(RuntimeError, match="the database is down") as caught:
        update.end_session()
    assert "of 'ada' failed" in caught.value.__notes__[0]
    assert "test.test" not in caught.value.__notes__[0]
    assert repr(update) == "<Failing of 'ada': {'n': 1}>"
    other = Failing(process, "ada", "shop", "users", doc={"n": 1})
    assert repr(other).startswith("<Failing of 'shop.users.ada'")
    monkeypatch.setattr(Failing, "is_down", False)
    retry_now(process)


def test_a_timeout_limits_the_wait_of_a_with_block(make: Make) -> None:
    one, two = make(), make()
    with one.lock("report"):
        for wait in (
            two.lock("report", timeout=0.05),
            two.create_reference("report").lock(timeout=0.05),
        ):
            with pytest.raises(AlreadyLockedError, match=r"after 0\.05 s of waiting"), wait:
                pass
        assert not two.lock("report", timeout=0.05).acquire()
    with two.lock("report", timeout=0.05):
        pass


def test_a_semaphore_has_a_timeout_too(make: Make) -> None:
    one, two = make(), make()
    wait = two.semaphore("places", 1, timeout=0.05)
    with one.semaphore("places", 1), pytest.raises(AlreadyLockedError), wait:
        pass


def test_a_token_is_an_int_in_a_with_block(process: Process) -> None:
    with process.lock("report") as lock:
        doubled: int = lock.token * 2  # as a type checker sees it, too
        assert doubled > 0


def test_a_lock_decorates_a_function(make: Make) -> None:
    one, two = make(), make()
    lock = one.lock("report")

    @lock
    def write(name: str, *, copies: int = 1) -> str:
        """Write."""
        assert lock.owned()
        assert two.lock("report").locked()
        return name * copies

    assert write("a", copies=3) == "aaa"
    assert (write.__name__, write.__doc__) == ("write", "Write.")
    assert not two.lock("report").locked()

    @lock
    def fail() -> None:
        raise ValueError("no paper")

    with pytest.raises(ValueError, match="no paper"):
        fail()
    assert not two.lock("report").locked()


def test_an_async_lock_decorates_a_coroutine_function(server: Redis, namespace: str) -> None:
    process = AsyncProcess(url=server.url, namespace=namespace)

    @process.lock("report", timeout=5)  # before the process is started, as at import
    async def write(name: str) -> tuple[str, bool]:
        return name, await process.lock("report").locked()

    async def main() -> None:
        async with process:
            assert await write("a") == ("a", True)
            assert not await process.lock("report").locked()
            async with process.lock("report") as lock:
                doubled: int = lock.token * 2
                assert doubled > 0

    asyncio.run(main())


def test_what_a_lock_cannot_be_held_around_is_refused(server: Redis, process: Process) -> None:
    async def coroutine() -> None: ...

    def generator() -> Any:
        yield

    def function() -> None: ...

    lock: Any = process.lock("report")
    with pytest.raises(ConfigurationError, match="use the lock of an AsyncProcess"):
        lock(coroutine)
    with pytest.raises(ConfigurationError, match="use a with block inside it"):
        lock(generator)
    with pytest.raises(ConfigurationError, match="write it above a function"):
        lock("report")
    awaited: Any = AsyncProcess(url=server.url).lock("report")
    with pytest.raises(ConfigurationError, match="make it an async function"):
        awaited(function)


def test_a_lock_that_is_not_held_has_no_token(process: Process) -> None:
    lock = process.lock("report")
    assert lock.token is None
    with pytest.raises(LockLostError, match="acquire it first"):
        lock.release()
