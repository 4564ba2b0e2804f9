"""The operator's page: the data of `phonon.Admin`, in a browser. Extra ``web``.

`create_app` returns an ASGI application, to be served alone (``phonon web``) or mounted into
another one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["create_app"]


def create_app(
    url: str | None = None,
    *,
    namespace: str = "phonon",
    token: str | None = None,
    hosts: "tuple[str, ...] | None" = None,
    timeout: float = 15.0,
) -> "Starlette":
    """Return the page as an ASGI application.

    It connects at the first request. Served alone it closes its connection at shutdown. If it
    is mounted, await its ``state.close()`` in the other application's lifespan.

    Args:
        url: The Redis or Valkey server; see `phonon.Admin`.
        namespace: The namespace.
        token: The token for acts (replay, discard, unlock, expire). None: the page is read-only.
        hosts: The allowed host names, against DNS rebinding. None: any name, if the application
            that mounts it checks them.
        timeout: Seconds to go on asking a server that does not answer.

    Raises:
        ConfigurationError: An argument is invalid, or the extra is not installed.

    Example:
        >>> from starlette.applications import Starlette  # doctest: +SKIP
        >>> application = Starlette()  # doctest: +SKIP
        >>> application.mount("/phonon", create_app("redis://localhost:6379/1"))  # doctest: +SKIP
    """
    from phonon.aio.admin import AsyncAdmin  # noqa: PLC0415 - light to import
    from phonon.errors import ConfigurationError  # noqa: PLC0415 - light to import

    try:
        from phonon.web import app  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "starlette":
            raise
        raise ConfigurationError(
            "the operator's page needs starlette: pip install 'phonon[web]'"
        ) from error
    admin = AsyncAdmin(url, namespace=namespace, timeout=timeout)
    made: Any = app.make(admin, token=token, hosts=hosts)
    found: Starlette = made
    return found
