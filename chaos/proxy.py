"""Passes bytes between workers and a server, until it cuts their connections.

It neither knows nor cares what the bytes mean: a cut falls into the middle of a request, of an
answer, or between the two, when the server has done what the worker will never be told.
"""

import contextlib
import os
import select
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_CHUNK = 1 << 16


class CuttingProxy:
    """Listens on a unix socket; a context manager.

    Args:
        path: Of the socket to make; short, such paths have a limit.
        upstream: Of the server's socket.

    Attributes:
        path: Of its socket.
    """

    def __init__(self, path: Path, upstream: str) -> None:
        self.path = path
        self._upstream = upstream
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(128)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            # Closing alone would leave the thread waiting that accepts connections.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> int:
        """Cut all connections. Returns how many there were."""
        with self._lock:
            clients = list(self._clients)
            for client in clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        return len(clients)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as upstream:
            with self._lock:
                self._clients.add(client)
            try:
                with contextlib.suppress(OSError):
                    upstream.connect(self._upstream)
                    _relay(client, upstream)
            finally:
                with self._lock:
                    self._clients.discard(client)


def _relay(client: socket.socket, upstream: socket.socket) -> None:
    """Pass on what comes from either side, until one hangs up."""
    poll = select.poll()
    sides = {client.fileno(): (client, upstream), upstream.fileno(): (upstream, client)}
    for descriptor in sides:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            source, target = sides[descriptor]
            data = source.recv(_CHUNK)
            if not data:
                return
            target.sendall(data)
