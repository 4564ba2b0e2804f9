"""`Admin` for programs with an event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self, TypeVar

from phonon._admin.pages import Walk, next_page
from phonon._transport import async_io
from phonon._transport.connect import SharedConnection
from phonon._transport.steps import Steps
from phonon.admin import (
    Act,
    AdminOptions,
    BaseAdmin,
    BatchState,
    BatchStatus,
    Finding,
    LockStatus,
    Partial,
    ProcessStatus,
    ResourceStatus,
    SessionStatus,
    SourceStatus,
    check_older,
    check_token,
    states_of,
)
from phonon.errors import ConfigurationError
from phonon.settings import check_count, check_flag, check_name

T = TypeVar("T")


class AsyncAdmin(BaseAdmin):
    """Reads a namespace, and acts on it, without becoming one of its processes; see `Admin`.

    Use it in an ``async with`` block, or await `start` and `close`. It belongs to the event loop in
    which it was started.

    Args:
        url: The server's URL.
        client: A ``redis.asyncio`` client to use instead.
        namespace: The namespace.
        timeout: Seconds to go on asking a server that does not answer.
        who: The operator's name, for the log on the server. None: user, host and process.

    Example:
        >>> async with AsyncAdmin() as admin:
        ...     async for batch in admin.batches(state="parked"):
        ...         print(batch.resource, batch.token, batch.error)
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client: Any = None,
        namespace: str = "phonon",
        timeout: float = 15.0,
        who: str | None = None,
    ) -> None:
        self._options = AdminOptions(url, client, namespace, timeout, who)
        self.namespace = namespace
        self._connection: SharedConnection | None = None

    async def start(self) -> Self:
        """Connect. A second call does nothing.

        Raises:
            ServerUnreachableError: There is no server.
            ServerError: The server cannot be used.
        """
        if self._connection is None:
            backend = async_io.backend(asyncio.get_running_loop())
            connection = await async_io.run(self._options.open(backend))
            self._begin(connection, self.namespace, self._options)
            self._connection = connection
        return self

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<phonon.aio.AsyncAdmin of {self.namespace!r}>"

    @property
    def address(self) -> str:
        """Return the server's address, without a password."""
        return self._started().server.address

    def _started(self) -> SharedConnection:
        if self._connection is None:
            raise ConfigurationError("this AsyncAdmin was not started: use it in an async with")
        return self._connection

    async def _run(self, steps: Callable[[], Steps[T]]) -> T:
        self._started()
        return await async_io.run(steps())

    async def _iterate(self, begin: Callable[[], Walk[T]]) -> AsyncIterator[T]:
        self._started()
        walk = begin()
        while (page := await async_io.run(next_page(walk))) is not None:
            for entry in page:
                yield entry

    async def close(self) -> None:
        """Close the connection. A second call does nothing."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await async_io.run(connection.close())

    async def processes(self) -> list[ProcessStatus]:
        """See `Admin.processes`."""
        return await self._run(lambda: self._inspector.processes())  # noqa: PLW0108 - looked up once it has started

    def locks(self, prefix: str = "") -> AsyncIterator[LockStatus]:
        """See `Admin.locks`."""
        check_name("prefix", prefix)
        return self._iterate(lambda: self._inspector.locks(prefix))

    async def lock(self, name: str, *, semaphore: bool = False) -> LockStatus | None:
        """See `Admin.lock`."""
        check_name("name", name)
        check_flag("semaphore", semaphore)
        return await self._run(lambda: self._inspector.lock(name, semaphore=semaphore))

    def sessions(
        self, older: float | None = None, prefix: str = ""
    ) -> AsyncIterator[SessionStatus]:
        """See `Admin.sessions`."""
        check_older(older)
        check_name("prefix", prefix)
        return self._iterate(lambda: self._inspector.sessions(older, prefix))

    async def oldest_sessions(
        self, most: int, older: float | None = None, prefix: str = ""
    ) -> list[SessionStatus]:
        """See `Admin.oldest_sessions`."""
        check_count("most", most)
        check_older(older)
        check_name("prefix", prefix)
        return await self._run(lambda: self._inspector.oldest_sessions(most, older, prefix))

    def batches(
        self, state: BatchState | Sequence[BatchState] | None = None, prefix: str = ""
    ) -> AsyncIterator[BatchStatus]:
        """See `Admin.batches`."""
        states = states_of(state)
        check_name("prefix", prefix)
        return self._iterate(lambda: self._inspector.batches(states, prefix))

    async def sources(self) -> list[SourceStatus]:
        """See `Admin.sources`."""
        return await self._run(lambda: self._inspector.sources())  # noqa: PLW0108 - as above

    async def resource(self, name: str) -> ResourceStatus:
        """See `Admin.resource`."""
        check_name("name", name)
        return await self._run(lambda: self._inspector.resource(name))

    def content(self, resource: str, token: int | None = None) -> AsyncIterator[Partial]:
        """See `Admin.content`."""
        check_name("resource", resource)
        if token is not None:
            check_token(token)
        return self._iterate(lambda: self._inspector.content(resource, token))

    async def examine(self) -> list[Finding]:
        """See `Admin.examine`."""
        return await self._run(lambda: self._doctor.examine())  # noqa: PLW0108 - as above

    async def acts(self, most: int = 100) -> list[Act]:
        """See `Admin.acts`."""
        check_count("most", most)
        return await self._run(lambda: self._inspector.acts(most))

    async def replay(self, resource: str, token: int) -> str:
        """See `Admin.replay`."""
        check_name("resource", resource)
        check_token(token)
        return await self._run(lambda: self._acts.replay(resource, token))

    async def discard(self, resource: str, token: int) -> str:
        """See `Admin.discard`."""
        check_name("resource", resource)
        check_token(token)
        return await self._run(lambda: self._acts.discard(resource, token))

    async def break_lock(self, name: str, token: int, *, semaphore: bool = False) -> str:
        """See `Admin.break_lock`."""
        check_name("name", name)
        check_token(token)
        check_flag("semaphore", semaphore)
        return await self._run(lambda: self._acts.break_lock(name, token, semaphore=semaphore))

    async def expire(self, process: str) -> str:
        """See `Admin.expire`."""
        check_name("process", process)
        return await self._run(lambda: self._acts.expire(process))
