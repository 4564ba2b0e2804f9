"""Passes bytes between workers and a server, until it cuts their connections.

It neither knows nor cares what the bytes mean: a cut falls into the middle of a request, of an
answer, or between the two, when the server has done what the worker will never be told.
"""

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

_CHUNK = 1 << 16
#: The length of a message of Kafka's protocol stands before it.
_LENGTH = struct.Struct(">i")

#: Makes of what a server has sent what its client gets.
Replies = Callable[[bytes], bytes]


class CuttingProxy:
    """Listens on a socket; a context manager.

    Args:
        path: Of the unix socket to make; short, such paths have a limit. None: a port of this host.
        upstream: The path of the server's socket, or its host and port.

    Attributes:
        path: Of its socket, or its host and port.
    """

    def __init__(self, path: Path | None, upstream: str | tuple[str, int]) -> None:
        self._upstream = upstream
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_INET if path is None else socket.AF_UNIX)
        self._listener.bind(("127.0.0.1", 0) if path is None else os.fspath(path))
        self._listener.listen(128)
        self.path: Any = self._listener.getsockname()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
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

    def replies(self) -> Replies:
        """Return what a new connection makes of the server's bytes: nothing else here."""
        return bytes

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(client.family) as upstream:
            with self._lock:
                self._clients.add(client)
            try:
                with contextlib.suppress(OSError):
                    upstream.connect(self._upstream)
                    _relay(client, upstream, self.replies())
            finally:
                with self._lock:
                    self._clients.discard(client)


class KafkaProxy(CuttingProxy):
    """A proxy in front of a broker of Kafka's, which tells its clients where to connect to.

    Its answers name its host and port (metadata, and who coordinates a group). There the proxy puts
    its own port, so that no client goes past it. All lengths stay as they are.

    Args:
        servers: Host and port of the broker.
    """

    def __init__(self, servers: str) -> None:
        host, _, port = servers.rpartition(":")
        super().__init__(None, (host, int(port)))
        self.servers = "{}:{}".format(*self.path)
        self._named = host.encode() + _LENGTH.pack(int(port))
        self._names = host.encode() + _LENGTH.pack(self.path[1])

    def replies(self) -> Replies:
        """Return what passes whole answers on, with another port in them."""
        buffer = bytearray()

        def rewrite(data: bytes) -> bytes:
            buffer.extend(data)
            end = 0
            while len(buffer) >= end + _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, end)
                if len(buffer) < end + _LENGTH.size + length:
                    break
                end += _LENGTH.size + length
            whole = bytes(buffer[:end])
            del buffer[:end]
            return whole.replace(self._named, self._names)

        return rewrite


def _relay(client: socket.socket, upstream: socket.socket, replies: Replies) -> None:
    """Pass on what comes from either side, until one hangs up."""
    poll = select.poll()
    sides: dict[int, tuple[socket.socket, socket.socket, Replies]] = {
        client.fileno(): (client, upstream, bytes),
        upstream.fileno(): (upstream, client, replies),
    }
    for descriptor in sides:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            source, target, change = sides[descriptor]
            data = source.recv(_CHUNK)
            if not data:
                return
            target.sendall(change(data))
