"""Fixtures: real servers, a namespace of its own for each test, processes that are stopped."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from phonon import Process
from phonon._transport import connect
from support.nodes import Cluster
from support.world import Make, Redis, keys_in

#: Characters of a failure that are printed when it happens; all of it comes at the end.
LONGEST_REPORT = 4000
#: Seconds that a test marked as slow may take, unless it says otherwise.
SLOW_TIMEOUT = 180
#: Seconds without the end of any test after which a run is given up, with several workers and with
#: one. The longest tests, which take minutes, run in one.
SILENCE = 300.0, 900.0


def pytest_configure(config: pytest.Config) -> None:
    # A shell without job control starts its background commands with SIGINT ignored, and nohup with
    # SIGHUP; all that tests start would inherit that, and these signals would end none of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Controller(config), "phonon-controller")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


class _Controller:
    """Prints failures as they come, and ends a run that hangs.

    Args:
        config: The configuration of the process that prints, not of an xdist worker.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._silence = SILENCE[0 if config.getoption("numprocesses", None) else 1]
        self._heard = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            own = item.get_closest_marker("timeout")
            if own is not None:  # `make chaos` has a test of half an hour
                self._silence = max(self._silence, own.args[0] + 60.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._heard = time.monotonic()
        if report.failed:
            reporter = self._config.pluginmanager.get_plugin("terminalreporter")
            assert reporter is not None
            reporter.ensure_newline()
            reporter.section(f"{report.nodeid} failed in {report.when}", sep="_", red=True)
            reporter.line(report.longreprtext[-LONGEST_REPORT:])

    def _watch(self) -> None:
        while (silent := time.monotonic() - self._heard) < self._silence:
            time.sleep(self._silence - silent)
        sys.stderr.write(f"no test has ended for {self._silence:g} s: the run is given up\n")
        sys.stderr.flush()
        os._exit(3)  # a worker that hangs would be waited for


#: Connections that tests have left open. Were they collected, their warnings would hit other tests.
_left_open: list[object] = []


@pytest.fixture(autouse=True)
def _leaves_no_connections(request: pytest.FixtureRequest) -> Iterator[None]:
    """Name the test that leaves shared connections open, instead of all those after it."""
    before = set(connect._shared)
    yield
    left = [key for key in connect._shared if key not in before]
    _left_open.extend(connect._shared.pop(key) for key in left)
    dies = request.node.get_closest_marker("leaves_connections")
    if left and not dies and not request.session.testsfailed:
        pytest.fail(f"the test left {len(left)} shared connections open: stop its processes")


@pytest.fixture(scope="session")
def common_server() -> Iterator[Redis]:
    """The server behind `server`."""
    server = Redis()
    yield server
    server.close()


@pytest.fixture
def server(common_server: Redis) -> Iterator[Redis]:
    """A server for many tests, which use namespaces of their own and nothing global.

    A test that leaves it dead, paused or full fails, and the next one gets a sound one.
    """
    yield common_server
    trouble = common_server.trouble()
    if trouble:
        common_server.kill()
        common_server.start()
        pytest.fail(f"the test left the common server {trouble}; it was started again")


@pytest.fixture(scope="session")
def common_cluster() -> Iterator[Cluster]:
    """The cluster behind `cluster`."""
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


@pytest.fixture
def cluster(common_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster for many tests, in which all is well before and after each of them."""
    common_cluster.wait_until_well()
    yield common_cluster
    common_cluster.wait_until_well()


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
    """Return the keys of resources left in this test's namespace, as "<kind>:<resource>"."""

    return lambda: keys_in(server, namespace)
