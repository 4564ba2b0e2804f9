"""The pytest plugin: a server for the session, a namespace for each test, a clock.

pytest loads it if Phonon is installed. It imports no other module of Phonon before a test
uses one of its fixtures.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from phonon import Process
    from phonon.testing import Clock, Lab, Server


@pytest.fixture(scope="session")
def phonon_server() -> Iterator["Server"]:
    """Start an embedded server for all tests of this pytest process."""
    from phonon.testing import Server  # noqa: PLC0415 - only tests that use it pay for it

    with Server() as server:
        yield server


@pytest.fixture
def phonon_url(phonon_server: "Server", monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make `Process()` use the tests' server, which is emptied before and after the test."""
    monkeypatch.setenv("PHONON_URL", phonon_server.url)
    phonon_server.client.flushdb()
    yield phonon_server.url
    phonon_server.client.flushdb()


@pytest.fixture
def phonon_lab(phonon_server: "Server") -> Iterator["Lab"]:
    """Open a lab: a namespace that no other test uses, and a clock."""
    from phonon.testing import Lab  # noqa: PLC0415 - only tests that use it pay for it

    with Lab(phonon_server) as lab:
        yield lab


@pytest.fixture
def phonon_namespace(phonon_lab: "Lab") -> str:
    """Return the test's namespace."""
    return phonon_lab.namespace


@pytest.fixture
def phonon_clock(phonon_lab: "Lab") -> "Clock":
    """Return the clock that the test's processes follow."""
    return phonon_lab.clock


@pytest.fixture
def phonon_processes(phonon_lab: "Lab") -> Any:
    """Return a function that makes processes, which are stopped when the test ends."""
    return phonon_lab.process


@pytest.fixture
def phonon_process(phonon_lab: "Lab") -> "Process":
    """Return a process, which is stopped when the test ends."""
    process: Process = phonon_lab.process()
    return process
