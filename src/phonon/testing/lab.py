"""A server, a clock, and processes to experiment with."""

import contextlib
import itertools
import os
import shutil
import tempfile
from typing import Any, Self

import redis

from phonon import Process, embedded
from phonon.errors import ConfigurationError
from phonon.settings import check_name
from phonon.testing import faults
from phonon.testing.clock import Clock
from phonon.testing.wire import Wire

_numbers = itertools.count(1)


class Server:
    """An embedded server for tests, in a private folder; it ends with its last user.

    Attributes:
        url: The server's URL.
        socket_path: The path of its unix socket.
        client: A redis-py client of its database 1, which tests use.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="phonon-")
        self._server = embedded.start(self._folder)
        self.socket_path = self._server.socket_path
        self.url = f"unix://{self.socket_path}?db=1"
        self.client: Any = redis.Redis(unix_socket_path=self.socket_path, db=1, protocol=2)

    def close(self) -> None:
        """Release the server, and delete its data."""
        self.client.close()
        self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def new_namespace() -> str:
    """Return a namespace that is not in use."""
    return f"test-{os.getpid()}-{next(_numbers)}"


class Lab:
    """Makes processes in a private namespace, with a clock that they follow.

    A context manager. The pytest plugin makes one for each test that uses its fixtures.

    Args:
        server: The server; None: a new one for this lab.
        namespace: The namespace; None: a new one.

    Attributes:
        server: The server.
        namespace: The namespace.
        clock: The clock.

    Example:
        >>> with Lab() as lab:
        ...     one, two = lab.process(), lab.process()
        ...     reference, _ = one.create_reference("job"), two.create_reference("job")
        ...     kill(two)
        ...     lab.clock.advance(60)
        ...     reference.count()
        1
    """

    def __init__(self, server: Server | None = None, namespace: str | None = None) -> None:
        if server is not None and not isinstance(server, Server):
            raise ConfigurationError(
                f"server is a phonon.testing.Server, not {server!r}: leave it out for a new one"
            )
        self._stack = contextlib.ExitStack()
        self.namespace = (
            new_namespace() if namespace is None else check_name("namespace", namespace)
        )
        self.server = server or self._stack.enter_context(Server())
        self.clock = Clock(self.server.client)

    def __enter__(self) -> Self:
        self.clock.start()
        self._stack.callback(self.clock.stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def process(self, kind: Any = Process, **options: Any) -> Any:
        """Return a process. The lab stops it when it closes, unless it was killed.

        Args:
            kind: `Process`, or `phonon.aio.AsyncProcess`, which the caller starts and stops.
            options: The arguments of the process.
        """
        wire = Wire(self.server.socket_path)
        self._stack.callback(wire.cut)
        process = kind(url=wire.url, **{"namespace": self.namespace} | options)
        faults.attach(process, wire)
        if isinstance(process, Process):
            self._stack.callback(process.stop)
        return process

    def keys(self) -> set[str]:
        """Return the keys of resources on the server: none, when all sessions have ended."""
        about_processes = ("token", "lanes", "lane:", "registry:", "mailbox:", "handed")
        found = self.server.client.scan_iter(match=f"{{{self.namespace}/*", count=1000)
        names = {key.decode("utf-8", "replace").partition("}:")[2] for key in found}
        return {name for name in names if not name.startswith(about_processes)}
