"""The ASGI application: pages, and answers in JSON that are read from the server on request."""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phonon._admin.plain import plain
from phonon.admin import BatchState
from phonon.aio.admin import AsyncAdmin
from phonon.errors import ConfigurationError, PhononError
from phonon.settings import check_hosts, check_name
from phonon.web.history import History

#: Entries of a listing that a page shows, and partials of a batch.
MOST, MOST_PARTIALS = 200, 50
#: The least number of characters of a token, so that it cannot be guessed.
SHORTEST_TOKEN = 16

_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class _Headers:
    """Adds headers that limit the browser to the needs of the page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, add)


class PageRequests:
    """Answers the page's requests.

    Args:
        admin: The admin to read with and to act with.
        token: The token for acts; None if the page is read-only.
    """

    def __init__(self, admin: AsyncAdmin, token: str | None) -> None:
        self._admin = admin
        self._token = token
        self._starting = asyncio.Lock()
        self._history = History(admin)

    async def _ready(self) -> AsyncAdmin:
        async with self._starting:
            await self._admin.start()
        self._history.ensure_alive()
        return self._admin

    async def close(self) -> None:
        """Stop sampling, and close the connection. Another request opens a new one."""
        self._history.close()
        await self._admin.close()

    async def overview(self, _: Request) -> Any:
        """The summary of the namespace."""
        admin = await self._ready()
        sample = await self._history.latest()
        oldest = await admin.oldest_sessions(1)
        return {
            "namespace": admin.namespace,
            "address": admin.address,
            "writable": self._token is not None,
            "processes": sample.processes,
            "parked": sample.parked,
            "waiting": sample.waiting,
            "sample": sample.figures(),
            "oldest": oldest[0] if oldest else None,
            "sources": await admin.sources(),
            "history": self._history.rows(),
        }

    async def locks(self, request: Request) -> Any:
        """The locks."""
        admin = await self._ready()
        return await _some(admin.locks(request.query_params.get("prefix", "")))

    async def sessions(self, request: Request) -> Any:
        """The oldest sessions."""
        admin = await self._ready()
        return await admin.oldest_sessions(MOST, None, request.query_params.get("prefix", ""))

    async def batches(self, request: Request) -> Any:
        """The batches: dead letters first."""
        admin = await self._ready()
        prefix = request.query_params.get("prefix", "")
        others: list[BatchState] = [
            "waiting-for-class",
            "waiting-for-survivor",
            "retrying",
            "running",
        ]
        parked = await _some(admin.batches("parked", prefix))
        return parked + await _some(admin.batches(others, prefix))

    async def resource(self, request: Request) -> Any:
        """One resource, with the data of its session or of a batch."""
        admin = await self._ready()
        name, token = request.query_params["name"], request.query_params.get("token")
        found = await admin.resource(name)
        walk = admin.content(name, int(token) if token else None)
        return {**found._asdict(), "content": await _some(walk, MOST_PARTIALS)}

    async def acts(self, _: Request) -> Any:
        """The acts of operators."""
        return await (await self._ready()).acts(MOST)

    async def doctor(self, _: Request) -> Any:
        """The problems that the doctor finds."""
        return await (await self._ready()).examine()

    async def act(self, request: Request) -> Any:
        """Replay, discard, unlock or expire."""
        if self._token is None:
            return _refusal(403, "this page is read-only: start it with a token to act")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return _refusal(401, "the token is not the one that this page was started with")
        admin = await self._ready()
        kind, body = request.path_params["act"], await request.json()
        name = str(body.get("resource", ""))
        token = int(body.get("token") or 0)
        if kind == "replay":
            text = await admin.replay(name, token)
        elif kind == "discard":
            text = await admin.discard(name, token)
        elif kind == "unlock":
            text = await admin.break_lock(name, token, semaphore=bool(body.get("semaphore")))
        elif kind == "expire":
            text = await admin.expire(name)
        else:
            return _refusal(404, f"there is no act {kind!r}")
        return {"said": text}


async def _some(entries: Any, most: int = MOST) -> list[Any]:
    found: list[Any] = []
    async for entry in entries:
        found.append(entry)
        if len(found) >= most:
            break
    return found


def _refusal(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status)


def _answer(function: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Any]:
    """Make a function of the page answer in JSON, errors included."""

    async def answer(request: Request) -> Response:
        try:
            found = await function(request)
        except (KeyError, ValueError, TypeError) as error:
            status = 400
            text = str(error) if isinstance(error, PhononError) else "the request cannot be read"
            return _refusal(status, text)
        except PhononError as error:
            return _refusal(409 if request.method == "POST" else 503, str(error))
        if isinstance(found, Response):
            return found
        return JSONResponse(_for_browsers(plain(found)))

    return answer


def _for_browsers(value: Any) -> Any:
    """Convert tokens to text, because numbers above 2^53 lose digits in browsers."""
    if isinstance(value, dict):
        return {
            name: str(part) if name == "token" and isinstance(part, int) else _for_browsers(part)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return [_for_browsers(part) for part in value]
    return value


async def _file(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    if name not in _FILES:
        return Response(status_code=404)
    content = (resources.files("phonon.web") / "static" / name).read_bytes()
    return Response(content, media_type=_FILES[name])


async def _index(request: Request) -> Response:
    if not request.url.path.endswith("/"):
        return RedirectResponse(f"{request.url.path}/")  # relative links need the slash
    return await _file(request)


def make(admin: AsyncAdmin, *, token: str | None, hosts: tuple[str, ...] | None) -> Starlette:
    """Return the application; see `phonon.web.create_app`.

    Raises:
        ConfigurationError: An argument is invalid.
    """
    if token is not None and len(check_name("token", token)) < SHORTEST_TOKEN:
        raise ConfigurationError(
            f"token has {len(token)} characters: one that cannot be guessed has at least "
            f"{SHORTEST_TOKEN}; python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    if hosts is not None:
        check_hosts(hosts)
    page = PageRequests(admin, token)
    reads = {
        name: getattr(page, name)
        for name in ("overview", "locks", "sessions", "batches", "resource", "acts", "doctor")
    }
    middleware = [Middleware(_Headers)]
    if hosts is not None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await page.close()

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", _index),
            *(Route(f"/api/{name}", _answer(read)) for name, read in reads.items()),
            Route("/api/act/{act}", _answer(page.act), methods=["POST"]),
            Route("/{name}", _file),
        ],
        middleware=middleware,
    )
    app.state.close = page.close
    return app
