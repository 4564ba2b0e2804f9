"""The command ``web``: the operator's page."""

import ipaddress
import secrets
import webbrowser
from typing import Any

import click

from phonon.cli.errors import CommandError
from phonon.cli.options import target, target_options


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8480,
    show_default=True,
    help="The port; 0 for any free one.",
)
@click.option(
    "--act",
    is_flag=True,
    help="Allow replay, discard, unlock and expire with a token, which is printed.",
)
@click.option(
    "--token",
    envvar="PHONON_WEB_TOKEN",
    show_envvar=True,
    metavar="TOKEN",
    help="Use this token instead of a new one.",
)
@click.option("--hostname", multiple=True, help="Another host name of the page.")
@click.option("--open", "open_", is_flag=True, help="Open the page in a browser.")
@target_options
def web(
    host: str,
    port: int,
    act: bool,
    token: str | None,
    hostname: tuple[str, ...],
    open_: bool,
    **where: Any,
) -> None:
    """Serve the operator's page for a browser.

    The page shows what the other commands show, live. It listens on this host only, unless you
    give --host, and is read-only unless you give --act. It has neither users nor TLS: put a proxy
    in front of it if others can reach it.
    """
    try:
        import uvicorn  # noqa: PLC0415 - an extra

        from phonon.web import create_app  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise CommandError("the page needs uvicorn: pip install 'phonon[web]'") from error
    place = target(where)
    if token or act:
        token = token or secrets.token_urlsafe(24)
    names = ("localhost", "127.0.0.1", "[::1]", host, *hostname)
    app = create_app(
        place.url,
        namespace=place.namespace,
        token=token,
        hosts=tuple(dict.fromkeys(names)),
        timeout=place.timeout,
    )
    with place.open():
        pass  # reports a missing server now, not in the browser
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()  # a reader of the address may connect at once
    shown = f"http://{_bracketed(host)}:{socket.getsockname()[1]}/"
    click.echo(f"Phonon's page: {shown}")
    if act:
        click.echo(f"token for acts: {token}")
    if not _is_loopback(host):
        click.echo("anyone who can reach this host can read it", err=True)
    if open_:
        webbrowser.open(shown)
    server.run([socket])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
