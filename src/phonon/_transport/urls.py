"""URLs of servers, taken apart."""

import math
import re
import threading
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from redis.backoff import NoBackoff
from redis.connection import URL_QUERY_ARGUMENT_PARSERS
from redis.retry import Retry

from phonon._transport.steps import SOCKET_TIMEOUT
from phonon.errors import ConfigurationError

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379
HIGHEST_PORT = 65535

#: The form of each scheme's URL. With TLS it begins with ``rediss``.
FORMS = {
    "redis": "redis://[user:password@]host[:port][/database]",
    "unix": "unix://[user:password@]/path/of/the/socket[?db=database]",
    "redis+cluster": "redis+cluster://[user:password@]host[:port],host[:port]",
    "redis+sentinel": (
        "redis+sentinel://[user:password@]host[:port],host[:port]/service[/database]"
        "[?sentinel_password=password]"
    ),
    "embedded": "embedded://[/path/of/a/directory]",
}

# A name or password with a character that should have been encoded must not be read as another part
# of the URL: an error repeats the parts that could be read, and never the others.
_USER = "(?:(?P<user>[^:@/?#]*):(?P<password>[^@/?#]*)@)?"
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/:@,?#\[\]%]+)(?::[0-9]{1,5})?"
_HOSTS = f"(?P<hosts>{_HOST}(?:,{_HOST})*)"
_QUERY = "(?:[?](?P<query>[^@#]*))?"
_PLACES = {
    "redis": f"(?P<hosts>{_HOST})?(?:/(?P<db>[0-9]{{0,9}}))?",
    "unix": "(?P<path>/[^?#]+)",
    "redis+cluster": f"{_HOSTS}/?0?",
    "redis+sentinel": f"{_HOSTS}/(?P<path>[^/?#@]+)(?:/(?P<db>[0-9]{{0,9}}))?",
}
_URLS = {
    scheme: re.compile(f"{_USER}(?P<place>{place}){_QUERY}") for scheme, place in _PLACES.items()
} | {"embedded": re.compile("(?P<place>(?P<path>[^?#]*))")}

#: Options of every client. The transport repeats calls itself, byte for byte; a client that
#: repeated them too would only multiply the time until a failure is noticed.
OPTIONS: dict[str, Any] = {
    "socket_timeout": SOCKET_TIMEOUT,
    "socket_connect_timeout": SOCKET_TIMEOUT,
    "retry": Retry(NoBackoff(), 0),
}

_READERS: dict[str, Any] = dict(URL_QUERY_ARGUMENT_PARSERS)
#: Options that are objects in redis-py, or that Phonon sets itself.
_NOT_IN_A_URL = frozenset(
    {
        "command_packer",
        "connection_class",
        "connection_pool",
        "credential_provider",
        "parser_class",
        "redis_connect_func",
    }
)
_REPEATING = frozenset({"retry", "retry_on_error", "retry_on_timeout"})
_CERT_REQS = frozenset({"none", "optional", "required"})


class Address(NamedTuple):
    """A URL, taken apart.

    Attributes:
        scheme: As in `FORMS`.
        shown: The URL for messages: without passwords and options.
        nodes: Hosts and ports.
        path: A socket, a directory, or a sentinel's service.
        options: Arguments for redis-py: database, credentials, TLS, time-outs.
        for_sentinel: The options that are only for talking to sentinels.
    """

    scheme: str
    shown: str
    nodes: list[tuple[str, int]]
    path: str
    options: dict[str, Any]
    for_sentinel: dict[str, Any]


def parse(url: str) -> Address:
    """Take a URL apart.

    Raises:
        ConfigurationError: The URL is invalid.
    """
    spelled, separator, rest = url.partition("://")
    scheme, tls = _scheme(spelled)
    if not separator or scheme not in FORMS:
        raise ConfigurationError(
            f"this is no URL of a server: one reads {', '.join(FORMS.values())}; with TLS it "
            "begins with rediss; valkey and valkeys mean the same as redis and rediss"
        )
    match = _URLS[scheme].fullmatch(rest)
    if match is None:
        raise ConfigurationError(
            f"this {scheme}:// URL cannot be read: one is {FORMS[scheme]}, where characters like "
            "/ ? # @ % in a name or password are written %2F %3F %23 %40 %25 (a password alone is "
            ":password@)"
        )
    parts = match.groupdict()
    user = "" if parts.get("password") is None else f"{parts['user']}:***@"
    shown = f"{spelled}://{user}{parts['place']}"
    options = _options(shown, parts.get("query") or "", tls=tls)
    if user:
        options |= {
            "username": unquote(parts["user"]) or None,
            "password": unquote(parts["password"]),
        }
    if parts.get("db"):
        options["db"] = int(parts["db"])
    for_sentinel = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in list(options)
        if scheme == "redis+sentinel" and name.startswith("sentinel_")
    }
    default = DEFAULT_SENTINEL_PORT if scheme == "redis+sentinel" else DEFAULT_PORT
    nodes = _nodes(shown, parts.get("hosts") or "localhost", default)
    return Address(scheme, shown, nodes, unquote(parts.get("path") or ""), options, for_sentinel)


def _scheme(spelled: str) -> tuple[str, bool]:
    """Return a scheme as in `FORMS`, and whether it means TLS."""
    name, plus, kind = spelled.partition("+")
    name = {"valkey": "redis", "valkeys": "rediss"}.get(name, name)
    tls = name == "rediss"
    return f"{'redis' if tls else name}{plus}{kind}", tls


def _options(shown: str, query: str, *, tls: bool) -> dict[str, Any]:
    """Return the options after the ``?``, and those that Phonon sets."""
    options: dict[str, Any] = {"ssl": True} if tls else {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        _check_option(shown, name, text, tls=tls)
        try:
            value = _READERS.get(name, str)(text)
        except (TypeError, ValueError):
            value = math.nan
        if isinstance(value, float) and not 0 < value < threading.TIMEOUT_MAX:
            raise ConfigurationError(f"{shown}: the value of its option {name} cannot be read")
        options[name] = value
    return {**OPTIONS, **options}


def _check_option(shown: str, name: str, text: str, *, tls: bool) -> None:
    if name.startswith("ssl") and not tls:
        raise ConfigurationError(
            f"{shown} has TLS options: with TLS a URL begins with rediss instead of redis"
        )
    if name in _REPEATING:
        raise ConfigurationError(
            f"{shown}: its option {name} is not needed: Phonon repeats calls itself, for as long "
            "as Process(retry_timeout=...) says"
        )
    if name in _NOT_IN_A_URL:
        raise ConfigurationError(
            f"{shown}: its option {name} cannot be written in a URL: make a redis-py client with "
            "it, and give that as client="
        )
    if name == "ssl_cert_reqs" and text not in _CERT_REQS:
        raise ConfigurationError(f"{shown}: its option ssl_cert_reqs is required, optional or none")


def _nodes(shown: str, hosts: str, default: int) -> list[tuple[str, int]]:
    """Return hosts and their ports."""
    found = []
    for node in hosts.split(","):
        host, _, port = node.rpartition(":") if re.search(":[0-9]+$", node) else (node, "", default)
        if not 0 < int(port) <= HIGHEST_PORT:
            raise ConfigurationError(f"{shown}: a port is a number from 1 to {HIGHEST_PORT}")
        try:
            host.encode("idna")  # as the resolver does: a label must be neither empty nor too long
        except UnicodeError as error:
            raise ConfigurationError(f"{shown}: {host!r} is no name of a host") from error
        found.append((host.strip("[]"), int(port)))
    return found
