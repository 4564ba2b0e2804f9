"""Fixtures: a real server, a namespace of its own for each test, processes that are stopped."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from phonon import Process
from support.world import (
    ALWAYS,
    OF_PROCESSES,
    Make,
    Redis,
    is_settled,
    key_for,
    key_of,
    keys_in,
    retry_now,
    stop_heart,
    wait_until,
)

__all__ = [
    "ALWAYS",
    "OF_PROCESSES",
    "Make",
    "Redis",
    "is_settled",
    "key_for",
    "key_of",
    "keys_in",
    "retry_now",
    "stop_heart",
    "wait_until",
]


def pytest_configure() -> None:
    # A shell without job control starts its background commands with SIGINT ignored; all that tests
    # start would inherit that, and Ctrl-C would end none of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server() -> Iterator[Redis]:
    """A server for many tests, which use namespaces of their own and nothing global."""
    server = Redis()
    yield server
    server.close()


@pytest.fixture
def own_server() -> Iterator[Redis]:
    """A server for one test, which may flush, stop or kill it."""
    server = Redis()
    yield server
    server.close()


_namespaces = itertools.count()


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"test{os.getpid()}-{next(_namespaces)}"


@pytest.fixture
def make(server: Redis, namespace: str) -> Iterator[Make]:
    """Makes processes on the common server, and stops those that the test has not stopped."""
    with contextlib.ExitStack() as stack:

        def make_process(**options: Any) -> Process:
            options.setdefault("namespace", namespace)
            if not {"url", "client"} & options.keys():
                options["url"] = server.url
            process = Process(**options)
            stack.callback(process.stop)
            return process

        yield make_process


@pytest.fixture
def process(make: Make) -> Process:
    return make()


@pytest.fixture
def keys(server: Redis, namespace: str) -> Callable[[], set[str]]:
    """What is left of resources in this test's namespace, as "<kind>:<resource>"."""

    return lambda: keys_in(server, namespace)
