"""TCP links that a test delays, cuts and points elsewhere; a primary whose replica lags."""

import contextlib
import select
import socket
import time
from collections import deque
from typing import Self

from chaos.proxy import CuttingProxy
from support.nodes import Node
from support.world import wait_until

_PIECE = 1 << 16


class Link(CuttingProxy):
    """Listens on a port of its own and passes on what comes, to a port that can be changed.

    Args:
        target: The port at the other end.
        lag: Seconds by which what the other end says comes later.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, target: int, lag: float = 0.0) -> None:
        super().__init__(None, ("127.0.0.1", target))
        self.port: int = self.path[1]
        self._lag = lag
        self.__enter__()

    def cut(self) -> int:
        """Cut all connections, and let none in until `restore`."""
        with self._lock:
            self.upstream = None
        return super().cut()

    def restore(self, target: int) -> None:
        """Pass on what comes from now on, to another port."""
        self.upstream = ("127.0.0.1", target)

    def close(self) -> None:
        """End it."""
        self.__exit__()

    def relay(self, client: socket.socket, upstream: socket.socket) -> None:
        late: deque[tuple[float, bytes]] = deque()
        while True:
            pause = max(0.0, late[0][0] - time.monotonic()) if late else None
            ready, _, _ = select.select((client, upstream), (), (), pause)
            if client in ready:
                if not (data := client.recv(_PIECE)):
                    return
                upstream.sendall(data)
            if upstream in ready:
                if not (data := upstream.recv(_PIECE)):
                    return
                late.append((time.monotonic() + self._lag, data))
            while late and late[0][0] <= time.monotonic():
                client.sendall(late.popleft()[1])


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
