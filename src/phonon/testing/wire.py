"""A wire between one process and its server. A test can cut it, hold it, or let it lose answers.

It listens on a unix socket and forwards bytes both ways, so process and server see the same as with
a broken network, or a paused or killed process.
"""

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Self

_RECEIVE = 1 << 16


class Mode(Enum):
    """The modes of a wire."""

    OPEN = "open"
    HELD = "held"
    CUT = "cut"


class Wire:
    """Forwards connections to a server's unix socket.

    Args:
        server: The path of the server's socket.
        db: The database, for the URL.

    Attributes:
        url: The URL for the process.
        mode: Whether the wire forwards, holds or is cut.
    """

    def __init__(self, server: str, db: int = 1) -> None:
        self._server = server
        self._folder = Path(tempfile.mkdtemp(prefix="ph-"))
        path = str(self._folder / "s")
        self.url = f"unix://{path}?db={db}"
        self.mode = Mode.OPEN
        self._to_lose = 0
        self._lock = threading.Lock()
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(128)
        self._start(self._accept)

    def hold(self) -> None:
        """Forward no bytes, either way, until `release`."""
        self.mode = Mode.HELD
        self._goes_on.clear()

    def release(self) -> None:
        """Forward all held and later bytes."""
        if self.mode is Mode.HELD:
            self.mode = Mode.OPEN
            self._goes_on.set()

    def lose(self, answers: int) -> None:
        """Lose the server's next answers, each with its connection."""
        with self._lock:
            self._to_lose = answers

    def cut(self) -> None:
        """End all connections, and refuse new ones, for good."""
        self.mode = Mode.CUT
        self._goes_on.set()
        # close() alone does not close a listener while another thread waits at it.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            _end(each)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    @staticmethod
    def _start(function: Callable[..., None], *arguments: object) -> None:
        threading.Thread(
            target=function, args=arguments, name="phonon-testing-wire", daemon=True
        ).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._server)
            except OSError:
                _end(client)
                client.close()
                server.close()
                continue
            with self._lock:
                self._sockets |= {client, server}
            if self.mode is Mode.CUT:
                _end(client)
                _end(server)
            both = threading.Barrier(2)  # the second of the two threads closes both sockets
            self._start(self._pump, client, server, both)
            self._start(self._pump, server, client, both, self._loses)

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        both: threading.Barrier,
        loses: Callable[[], bool] = bool,
    ) -> None:
        try:
            while data := source.recv(_RECEIVE):
                self._goes_on.wait()
                if self.mode is Mode.CUT or loses():
                    break
                target.sendall(data)
        except OSError:
            pass
        finally:
            _end(source)
            _end(target)
            if both.wait() == 0:
                with self._lock:
                    self._sockets -= {source, target}
                source.close()
                target.close()

    def _loses(self) -> bool:
        with self._lock:
            if self._to_lose <= 0:
                return False
            self._to_lose -= 1
            return True


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
