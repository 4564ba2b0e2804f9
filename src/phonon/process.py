"""A process: an identity, a heartbeat, and what it holds."""

import atexit
import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import phonon.lock
from phonon import backlog, parked
from phonon.batch import Batch, raise_together
from phonon.drivers import connect
from phonon.drivers.server import Durability
from phonon.engine import Engine, log
from phonon.errors import AlreadyLockedError, ConfigurationError, PhononError
from phonon.parked import Parked
from phonon.protocol import library, locks, processes
from phonon.protocol.effects import Call
from phonon.protocol.keys import Keys
from phonon.protocol.updates import RetryPolicy
from phonon.reference import Reference
from phonon.runtime import THREADS, Runtime
from phonon.serializers import ExactSerializer, Serializer

if TYPE_CHECKING:
    from phonon.update import Update

#: Read where no address is given.
URL_VARIABLE = "PHONON_URL"

_alive: "weakref.WeakSet[Process]" = weakref.WeakSet()


class Process:
    """One participant: everything is created through it.

    Several may live in one interpreter; each counts for itself. It connects when it is made, and
    beats from then on in a daemon thread. Use it in a ``with`` block, or call `stop`: both end the
    sessions it still holds. A process that ends without (``kill -9``) is declared dead after four
    heartbeat intervals without a sign of life, and the others take over what it held and finish
    what it had begun. One that was only paused for so long goes on under a new id: it keeps what
    is local, and has lost its locks and the batches that it was executing.

    After ``os.fork`` the child's copy becomes a process of its own, with a new id, that holds
    nothing; what the parent had made stays the parent's.

    Args:
        session_length: How long a membership lasts without a sign of life from its process,
            seconds; at least two heartbeat intervals. The heartbeat renews it.
        host: The server's host.
        port: The server's port.
        db: The server's database.
        heartbeat_interval: Seconds between two heartbeats.
        recover_failed_processes: Whether this process takes over what dead ones have left: when
            it starts, and after every heartbeat.
        hosts: Nodes of a cluster, ``"host:port"`` each, instead of ``host`` and ``port``.
        url: Where the server is, instead of those: ``redis://``, ``rediss://``, ``unix://``,
            ``redis+cluster://``, ``redis+sentinel://`` or ``embedded://``.
        client: A ``redis.Redis`` or ``redis.RedisCluster`` to use, instead of those.
        namespace: Processes of different namespaces do not see each other. Any text.
        serializer: How partials are encoded; the same in all processes.
        retry: What happens to a batch whose ``execute`` fails.
        retry_timeout: Seconds to go on repeating a call that is not answered, 30 at the most.
        durability: What a server must have done with data before a call that stores it returns.
        on_error: Called, from any thread, with every error that there is no caller to raise it
            to: a `BatchLostError`, `LockLostError`, `DeclaredDeadError` or `ServerStateLostError`,
            or what ``execute`` raised in the background. All of them are logged as well.
        executor: Threads that run ``execute`` where several sessions end together, in place of the
            calling one, so that slow writes overlap. A resource's batches stay in order. It is
            yours to shut down, after `stop`; a forked child does without. Whoever ends a session
            waits for it, so do not end any in these threads themselves.
        max_backlog: How much may be left undone, because ``execute`` fails or the server does not
            answer, before no new updates are taken in.
        overflow: Whether a new update then waits for room, for `BLOCKING_TIMEOUT` at the most
            (``"block"``), or raises a `BacklogFullError` at once (``"raise"``).

    If nothing says where the server is, the environment variable ``PHONON_URL`` does, or it is
    ``redis://localhost:6379/1``.

    Raises:
        ConfigurationError: An argument cannot be meant.
        ServerUnreachableError: There is no server. Phonon never looks for another one.
        ServerError: The server cannot be used: too old, wrong password.
    """

    AlreadyLocked: ClassVar = AlreadyLockedError
    Lock: ClassVar = phonon.lock.Lock
    #: How long a lock lasts unless renewed, seconds. The heartbeat renews it.
    TTL: ClassVar[float] = 60.0
    #: Seconds between two attempts to reach a server that does not answer, at the most.
    RETRY_SLEEP: ClassVar[float] = 0.5
    #: Seconds to wait at the most, for a lock or for room in the backlog.
    BLOCKING_TIMEOUT: ClassVar[float] = 500.0
    _runtime: Runtime = THREADS
    _kit: connect.Kit = connect.SYNC

    def __init__(
        self,
        session_length: float = 900,
        host: str = "localhost",
        port: int = 6379,
        db: int = 1,
        heartbeat_interval: float = 10,
        recover_failed_processes: bool = True,
        *,
        hosts: Sequence[str] | None = None,
        url: str | None = None,
        client: Any = None,
        namespace: str = "phonon",
        serializer: Serializer | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - immutable
        retry_timeout: float = 15.0,
        durability: Durability | None = None,
        on_error: Callable[[Exception], object] | None = None,
        executor: Executor | None = None,
        max_backlog: int = 100_000,
        overflow: backlog.Overflow = "block",
    ) -> None:
        if isinstance(executor, ProcessPoolExecutor):
            raise ConfigurationError(
                "executor= takes threads: updates hold connections and cannot be sent to another "
                "process; give a concurrent.futures.ThreadPoolExecutor"
            )
        check_times(session_length, heartbeat_interval, retry_timeout, self.TTL)
        backlog.check(max_backlog, overflow)
        keys = Keys(namespace)
        address = (host, port, db)
        settings: dict[str, Any] = {
            "retry_timeout": retry_timeout,
            "longest_pause": self.RETRY_SLEEP,
            "durability": durability,
        }
        if client is not None:
            if url or hosts:
                raise ConfigurationError("give one of client=, url= and hosts=")
            lease = connect.connect_client(client, library.default(), self._kit, **settings)
        else:
            found = _url(url, hosts, address)
            lease = connect.connect_url(found, library.default(), self._kit, **settings)
        self.session_length = session_length
        self.heartbeat_interval = heartbeat_interval
        self.recover_failed_processes = recover_failed_processes
        #: Locks that threads wait for: holder and resource.
        self.waiters: dict[str, bytes] = {}
        self.stopping = False
        self._stop_lock = self._runtime.rlock()
        self.engine = Engine(
            self,
            lease,
            keys,
            serializer or ExactSerializer(),
            retry,
            session_length=session_length,
            heartbeat_interval=heartbeat_interval,
            recovers=recover_failed_processes,
            on_error=on_error,
            executor=executor,
            max_backlog=max_backlog,
            overflow=overflow,
            runtime=self._runtime,
        )
        try:
            self.engine.start()
        except BaseException:
            self.engine.close()
            raise
        self._enlist()

    def _enlist(self) -> None:
        """Stop at the end of the interpreter, and begin anew in a forked child."""
        _alive.add(self)

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """A process that uses the server of a URL.

        Args:
            url: See the constructor.
            options: The constructor's other arguments.
        """
        return cls(url=url, **options)

    def __repr__(self) -> str:
        return f"<phonon.Process {self.id} at {self.engine.lease.server.address}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"phonon: and stopping the process failed: {failure}")

    @property
    def id(self) -> str:
        """The process's identity, unique for ever."""
        return self.engine.name

    @property
    def public(self) -> Any:
        """The object that users have: this one, or its asyncio twin."""
        return self

    @property
    def client(self) -> Any:
        """The redis-py client whose connections are used."""
        return self.engine.lease.client

    @property
    def namespace(self) -> str:
        """The namespace."""
        return self.engine.keys.namespace

    @property
    def registry_key(self) -> str:
        """The key of the sorted set of resources that this process may be responsible for."""
        return self.engine.me.registry.decode("utf-8", "surrogatepass")

    @property
    def heartbeat_hash_name(self) -> str:
        """The key of the sorted set of all processes, by the end of their lives unless renewed."""
        return self.engine.keys.processes.decode("utf-8", "surrogatepass")

    def create_reference(
        self, resource: str, block: bool = True, parties: int | None = None
    ) -> Reference:
        """Become a member of a resource.

        Inside `batch` the membership begins when the block ends, unless ``parties`` is given.

        Args:
            resource: The resource's name, any text.
            block: Whether the reference's locks wait by default.
            parties: How many different processes are to hold the resource, where that is known:
                nobody is told that it is the last before so many have come, so that the first
                one to finish is not taken for the last while others have not begun. A process
                that has died counts as one that has left. The same for all.

        Raises:
            ConnectionLostError: The server does not answer.
        """
        reference = Reference(self, resource, block, parties)
        batch = self.engine.batch
        if batch is not None and parties is None:
            batch.join(resource)
        else:
            reference.refresh_session()
        return reference

    def lock(
        self,
        lock_key: str,
        block: bool = True,
        shared: bool = False,
        *,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: "Callable[[phonon.lock.Lock], object] | None" = None,
    ) -> "phonon.lock.Lock":
        """A lock on a resource, for a ``with`` block.

        Args:
            lock_key: The resource's name, any text.
            block: Whether to wait if it is taken.
            shared: Whether to share it with others who do.
            reentrant: Whether the thread that has it may take it again.
            lease: Seconds that it lasts unless renewed. None: `TTL`.
            on_lost: Called with the lock, from any thread, once it is found to be lost.
        """
        return phonon.lock.Lock(
            self,
            lock_key,
            block,
            shared=shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
        )

    def semaphore(
        self,
        name: str,
        places: int,
        block: bool = True,
        *,
        lease: float | None = None,
        on_lost: "Callable[[phonon.lock.Lock], object] | None" = None,
    ) -> "phonon.lock.Semaphore":
        """A semaphore, for a ``with`` block: so many hold it at the same time.

        Args:
            name: Its name, any text.
            places: How many may hold it; the same for all who use it.
            block: Whether to wait if all places are taken.
            lease: Seconds that a place lasts unless renewed. None: `TTL`.
            on_lost: Called with the semaphore, from any thread, once a place is found to be lost.
        """
        return phonon.lock.Semaphore(self, name, places, block, lease=lease, on_lost=on_lost)

    def batch(self, *, durable: bool = True) -> Batch:
        """Collect what this thread does, and send it together when the ``with`` block ends.

        References created, updates made and sessions ended inside the block are merged per key
        and travel in one exchange, so that a batch of messages costs hardly more than one. After
        the block everything set inside it is on the server, and the messages can be acknowledged.

        If leaving the block raises, what could not be stored is kept and goes with the next batch
        or with `flush`: acknowledge the messages when that has returned. Do not hand them back to
        the broker as well, or they count twice.

        Args:
            durable: Whether updates made with ``init_cache=False`` are stored as well. If not,
                their data stays in this process until the session ends, and only the memberships
                travel together.
        """
        batch = self.engine.batch
        if batch is None:
            return Batch(self.engine, durable=durable)
        batch.durable |= durable
        return batch

    def flush(self) -> None:
        """Store what a batch could not store because the server was gone.

        Raises:
            ConnectionLostError: It still is.
        """
        with Batch(self.engine):
            pass

    def add_to_registry(self, resource: str, registry_key: str | None = None) -> int:
        """Enter a resource into a registry. Phonon keeps this process's by itself.

        Returns:
            1 if it was not there yet.
        """
        key = self._registry(registry_key)
        call = Call("hold", key, (self.engine.keys.base(resource), self.engine.me.id))
        return int(self.engine.run(b"", processes.single(call)))

    def remove_from_registry(self, resource: str, registry_key: str | None = None) -> int:
        """Remove a resource from a registry. Phonon keeps this process's by itself.

        Returns:
            1 if it was there.
        """
        key = self._registry(registry_key)
        call = Call("", key, (b"ZREM", key, self.engine.keys.base(resource)))
        return int(self.engine.run(b"", processes.single(call)))

    def get_registry(self, registry_key: str | None = None) -> list[str]:
        """The resources that a process may be responsible for.

        Args:
            registry_key: Another process's `registry_key`; None for this one's.
        """
        key = registry_key.encode("utf-8", "surrogatepass") if registry_key is not None else None
        bases = self.engine.run(b"", self.engine.living(lambda me: processes.registry(me, key)))
        return [self.engine.keys.resource(base) for base in bases]

    def parked(self) -> list[Parked]:
        """The batches that were given up on after so many failed attempts, of all processes.

        They stay until somebody replays or discards them. Meanwhile their resources go on.
        """
        return parked.find(self.engine)

    def look(self, resource: str, token: int) -> list["Update"]:
        """What is in a parked batch: its partials as updates, in the order they were stored in.

        Raises:
            BatchMissingError: There is no such parked batch.
            UndecodableError: It cannot be read.
            UnknownClassError: Its class is not imported here.
        """
        return parked.look(self.engine, resource, token)

    def replay(self, resource: str, token: int) -> None:
        """Execute a parked batch after all, here and now.

        It gets a new token, so that a database that has seen later ones accepts it. If it fails
        again, it is tried and parked like any other.

        Raises:
            BatchMissingError: There is no such parked batch.
            BatchRunningError: Another batch of the resource is being executed.
            Exception: What ``execute`` raised.
        """
        parked.replay(self.engine, resource, token)

    def discard(self, resource: str, token: int) -> None:
        """Delete a parked batch, with its data.

        Raises:
            BatchMissingError: There is no such parked batch.
        """
        parked.discard(self.engine, resource, token)

    def stop(self) -> None:
        """End the sessions that this process still holds, release its locks, and disappear.

        A second call does nothing; anything else raises `ProcessStoppedError` afterwards. Inside
        `batch` the block ends here. Let other threads finish their blocks first.

        Raises:
            Exception: Some sessions could not be ended; several errors come as an ExceptionGroup.
                What is on the server is left to the survivors.
        """
        _alive.discard(self)
        with self._stop_lock:
            if self.engine.stopped:
                return
            self.stopping = True
            batch = self.engine.batch
            try:
                errors = batch.close() if batch is not None else []
                try:
                    self._wake_waiters()
                except PhononError as error:
                    errors.append(error)
                errors += self.engine.stop()
            finally:
                self.engine.close()
        raise_together("stopping left something undone", errors)

    def _wake_waiters(self) -> None:
        """Let nobody wait for a lock any more: it would stay in line, and come too late."""
        for holder, base in list(self.waiters.items()):
            self.engine.run(base, locks.wake(base, holder))
        give_up = time.monotonic() + WAITERS_TIMEOUT
        while self.waiters and time.monotonic() < give_up:
            self.engine.runtime.sleep(0.001)

    def begin_after_fork(self) -> None:
        """The child's copy is a process of its own. Locks may be held by threads of the parent."""
        self.waiters = {}
        self.stopping = False
        self._stop_lock = self._runtime.rlock()
        self.engine.after_fork_in_child()

    def _registry(self, registry_key: str | None) -> bytes:
        if registry_key is None:
            return self.engine.me.registry
        return registry_key.encode("utf-8", "surrogatepass")


def check_times(
    session_length: float, heartbeat_interval: float, retry_timeout: float, ttl: float
) -> None:
    """Refuse settings of a `Process` that cannot be meant.

    Raises:
        ConfigurationError: One cannot.
    """
    for name, value in (
        ("session_length", session_length),
        ("heartbeat_interval", heartbeat_interval),
        ("retry_timeout", retry_timeout),
    ):
        if not 0 < value < math.inf:
            raise ConfigurationError(f"{name} is a number of seconds above 0, not {value!r}")
    if retry_timeout > MOST_RETRY_TIMEOUT:
        raise ConfigurationError(
            f"retry_timeout is {MOST_RETRY_TIMEOUT:g} s at the most, not {retry_timeout!r}: "
            "the server does not remember operations for much longer"
        )
    if heartbeat_interval >= ttl:
        raise ConfigurationError(
            f"locks last {ttl:g} s and are renewed every {heartbeat_interval:g} s: make "
            "heartbeat_interval shorter, or subclass Process with a longer TTL"
        )
    if session_length < 2 * heartbeat_interval:
        raise ConfigurationError(
            f"memberships last {session_length:g} s and are renewed every "
            f"{heartbeat_interval:g} s: make session_length at least twice heartbeat_interval"
        )


#: Half of what the server remembers operations for.
MOST_RETRY_TIMEOUT = 30.0
#: Seconds that `Process.stop` gives threads that wait for a lock to notice.
WAITERS_TIMEOUT = 2.0


def _url(url: str | None, hosts: Sequence[str] | None, address: tuple[str, int, int]) -> str:
    """Where the server is; see `Process`."""
    if url is not None and hosts is not None:
        raise ConfigurationError("give one of url= and hosts=")
    if url is not None:
        return url
    if hosts is not None:
        if isinstance(hosts, str) or not hosts:
            raise ConfigurationError('hosts= is a list of "host:port"')
        return "redis+cluster://" + ",".join(hosts)
    host, port, db = address
    if address == ("localhost", 6379, 1) and os.environ.get(URL_VARIABLE):
        return os.environ[URL_VARIABLE]
    return f"redis://{f'[{host}]' if ':' in host else host}:{port}/{db}"


def _stop_all() -> None:
    """At the end of the interpreter: leave nothing to take over."""
    for process in list(_alive):
        try:
            process.stop()
        except Exception:  # noqa: BLE001 - nobody is left to handle it
            log.exception("stopping %r at exit left something undone", process)


def _after_fork_in_child() -> None:
    connect.after_fork_in_child()
    for process in list(_alive):
        process.begin_after_fork()


# After the non-daemon threads have ended, which may be using a process until then.
atexit.register(_stop_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
