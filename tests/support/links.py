"""TCP links that a test delays, cuts and points elsewhere; a primary whose replica lags."""

import contextlib
import select
import socket
import threading
import time
from collections import deque
from typing import Self

from support.nodes import Node
from support.world import wait_until

_PIECE = 1 << 16


class Link:
    """Listens on a port of its own and passes on what comes, to a port that can be changed.

    Args:
        target: The port at the other end.
        lag: Seconds by which what the other end says comes later.

    Attributes:
        port: The port on which it listens.
    """

    def __init__(self, target: int, lag: float = 0.0) -> None:
        self.target = target
        self.lag = lag
        self._open = True
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cut all connections, and let none in until `restore`."""
        with self._lock:
            self._open = False
            ends = list(self._ends)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def restore(self, target: int) -> None:
        """Pass on what comes from now on, to another port."""
        with self._lock:
            self.target, self._open = target, True

    def close(self) -> None:
        """End it."""
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # it is closed
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        far = socket.socket()
        with self._lock:
            is_open, target = self._open, self.target
            self._ends |= {near, far}
        try:
            with near, far, contextlib.suppress(OSError):
                if is_open:
                    far.connect(("127.0.0.1", target))
                    self._relay(near, far)
        finally:
            with self._lock:
                self._ends -= {near, far}

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        late: deque[tuple[float, bytes]] = deque()
        while True:
            pause = max(0.0, late[0][0] - time.monotonic()) if late else None
            ready, _, _ = select.select((near, far), (), (), pause)
            if near in ready:
                if not (data := near.recv(_PIECE)):
                    return
                far.sendall(data)
            if far in ready:
                if not (data := far.recv(_PIECE)):
                    return
                late.append((time.monotonic() + self.lag, data))
            while late and late[0][0] <= time.monotonic():
                near.sendall(late.popleft()[1])


class Lagging:
    """A primary, a replica that hears of everything a moment later, and a replica of that one.

    Clients reach the current primary by one port. The last replica confirms what the second
    server stores once that is the primary.

    Args:
        lag: Seconds.
    """

    def __init__(self, lag: float) -> None:
        with contextlib.ExitStack() as stack:
            quick = "repl-ping-replica-period 1"
            self.primary = Node(quick)
            stack.callback(self.primary.close)
            link = Link(self.primary.port, lag)
            stack.callback(link.close)
            self.replica = Node(f"replicaof 127.0.0.1 {link.port}", quick)
            stack.callback(self.replica.close)
            self.last = Node(f"replicaof 127.0.0.1 {self.replica.port}", quick)
            stack.callback(self.last.close)
            wait_until(lambda: _follows(self.replica) and _follows(self.last))
            self.front = Link(self.primary.port)
            stack.callback(self.front.close)
            self._stack = stack.pop_all()
        self.url = f"redis://127.0.0.1:{self.front.port}/0"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kill_primary(self) -> None:
        """Kill the primary and promote the replica, which no client can reach yet."""
        self.primary.kill()
        self.front.cut()
        self.replica.ask("REPLICAOF", "NO", "ONE")

    def let_in(self) -> None:
        """Let clients reach the new primary."""
        self.front.restore(self.replica.port)


def _follows(node: Node) -> bool:
    return bool(node.ask("INFO", "replication")["master_link_status"] == "up")
