"""A proxy between clients and a server, which loses the messages that a test names.

It speaks just enough of the protocol to know where a request and its answer end. Requests pass one
by one, so "the third request" is the same one in every run, also in the middle of a pipeline.
"""

import contextlib
import enum
import random
import select
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack

from phonon._protocol.operations import Code

#: Commands of redis-py and Phonon besides the protocol's steps: always passed on.
HOUSEKEEPING = frozenset(
    {"hello", "auth", "client", "select", "ping", "info", "config", "function", "type"}
)
#: The functions of heartbeats, which come at any time.
OF_HEARTBEATS = frozenset({"beat", "verify", "survey", "processes"})
LENGTHS = frozenset(b"$=!")
AGGREGATES = {b"*"[0]: 1, b"~"[0]: 1, b">"[0]: 1, b"%"[0]: 2}
PUSH = b">"[0]


class Fault(enum.Enum):
    """The fate of a request. The connection is cut in all cases."""

    LOST_REQUEST = "the server never sees it"
    LOST_REPLY = "the server does it, and its answer is lost"
    CUT_REPLY = "half of the answer arrives"


#: The fault of a request: its number since the plan was made, and its step.
Plan = Callable[[int, str], Fault | None]


def nothing(*_: object) -> None:
    """Let it pass."""


class Cut(Exception):  # noqa: N818 - no fault of the program
    """The connection is to be cut."""


def end_of(data: bytes | bytearray, start: int = 0) -> int | None:
    """Return the end of the value that begins at ``start``, or None if it has not all arrived."""
    line = data.find(b"\r\n", start)
    if line < 0:
        return None
    kind, end = data[start], line + 2
    if kind in LENGTHS:
        length = int(data[start + 1 : line])
        end += length + 2 if length >= 0 else 0
    elif kind in AGGREGATES:
        for _ in range(int(data[start + 1 : line]) * AGGREGATES[kind]):
            inner = end_of(data, end)
            if inner is None:
                return None
            end = inner
    return end if end <= len(data) else None


def words(request: bytes) -> list[bytes]:
    """The words of a request, an array of strings."""
    found, at = [], request.index(b"\r\n") + 2
    while at < len(request):
        line = request.index(b"\r\n", at)
        length = int(request[at + 1 : line])
        found.append(request[line + 2 : line + 2 + length])
        at = line + 4 + length
    return found


def step_of(request: bytes) -> str:
    """The first operation of a lane's call, the function of another call, or the command."""
    command, *rest = words(request)
    if command.upper() not in (b"FCALL", b"FCALL_RO"):
        return command.decode().lower()
    function = rest[0].decode().partition("_")[2].partition("_")[2]
    if function in ("apply", "apply_free"):
        operations = msgpack.unpackb(rest[-1], raw=True)
        return Code(operations[0]).name.lower() if operations else "empty"
    return function


class Stream:
    """One side of a connection, read value by value."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()

    def next(self, other: socket.socket) -> bytes:
        """The next value. Cut if this side, or meanwhile the other one, has hung up."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(other, select.POLLRDHUP)
        while (end := end_of(self._buffer)) is None:
            events = dict(poll.poll())
            if other.fileno() in events or not (data := self.sock.recv(1 << 16)):
                raise Cut
            self._buffer += data
        value = bytes(self._buffer[:end])
        del self._buffer[:end]
        return value


class Proxy:
    """Listens on a socket of its own and forwards all messages but those that a test has it lose.

    Args:
        upstream: The path of the server's socket.

    Attributes:
        url: The URL for clients.
        steps: The names of the steps called since the last plan was made.
        ignored: Steps that are passed on and not counted: heartbeats come when they like.
        on_reply: Called with the step when the server has answered, before the client knows.
    """

    def __init__(self, upstream: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="px-"))
        self.socket = str(self.folder / "s")
        self.url = f"unix://{self.socket}?db=1"
        self.steps: list[str] = []
        self.ignored = OF_HEARTBEATS
        self.on_reply: Callable[[str], None] = nothing
        self._upstream = upstream
        self._plan: Plan = nothing
        self._gone_then = False
        self._going: set[int] = set()
        self._lock = threading.Lock()
        self._running = threading.Event()
        self._running.set()
        self._clients: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.back()

    # Commands of a test

    def strike(self, fault: Fault, at: int = 0, *, gone: bool = False) -> None:
        """Let a fault befall one request, counted from now.

        Args:
            fault: The fault.
            at: The number of requests to let pass before.
            gone: Whether the server is not to be reached afterwards.
        """
        self.plan(lambda number, _: fault if number == at else None, gone=gone)

    def strike_step(self, fault: Fault, step: str, *, gone: bool = False) -> None:
        """Let a fault befall the next request for a step; see `strike`."""
        left = [fault]
        self.plan(lambda _, called: left.pop() if left and called == step else None, gone=gone)

    def at_random(self, seed: int, probability: float) -> None:
        """Let faults befall requests at random."""
        chance = random.Random(seed)  # noqa: S311 - a test's schedule
        faults = list(Fault)
        self.plan(lambda *_: chance.choice(faults) if chance.random() < probability else None)

    def plan(self, plan: Plan = nothing, *, gone: bool = False) -> None:
        """Let a function decide on each request. Counts anew."""
        with self._lock:
            self._plan, self._gone_then, self.steps = plan, gone, []

    def gone(self) -> None:
        """Cut all connections and refuse new ones."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone would leave the thread waiting that accepts connections.
            listener.shutdown(socket.SHUT_RDWR)
        self.cut()

    def back(self) -> None:
        """Accept connections again, and lose nothing any more.

        A client in a hurry may have given up before a fault has befallen its request.
        """
        if self._gone_then:
            self.plan()
        while self._going:
            time.sleep(0.001)
        with self._lock:
            if self._listener is not None:
                return
            Path(self.socket).unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self.socket)
            self._listener.listen(128)
            arguments = (self._listener,)
        threading.Thread(target=self._accept, args=arguments, daemon=True).start()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Be gone for the time of the block."""
        self.gone()
        try:
            yield
        finally:
            self.back()

    def cut(self) -> None:
        """Cut all connections that are there."""
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Pass nothing on, without closing anything, for the time of the block."""
        self._running.clear()
        try:
            yield
        finally:
            self._running.set()

    @property
    def connections(self) -> int:
        """Return the number of connections."""
        return len(self._clients)

    def close(self) -> None:
        """End it."""
        self._running.set()
        self.gone()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Machinery

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # gone
                    return
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        upstream = socket.socket(socket.AF_UNIX)
        with self._lock:
            # Accepted while it went: what it does not know of, it cannot cut.
            refused = self._listener is None
            self._clients.add(client)
        try:
            with client, upstream, contextlib.suppress(OSError, Cut):
                if not refused:
                    upstream.connect(self._upstream)
                    requests, replies = Stream(client), Stream(upstream)
                    while True:
                        self._relay(requests, replies)
        finally:
            with self._lock:
                self._clients.discard(client)

    def _relay(self, requests: Stream, replies: Stream) -> None:
        request = requests.next(replies.sock)
        step = step_of(request)
        fault = self._decide(step)
        try:
            self._pass_on(requests, replies, request, step, fault)
        finally:
            if threading.get_ident() in self._going:
                self.gone()
                self._going.discard(threading.get_ident())

    def _pass_on(
        self, requests: Stream, replies: Stream, request: bytes, step: str, fault: Fault | None
    ) -> None:
        client, upstream = requests.sock, replies.sock
        self._running.wait()
        if fault is not Fault.LOST_REQUEST:
            upstream.sendall(request)
            reply = replies.next(client)
            while reply[0] == PUSH:
                client.sendall(reply)
                reply = replies.next(client)
            self.on_reply(step)
            self._running.wait()
            if fault is not Fault.LOST_REPLY:
                client.sendall(reply[: len(reply) // 2] if fault else reply)
        if fault is not None:
            raise Cut

    def _decide(self, step: str) -> Fault | None:
        if step in HOUSEKEEPING or step in self.ignored:
            return None
        with self._lock:
            plan, number = self._plan, len(self.steps)
            self.steps.append(step)
            fault = plan(number, step)
            if fault is not None and self._gone_then:
                self._going.add(threading.get_ident())
        return fault
