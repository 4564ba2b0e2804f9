"""Passes bytes between workers and a server, until it cuts their connections.

It does not look at the bytes, so a cut comes in the middle of a request or of an answer, or between
the two, when the server has carried out a call whose answer the worker will never get.
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
#: The length in front of each message of Kafka's protocol.
_LENGTH = struct.Struct(">i")

#: Turns bytes of the server into those for the client.
Replies = Callable[[bytes], bytes]


class CuttingProxy:
    """Listens on a socket; a context manager.

    Args:
        path: The unix socket to make, a short path. None: a port of this host.
        upstream: The path of the server's socket, or its host and port.

    Attributes:
        path: The path of its socket, or its host and port.
        upstream: Where the next connection goes; None: it is closed.
    """

    def __init__(self, path: Path | None, upstream: str | tuple[str, int]) -> None:
        self.upstream: str | tuple[str, int] | None = upstream
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
            # close() alone would leave the accepting thread waiting.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> int:
        """Cut all connections. Return their number."""
        with self._lock:
            clients = list(self._clients)
            for client in clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        return len(clients)

    def replies(self) -> Replies:
        """Return the function for the server's bytes on a new connection."""
        return bytes

    def relay(self, client: socket.socket, upstream: socket.socket) -> None:
        """Pass on bytes from either side, until one hangs up."""
        poll = select.poll()
        sides: dict[int, tuple[socket.socket, socket.socket, Replies]] = {
            client.fileno(): (client, upstream, bytes),
            upstream.fileno(): (upstream, client, self.replies()),
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
                address = self.upstream
            try:
                with contextlib.suppress(OSError):
                    if address is not None:
                        upstream.connect(address)
                        self.relay(client, upstream)
            finally:
                with self._lock:
                    self._clients.discard(client)


class KafkaProxy(CuttingProxy):
    """A proxy in front of a Kafka broker, which tells its clients where to connect.

    The broker's answers name its host and port (metadata, and the coordinator of a group). The
    proxy replaces the port by its own, so that no client bypasses it. All lengths stay the same.

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
        """Return the function that passes whole answers on, with another port in them."""
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
