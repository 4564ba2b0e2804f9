"""Users' arguments are checked where they are given; each message names the remedy."""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest

from phonon.errors import ConfigurationError
from phonon.serializers import ExactSerializer
from phonon.settings import (
    Durability,
    RetryPolicy,
    check_callable,
    check_count,
    check_executor,
    check_name,
    check_parties,
    check_process,
    check_seconds,
    check_timeout,
    url_of,
)

GOOD: dict[str, Any] = {
    "session_length": 900,
    "heartbeat_interval": 10,
    "retry_timeout": 15.0,
    "namespace": "phonon",
    "partitions": None,
    "serializer": None,
    "retry": RetryPolicy(),
    "durability": None,
    "on_error": None,
    "max_backlog": 100_000,
    "overflow": "block",
    "is_async": False,
}
HERE = ("localhost", 6379, 1)


async def _coroutine() -> None:
    """Nothing to do."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retry_timeout": 3600},
        {"partitions": 1},
        {"partitions": 16384},
        {"serializer": ExactSerializer()},
        {"retry": RetryPolicy(1, 0, 0, 0, 0)},
        {"durability": Durability(replicas=2)},
        {"on_error": print},
        {"on_error": _coroutine, "is_async": True},
        {"overflow": "raise", "max_backlog": 1},
    ],
)
def test_what_is_accepted(options: dict[str, Any]) -> None:
    check_process(**{**GOOD, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"session_length": 0}, "session_length is a number of seconds above 0, not 0"),
        ({"session_length": float("nan")}, "session_length is a number"),
        ({"session_length": "900"}, "session_length is a number of seconds above 0, not '900'"),
        ({"session_length": True}, "not True"),
        ({"session_length": 5}, "make session_length at least twice heartbeat_interval"),
        ({"heartbeat_interval": float("inf")}, "heartbeat_interval is a number"),
        ({"retry_timeout": None}, "retry_timeout is a number of seconds above 0, not None"),
        ({"namespace": b"n"}, r"namespace is a str, not b'n': decode it"),
        ({"namespace": None}, "namespace is a str, not None"),
        ({"partitions": 0}, "partitions is 1 to 16384, not 0"),
        ({"partitions": 16385}, "not 16385: leave it out"),
        ({"partitions": 8.0}, "partitions is a whole number, not 8.0"),
        (
            {"serializer": json},
            "serializer is an object with a name .* give a phonon.ExactSerializer",
        ),
        ({"serializer": ExactSerializer}, "serializer is an object"),
        ({"retry": 3}, r"retry is a phonon.RetryPolicy, not 3: write RetryPolicy\(attempts=...\)"),
        ({"retry": RetryPolicy()._replace(attempts=0)}, "attempts is at least 1, not 0"),
        ({"durability": True}, "durability is a phonon.Durability, not True"),
        ({"durability": Durability()._replace(replicas=-1)}, "replicas is at least 0"),
        ({"on_error": 5}, "on_error is a function, not 5"),
        ({"on_error": _coroutine}, "use phonon.aio.AsyncProcess"),
        ({"max_backlog": 0}, "max_backlog is at least 1, not 0"),
        ({"max_backlog": "9"}, "max_backlog is a whole number, not '9'"),
        ({"overflow": "drop"}, 'overflow is "block" or "raise", not \'drop\''),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check_process(**{**GOOD, **options})


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: check_name("lock_key", None), "lock_key is a str, not None: give it a name"),
        (lambda: check_name("lock_key", 42), r"not 42: write lock_key=str\(42\)"),
        (lambda: check_name("lock_key", b"x"), r"decode it: lock_key=b'x'.decode\(\)"),
        (lambda: check_parties(0), "parties is at least 1, not 0"),
        (lambda: check_parties(2.5), "parties is a whole number, not 2.5"),
        (lambda: check_count("places", 8 / 2), "places is a whole number, not 4.0: use //"),
        (lambda: check_count("places", 0), "places is at least 1, not 0"),
        (lambda: check_seconds("lease", -1), "lease is a number of seconds above 0, not -1"),
        (lambda: check_timeout("timeout", float("nan")), "timeout is a number of seconds, not nan"),
        (lambda: check_timeout("timeout", "5"), "timeout is a number of seconds, not '5'"),
        (lambda: check_callable("callback", 3, is_async=True), "callback is a function, not 3"),
        (lambda: check_executor(4), "executor is a concurrent.futures.Executor, not 4"),
        (lambda: RetryPolicy(attempts=0), "attempts is at least 1, not 0"),
        (lambda: RetryPolicy(attempts=2.5), "attempts is a whole number"),  # type: ignore[arg-type]
        (lambda: RetryPolicy(first_delay=-1), "first_delay is a number .* not -1"),
        (lambda: RetryPolicy(longest_delay=float("inf")), "longest_delay"),
        (lambda: RetryPolicy(jitter=3), "jitter is a share from 0 to 1, not 3"),
        (lambda: RetryPolicy(crashes=-1), "crashes is at least 0"),
        (lambda: Durability(replicas=-1), "replicas is at least 0"),
        (lambda: Durability(fsync="no"), "fsync is True or False, not 'no'"),  # type: ignore[arg-type]
        (lambda: Durability(timeout=0), "timeout is a number"),
    ],
)
def test_single_values(check: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as raised:
        check()
    assert isinstance(raised.value, ValueError)


def test_executors() -> None:
    check_executor(None)
    with ThreadPoolExecutor() as threads:
        check_executor(threads)
    with ProcessPoolExecutor() as processes, pytest.raises(ConfigurationError, match="threads"):
        check_executor(processes)


@pytest.mark.parametrize(
    ("url", "hosts", "address", "variable", "found"),
    [
        (None, None, HERE, None, "redis://localhost:6379/1"),
        (None, None, HERE, "redis://elsewhere/3", "redis://elsewhere/3"),
        (None, None, ("h", 1, 2), "redis://elsewhere/3", "redis://h:1/2"),
        (None, None, ("::1", 6379, 1), None, "redis://[::1]:6379/1"),
        ("redis://u", None, HERE, "redis://elsewhere/3", "redis://u"),
        (None, ["a:1", "b:2"], HERE, None, "redis+cluster://a:1,b:2"),
    ],
)
def test_where_the_server_is(
    url: str | None,
    hosts: list[str] | None,
    address: tuple[str, int, int],
    variable: str | None,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PHONON_URL", raising=False)
    if variable is not None:
        monkeypatch.setenv("PHONON_URL", variable)
    assert url_of(url, hosts, None, address) == found
    if url is None and hosts is None:
        assert url_of(None, None, object(), address) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("redis://u", ["a:1"], None, HERE), "give one of url= and hosts="),
        (("redis://u", None, object(), HERE), "give one of client=, url= and hosts="),
        ((b"redis://u", None, None, HERE), "url is a str"),
        ((None, "a:1,b:2", None, HERE), 'a list of "host:port"'),
        ((None, [], None, HERE), 'a list of "host:port"'),
        ((None, None, None, ("redis://secret@h", 6379, 1)), "give that as url="),
        ((None, None, None, ("h", "6379", 1)), "port is a whole number, not '6379'"),
        ((None, None, None, ("h", 6379, -1)), "db is at least 0"),
    ],
)
def test_addresses_that_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as raised:
        url_of(*arguments)
    assert "secret" not in str(raised.value)
