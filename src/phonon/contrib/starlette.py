"""Starlette and FastAPI: a process for each worker, and middleware that counts requests.

::

    phonon = Phonon("redis://localhost/1")
    app = FastAPI(lifespan=phonon.lifespan)
    app.add_middleware(CountRequests, phonon=phonon, update=Requests)
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from phonon.aio import AsyncLruCache, AsyncProcess, AsyncUpdate
from phonon.errors import ProcessStoppedError

log = logging.getLogger("phonon")

U = TypeVar("U", bound=AsyncUpdate)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Phonon:
    """A process and a cache for each worker of an ASGI application.

    Args:
        url: The server's URL; None: as for `AsyncProcess`.
        max_entries: The most records that a worker keeps.
        options: Arguments of `AsyncProcess`.
    """

    def __init__(
        self, url: str | None = None, *, max_entries: int = 10_000, **options: Any
    ) -> None:
        self._url = url
        self._options = options
        self._max_entries = max_entries
        self._process: AsyncProcess | None = None
        self._cache: AsyncLruCache[Any] = AsyncLruCache(max_entries)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[None]:
        """Start the process with the application, and end its sessions with it.

        Give it as ``lifespan=``, or enter it in a lifespan of your own.
        """
        del app
        async with AsyncProcess(url=self._url, **self._options) as process:
            self._cache = AsyncLruCache(self._max_entries)
            self._process = process
            try:
                yield
            finally:
                self._process = None

    def process(self) -> AsyncProcess:
        """Return the process: a dependency, ``Depends(phonon.process)``.

        Raises:
            ProcessStoppedError: The application's lifespan has not begun.
        """
        if self._process is None:
            raise ProcessStoppedError(
                "the application has not started this: FastAPI(lifespan=phonon.lifespan)"
            )
        return self._process

    async def add(self, kind: Callable[..., U], key: Any, **content: Any) -> None:
        """Merge a message into its record, and store it on the server.

        Args:
            kind: A subclass of `AsyncUpdate`.
            key: The record's key.
            content: Further arguments of the update, such as ``doc``. With ``init_cache=False``
                the data stays in this worker until the session ends, and is lost with the worker.
        """
        update = kind(self.process(), key, **content)
        await self._cache.set((kind, update.resource_id), update)


class CountRequests:
    """Middleware that counts requests into records, by method, route and status.

    Args:
        app: The application.
        phonon: The `Phonon` with the process to use.
        update: The records' class. Its ``doc`` is ``{"requests": 1, "seconds": …}``.
        key: Returns the record's key, given the scope and the status. None:
            ``"GET /users/{user} 200"``.
        content: Further arguments of the update, such as ``{"soft_session": 60}``.
    """

    def __init__(
        self,
        app: App,
        phonon: Phonon,
        update: Callable[..., AsyncUpdate],
        key: Callable[[Scope, int], str] | None = None,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        self._app = app
        self._phonon = phonon
        self._update = update
        self._key = key or _by_route
        self._content = content or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, then count it. An error of counting is logged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # the server's answer if the application raises
        loop = asyncio.get_running_loop()
        begun = loop.time()

        async def watch(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            doc = {"requests": 1, "seconds": loop.time() - begun}
            try:
                await self._phonon.add(
                    self._update, self._key(scope, status), doc=doc, **self._content
                )
            except Exception:
                log.exception("a request could not be counted")


def _by_route(scope: Scope, status: int) -> str:
    route = scope.get("route")  # a path with parameter names, so that not each user is a key
    path = getattr(route, "path", None) or ("-" if status == 404 else scope["path"])  # noqa: PLR2004
    return f"{scope['method']} {path} {status}"
