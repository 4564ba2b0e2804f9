"""The parts of a URL, and the errors for invalid ones."""

import re
from typing import Any

import pytest

from phonon._transport import connect, urls
from phonon.errors import ConfigurationError
from support.transport import Lab

SECRET = "sEcReT"  # noqa: S105 - a test's


@pytest.mark.parametrize(
    ("url", "scheme", "nodes", "path", "options"),
    [
        ("redis://", "redis", [("localhost", 6379)], "", {}),
        ("redis:///3", "redis", [("localhost", 6379)], "", {"db": 3}),
        ("valkey:///3", "redis", [("localhost", 6379)], "", {"db": 3}),
        ("redis://h", "redis", [("h", 6379)], "", {}),
        (
            "redis://h:1/2?socket_timeout=2.5",
            "redis",
            [("h", 1)],
            "",
            {"db": 2, "socket_timeout": 2.5},
        ),
        ("redis://[::1]:7/", "redis", [("::1", 7)], "", {}),
        ("redis://h?db=4&client_name=x", "redis", [("h", 6379)], "", {"db": 4, "client_name": "x"}),
        (
            "valkeys://u:%2F%3F%23%40%3A%25@h?ssl_cert_reqs=none",
            "redis",
            [("h", 6379)],
            "",
            {"username": "u", "password": "/?#@:%", "ssl": True, "ssl_cert_reqs": "none"},
        ),
        ("redis://:p:w@h", "redis", [("h", 6379)], "", {"username": None, "password": "p:w"}),
        ("unix:///a@b%20c?db=1", "unix", [("localhost", 6379)], "/a@b c", {"db": 1}),
        (
            "unix://u:p@/s",
            "unix",
            [("localhost", 6379)],
            "/s",
            {"username": "u", "password": "p"},
        ),
        (
            "valkey+cluster://u:p@h:1,[::1]:2,c",
            "redis+cluster",
            [("h", 1), ("::1", 2), ("c", 6379)],
            "",
            {"username": "u", "password": "p"},
        ),
        ("rediss+cluster://h/0", "redis+cluster", [("h", 6379)], "", {"ssl": True}),
        ("redis+sentinel://a,b:3/s", "redis+sentinel", [("a", 26379), ("b", 3)], "s", {}),
        (
            "valkeys+sentinel://a/s%20t/2",
            "redis+sentinel",
            [("a", 26379)],
            "s t",
            {"db": 2, "ssl": True},
        ),
        ("embedded://", "embedded", [("localhost", 6379)], "", {}),
        ("embedded:///a/b%20c", "embedded", [("localhost", 6379)], "/a/b c", {}),
    ],
)
def test_url_is_taken_apart(
    url: str, scheme: str, nodes: list[tuple[str, int]], path: str, options: dict[str, Any]
) -> None:
    address = urls.parse(url)
    assert (address.scheme, address.nodes, address.path) == (scheme, nodes, path)
    assert address.options == {**urls.OPTIONS, **options}


def test_options_for_sentinels_are_only_for_them() -> None:
    address = urls.parse("redis+sentinel://u:p@a/s?sentinel_password=q&sentinel_username=v")
    assert address.for_sentinel == {"username": "v", "password": "q"}
    assert address.options.items() >= {"username": "u", "password": "p"}.items()
    assert address.shown == "redis+sentinel://u:***@a/s"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("", "this is no URL of a server"),
        (f"u:{SECRET}@localhost:6379", "this is no URL of a server"),
        ("REDIS://localhost", "this is no URL of a server"),
        ("rediss+unix:///x", "this is no URL of a server"),
        (f"redis://u:x@{SECRET}@h", "are written %2F"),
        (f"redis://u:{SECRET}/x@h", "are written %2F"),
        (f"redis://u:{SECRET}@h:99999", "a port is a number"),
        (f"redis://u:{SECRET}@a..b", "no name of a host"),
        (f"redis://h?password={SECRET}&socket_timeout=soon", "its option socket_timeout"),
        (f"redis://h?password={SECRET}&socket_timeout=nan", "its option socket_timeout"),
        (f"redis://h?password={SECRET}&retry=3", "retry is not needed: Phonon repeats"),
        (f"redis://h?password={SECRET}&retry_on_timeout=yes", "Phonon repeats calls itself"),
        (f"redis://h?password={SECRET}&credential_provider=x", "cannot be written in a URL"),
        (f"redis://h?password={SECRET}&ssl_cert_reqs=none", "begins with rediss"),
        (f"rediss://h?password={SECRET}&ssl_cert_reqs=CERT_NONE", "required, optional or none"),
        (f"redis://h?password={SECRET}&colour=blue", "this option.*: colour"),
        (f"redis://h?password={SECRET}&protocol=9", "this option"),
        (f"redis+cluster://u:{SECRET}@a?db=2", "no database but 0"),
        (f"redis+cluster://u:{SECRET}@a?health_check_interval=3", "health_check_interval"),
        (f"redis+sentinel://u:{SECRET}@h", "are written %2F"),
        (
            f"redis+sentinel://h/s?sentinel_password={SECRET}&sentinel_colour=blue",
            "sentinel_colour",
        ),
        (f"embedded:///x?password={SECRET}", "are written %2F"),
    ],
)
@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_malformed_url(url: str, hint: str, kind: str) -> None:
    lab = Lab(kind)
    with pytest.raises(ConfigurationError) as refusal:
        lab.connect(url)
    lab.close()
    assert re.search(hint, str(refusal.value))
    assert SECRET not in str(refusal.value)
    assert connect._shared == {}
