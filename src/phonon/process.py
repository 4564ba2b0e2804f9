"""A process: an identity, a heartbeat, memberships, locks and sessions."""

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Self, TypeVar, overload

import phonon.lock
from phonon import _lifetime
from phonon._core.codec import UpdateCodec
from phonon._core.dead_letters import DeadLetters, Parked
from phonon._core.engine import Engine, ProcessOptions, ThreadEngine, errors_only
from phonon._core.flows import FLUSH, Flow, Sleep, read
from phonon._core.forks import notice
from phonon._core.reports import EVENTS, Event
from phonon._protocol import library
from phonon._protocol.library import Request
from phonon._protocol.partitions import ENCODING, ERRORS, decode
from phonon._transport import connect, sync_io
from phonon._transport.threads import ThreadDriver
from phonon.batch import Batch, raise_together
from phonon.collection import Collection
from phonon.errors import AlreadyLockedError, ConfigurationError
from phonon.reference import BaseReference, Reference
from phonon.serializers import ExactSerializer, Serializer
from phonon.settings import (
    Durability,
    Overflow,
    RetryPolicy,
    check_executor,
    check_flag,
    check_name,
    check_position,
    check_process,
    url_of,
)
from phonon.source import WINDOW, Messages, Source, id_of, unordered

if TYPE_CHECKING:
    from phonon.sinks import Sink
    from phonon.update import Update

P = ParamSpec("P")
M = TypeVar("M")

#: The default session length, also if an address is the first argument.
SESSION_LENGTH = 900.0
#: The first pause between two looks at unfinished work, in seconds; it grows.
FIRST_PAUSE = 0.005


class BaseProcess:
    """The base of `Process` and `AsyncProcess`: everything but the waiting."""

    AlreadyLocked: ClassVar = AlreadyLockedError
    #: The lease of locks in earlier versions, seconds. Now a lock lasts as long as its process's
    #: lease: give ``lease=Process.TTL`` for the old behaviour.
    TTL: ClassVar[float] = 60.0
    #: Seconds between two attempts to reach a server that does not answer, at the most.
    RETRY_SLEEP: ClassVar[float] = 0.5
    #: Seconds to wait at the most, for a lock or for room in the backlog.
    BLOCKING_TIMEOUT: ClassVar[float] = 500.0

    session_length: float
    heartbeat_interval: float
    recover_failed_processes: bool

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """Return a process that uses the server of a URL.

        Args:
            url: See the constructor.
            options: The constructor's other arguments.
        """
        return cls(**{"url": url, **options})

    @property
    def engine(self) -> Any:
        """The process's parts, which are private."""
        raise NotImplementedError

    @property
    def id(self) -> str:
        """The process's identity, which no other process ever has."""
        notice()
        name: str = self.engine.name
        return name

    @property
    def client(self) -> Any:
        """The redis-py client of the server."""
        return self.engine.client

    @property
    def registry_key(self) -> str:
        """The key of the sorted set of resources that this process may be responsible for.

        Each partition has such a key, and this one stands for all of them; see `get_registry`.
        """
        identity = self.engine.identity
        return _text(_registry_prefix(identity) + identity.id)

    @property
    def heartbeat_hash_name(self) -> str:
        """The key of the sorted set of all processes, by the end of their leases unless renewed."""
        return _text(self.engine.identity.partitions.prefix + b"processes")

    def on(self, name: str, function: Callable[[Event], object]) -> None:
        """Have a function called with each event of a kind, from any thread.

        An error that the function raises is logged and has no other effect. A forked child has the
        same listeners.

        Args:
            name: ``"parked"``, ``"takeover"``, ``"lock_lost"``, ``"batch_lost"``,
                ``"declared_dead"``, ``"state_lost"`` or ``"error"``.
            function: Called with the `Event`. In an `AsyncProcess` it may be a coroutine function.

        Raises:
            ConfigurationError: There is no such kind, or the function cannot be called.

        Example:
            >>> process.on("parked", lambda event: print(event.resource, event.error))
        """
        if name not in EVENTS:
            raise ConfigurationError(f"an event is one of {', '.join(EVENTS)}, not {name!r}")
        if not callable(function):
            raise ConfigurationError(f"function is called with an event: {function!r} cannot be")
        self.engine.reports.on(name, function)

    # Flows

    def _joins_in_a_batch(self, reference: BaseReference) -> bool:
        """Return whether an open batch will join the resource when it ends."""
        batch = self.engine.batch
        if batch is None or reference.parties is not None:
            return False
        batch.join(reference.resource_key)
        return True

    def _flush(self) -> Flow[list[BaseException]]:
        engine = self.engine
        outbox = engine.outbox
        _ = engine.batch  # ends a batch whose block was left without its end
        unsent, outbox.unsent = outbox.unsent, []
        errors: list[BaseException] = yield from outbox.store(unsent)
        deadline = engine.identity.clock() + engine.driver.retry_timeout
        pause = FIRST_PAUSE
        while outbox.is_unfinished:
            # Wait for the server to answer; then unanswered calls go at once.
            yield from read(engine.identity.in_namespace("processes"))
            yield FLUSH
            yield from outbox.catch_up()
            if outbox.is_unfinished and engine.identity.clock() < deadline:
                yield Sleep(pause)  # meanwhile the outbox's worker goes on with them
                pause *= 2
                continue
            if not errors and outbox.is_unfinished:
                lost = engine.driver.lost()
                lost.add_note("phonon: call flush() again to wait for them")
                errors.append(lost)
            break
        return errors

    def _track(self, resource: str, registry_key: str | None, *, there: bool) -> Flow[int]:
        check_name("resource", resource)
        identity = self.engine.identity
        process = self._owner_of(registry_key)
        if process is None or process == identity.id:
            changed: int = yield from self.engine.members.track(resource, there=there)
            return changed
        # Only the process itself has a lane. Repeating a correction of its registry is harmless.
        partition, name = self.engine.members.place(resource)
        prefix = identity.partitions.prefixes[partition]
        key = prefix + b"registry:" + process
        now = b"%d" % int(time.time() * 1000)
        words = (b"ZADD", key, b"NX", now, name) if there else (b"ZREM", key, name)
        return int((yield from read(Request(prefix, words))))

    def _registry(self, registry_key: str | None) -> Flow[list[str]]:
        found: list[str] = yield from self.engine.members.registry(self._owner_of(registry_key))
        return found

    def _owner_of(self, registry_key: str | None) -> bytes | None:
        """Return the id of the process that a registry belongs to."""
        if registry_key is None:
            return None
        key = check_name("registry_key", registry_key).encode(ENCODING, ERRORS)
        prefix = _registry_prefix(self.engine.identity)
        if not key.startswith(prefix) or len(key) == len(prefix):
            raise ConfigurationError(
                f"registry_key is the registry_key of a process of this namespace, not "
                f"{registry_key!r}: one begins with {_text(prefix)!r}"
            )
        return key[len(prefix) :]

    @property
    def _dead_letters(self) -> DeadLetters:
        engine = self.engine
        return DeadLetters(engine.identity, engine.members, engine.executor, engine.codec)

    def _look(self, resource: str, token: int) -> Flow[list[Any]]:
        check_name("resource", resource)
        letters = self._dead_letters
        partials = yield from letters.look(resource, token)
        where = letters.key(resource, token)
        return [self.engine.codec.decode(resource, partial, where) for partial in partials]

    def _replay(self, resource: str, token: int) -> Flow[Sequence[BaseException]]:
        check_name("resource", resource)
        return self._dead_letters.replay(resource, token)

    def _discard(self, resource: str, token: int) -> Flow[None]:
        check_name("resource", resource)
        return self._dead_letters.discard(resource, token)


class Process(BaseProcess):
    """A participant, which makes references, locks, collections and batches.

    One interpreter may have several processes, each of which counts for itself. A process connects
    when it is made, and then sends heartbeats from a daemon thread. Use it in a ``with`` block, or
    call `stop`: both end its open sessions. A process that ends in another way (``kill -9``) is
    declared dead after four heartbeat intervals without a heartbeat; the others then take over its
    resources and finish its batches. A process that was only paused for so long goes on under a new
    id: it keeps its local data, and has lost its locks and the batches that it was executing.

    After ``os.fork`` the child's copy becomes another process, with a new id and without
    memberships and locks; the parent keeps its own. Workers of ``multiprocessing`` and of Celery
    stop their processes when they end.

    Args:
        session_length: Has no effect: a membership lasts as long as its process's lease, which the
            heartbeat renews. It is still checked: seconds, at least two heartbeat intervals. A URL
            in this place is used as ``url``.
        host: The server's host.
        port: The server's port.
        db: The server's database.
        heartbeat_interval: Seconds between two heartbeats.
        recover_failed_processes: Whether this process executes the batches of dead ones: when
            it starts, and after every heartbeat. All processes release the locks and memberships of
            dead ones.
        hosts: Nodes of a cluster, ``"host:port"`` each, instead of ``host`` and ``port``.
        url: The server's URL, instead of those: ``redis://``, ``rediss://``, ``unix://``,
            ``redis+cluster://``, ``redis+sentinel://`` or ``embedded://``.
        client: A ``redis.Redis`` or ``redis.RedisCluster`` to use, instead of those.
        namespace: Processes of different namespaces do not see each other. Any text.
        partitions: The number of partitions of the namespace, 1 to 16384. Its first process fixes
            it; None adopts that number, or 16. More partitions let a large cluster share the work
            evenly.
        serializer: Encodes partials; the same in all processes.
        retry: The times at which a batch whose ``execute`` fails is tried again, or parked.
        retry_timeout: Seconds to go on repeating a call that is not answered, before its caller
            gets a `ConnectionLostError`. The call itself is kept, and goes on in the background.
        durability: The confirmation that a call which stores data waits for.
        on_error: Called, from any thread, with every background error: a `BatchLostError`,
            `LockLostError`, `DeclaredDeadError` or `ServerStateLostError`, or an error that
            ``execute`` raised in the background. All of them are logged as well.
        executor: Threads that run ``execute`` if several sessions end together, instead of the
            calling thread, so that slow writes overlap. A resource's batches stay in order. Shut
            it down yourself, after `stop`; a forked child does not use it. A thread that ends a
            session waits for these threads, so do not end sessions in them.
        max_backlog: The most unfinished sessions and calls with which new updates are taken in.
            Work is unfinished if ``execute`` fails or the server does not answer.
        overflow: Whether a new update then waits for room, for `BLOCKING_TIMEOUT` at the most
            (``"block"``), or raises a `BacklogFullError` at once (``"raise"``).

    If no argument names the server, its URL is the environment variable ``PHONON_URL``, or
    ``redis://localhost:6379/1``.

    Raises:
        ConfigurationError: An argument is invalid.
        ServerUnreachableError: There is no server at that address.
        ServerError: The server cannot be used: too old, wrong password.

    Example:
        >>> with Process() as process:  # at $PHONON_URL, or on this machine
        ...     reference = process.create_reference("import-42")
        ...     print(reference.count())
        1
    """

    Lock: ClassVar = phonon.lock.Lock

    def __init__(
        self,
        session_length: float | str = SESSION_LENGTH,
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
        partitions: int | None = None,
        serializer: Serializer | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - immutable
        retry_timeout: float = 15.0,
        durability: Durability | None = None,
        on_error: Callable[[Exception], object] | None = None,
        executor: Executor | None = None,
        max_backlog: int = 100_000,
        overflow: Overflow = "block",
    ) -> None:
        length, url = url_first(session_length, url)
        check_executor(executor)
        check_process(
            session_length=length,
            heartbeat_interval=heartbeat_interval,
            retry_timeout=retry_timeout,
            namespace=namespace,
            partitions=partitions,
            serializer=serializer,
            retry=retry,
            durability=durability,
            on_error=on_error,
            max_backlog=max_backlog,
            overflow=overflow,
            is_async=False,
        )
        found = url_of(url, hosts, client, (host, port, db))
        self.session_length = length
        self.heartbeat_interval = heartbeat_interval
        self.recover_failed_processes = check_flag(
            "recover_failed_processes", recover_failed_processes
        )
        self.namespace = namespace
        self._stop_lock = threading.RLock()
        self._connection = sync_io.run(
            connect.connect(
                found,
                client,
                library.default(),
                sync_io.BACKEND,
                longest_pause=self.RETRY_SLEEP,
                durability=durability,
            )
        )
        try:
            self._engine = self._make_engine(
                ProcessOptions(
                    namespace,
                    partitions,
                    heartbeat_interval,
                    self.recover_failed_processes,
                    retry,
                    max_backlog,
                    overflow,
                ),
                serializer or ExactSerializer(),
                on_error,
                executor,
                retry_timeout,
            )
            try:
                if not _lifetime.is_to_be_forked():
                    self._engine.start()  # otherwise the first call in a worker does this
            except BaseException:
                self._engine.close()
                raise
        except BaseException:
            self._close_connection()
            raise
        _lifetime.tell_of_forks(self)
        _lifetime.stop_at_exit(self)

    def _make_engine(
        self,
        options: ProcessOptions,
        serializer: Serializer,
        on_error: Callable[[Exception], object] | None,
        executor: Executor | None,
        retry_timeout: float,
    ) -> ThreadEngine:
        server, functions = self._connection.server, library.default()
        return ThreadEngine(
            options,
            weakref.ref(self),
            functions,
            lambda identity: ThreadDriver(
                server, functions, identity, retry_timeout=retry_timeout, executor=executor
            ),
            lambda engine: make_codec(engine, serializer, is_async=False),
            on_error=on_error,
            address=server.address,
            client=self._connection.client,
        )

    def _close_connection(self) -> None:
        sync_io.run(self._connection.close())

    @property
    def engine(self) -> ThreadEngine:
        """The process's parts, which are private."""
        return self._engine

    def __repr__(self) -> str:
        return f"<phonon.Process {self.id} at {self._engine.address}>"

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

    def create_reference(
        self, resource: str, block: bool = True, parties: int | None = None
    ) -> Reference:
        """Join a resource, and return a reference to it.

        Inside `batch` the membership begins when the block ends, unless ``parties`` is given.

        Args:
            resource: The resource's name, any text.
            block: Whether the reference's locks wait by default.
            parties: The number of different processes that will hold the resource, if known. No
                process is the last one before so many have joined: otherwise the first one to
                finish could count as the last while others have not begun. A process that has died
                counts as one that has left. All processes must name the same number.

        Raises:
            ConfigurationError: An argument is invalid.
            ConnectionLostError: The server does not answer.
        """
        reference = Reference(self, resource, block, parties)
        if not self._joins_in_a_batch(reference):
            self._engine.run(reference.joining())
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
        timeout: float | None = None,
    ) -> "phonon.lock.Lock":
        """Return a lock on a resource, for a ``with`` block.

        Args:
            lock_key: The resource's name, any text.
            block: Whether to wait if the lock is taken.
            shared: Whether to share the lock with other shared holders.
            reentrant: Whether the thread that has the lock may take it again.
            lease: Seconds that it lasts unless renewed. None: as long as the process's lease.
            on_lost: Called with the lock, from any thread, once the lock is found to be lost.
            timeout: Seconds to wait at the most, unless `acquire` is given another number; -1 waits
                for ever. None: `Process.BLOCKING_TIMEOUT`.
        """
        return phonon.lock.Lock(
            self,
            lock_key,
            block,
            shared=shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
            timeout=timeout,
        )

    def semaphore(
        self,
        name: str,
        places: int,
        block: bool = True,
        *,
        lease: float | None = None,
        on_lost: "Callable[[phonon.lock.Lock], object] | None" = None,
        timeout: float | None = None,
    ) -> "phonon.lock.Semaphore":
        """Return a semaphore, for a ``with`` block: places that can be held at the same time.

        Args:
            name: The semaphore's name, any text.
            places: The number of places; all processes must name the same number.
            block: Whether to wait if all places are taken.
            lease: Seconds that a place lasts unless renewed. None: as long as the process's lease.
            on_lost: Called with the semaphore, from any thread, once a place is found to be lost.
            timeout: Seconds to wait at the most, unless `acquire` is given another number; -1 waits
                for ever. None: `Process.BLOCKING_TIMEOUT`.
        """
        return phonon.lock.Semaphore(
            self, name, places, block, lease=lease, on_lost=on_lost, timeout=timeout
        )

    def collect(
        self,
        model: Callable[P, M],
        max_entries: int = 10_000,
        *,
        idle: float | None = None,
        longest: float | None = None,
        largest: int | None = None,
        ignore_unknown: bool = False,
        sink: "Sink | None" = None,
    ) -> Collection[P, M]:
        """Return a collection, which merges messages into a model's records by their keys.

        Args:
            model: A subclass of `Model`.
            max_entries: The number of keys to keep in this process at the most. The key without a
                message for the longest time makes room for a new one.
            idle: Seconds without a message after which this process leaves a key's session.
            longest: Seconds after which it ends the session although messages keep coming.
            largest: The number of messages from this process after which it ends the session.
            ignore_unknown: Whether to ignore a message's fields that the model does not have.
            sink: The sink to write records to, in place of the model's ``on_complete``; see
                `phonon.sinks`. All of the model's records in this interpreter are written to it,
                including those that are taken over from processes that have died.

        Raises:
            ConfigurationError: An argument is invalid, or the model never completes.
        """
        return Collection(
            self,
            model,
            max_entries,
            idle=idle,
            longest=longest,
            largest=largest,
            ignore_unknown=ignore_unknown,
            sink=sink,
        )

    def source(self, name: str, position: int | None = None) -> Source:
        """Claim an ordered source of messages, such as a partition of a Kafka topic.

        From now on no other consumer can store messages of the source, not even one that has lost
        it in a rebalance and does not know that yet.

        Args:
            name: A unique name: topic and partition, for example.
            position: A new position for the source, so that messages are stored again, or
                skipped. None keeps its position.

        Returns:
            The source. Seek to its `position`, and give it batches of messages.

        Raises:
            SourceLostError: Another consumer has claimed it at the same time.
            ConnectionLostError: The server does not answer.
        """
        check_position(position)
        flow = self._engine.sources.claim(check_name("name", name), position)
        return Source(self, self._engine.run(flow))

    @overload
    def batch(self, *, durable: bool = True) -> Batch: ...

    @overload
    def batch(
        self,
        messages: Iterable[M],
        *,
        dedupe: str,
        message_id: Callable[[M], Any] | None = None,
        window: float = WINDOW,
    ) -> Messages[M]: ...

    def batch(
        self,
        messages: Iterable[Any] = (),
        *,
        durable: bool = True,
        dedupe: str | None = None,
        message_id: Callable[[Any], Any] | None = None,
        window: float = WINDOW,
    ) -> Batch:
        """Collect the calls of this thread, and send them together when the ``with`` block ends.

        References created, updates made and sessions ended inside the block are merged per key
        and travel in one exchange, so that a batch of messages costs hardly more than one. After
        the block all of its data is on the server, and the messages can be acknowledged. If the
        block's body raises, no data of the block is stored, and caches are as they were before:
        hand all messages back to their broker. Only these effects of the body stay: locks,
        modifications, `Reference.dereference`, `stop`, data that another thread has stored or ended
        meanwhile, and the ends of sessions from before the block that a cache has ended.

        If leaving the block raises, data that could not be stored is kept and goes with the next
        batch or with `flush`: acknowledge the messages when that has returned. Do not hand them
        back to the broker as well, or they count twice.

        Args:
            durable: Whether updates made with ``init_cache=False`` are stored as well. If not,
                their data stays in this process until the session ends, and only the memberships
                travel together.
            messages: With ``dedupe``: the messages. Loop over the batch, and make the updates of
                each message there.
            dedupe: The scope of the messages' ids: the name of a queue, for example. A message
                whose id was stored is not stored again. If the block raises, no data of it is
                stored. Leaving the block raises `AlreadyStoredError` if an earlier delivery of a
                message was stored without this process knowing: handle the same messages again.
            message_id: Returns a message's id: a str, bytes or int. None: its attribute or method
                ``id``, its key ``"MessageId"``, or the first item of a tuple.
            window: Seconds for which ids are remembered on the server.
        """
        if (dedupe, messages, message_id, window) != (None, (), None, WINDOW):
            progress = unordered(self._engine, dedupe, window)
            mark = id_of if message_id is None else message_id
            return Messages(self._engine, progress, messages, mark)
        batch: Batch | None = self._engine.batch
        if batch is None:
            return Batch(self._engine, durable=check_flag("durable", durable))
        batch.durable |= check_flag("durable", durable)
        return batch

    def flush(self) -> None:
        """Store the data that a batch could not store because the server was gone.

        Raises:
            ConnectionLostError: The server is still gone.
        """
        raise_together("not everything could be stored", self._errors(self._flush()))

    def add_to_registry(self, resource: str, registry_key: str | None = None) -> int:
        """Enter a resource into a registry. Phonon maintains this process's registry itself.

        Args:
            resource: The resource's name.
            registry_key: Another process's `registry_key`; None for this one's.

        Returns:
            1 if the resource was not there yet.
        """
        return int(self._engine.run(self._track(resource, registry_key, there=True)))

    def remove_from_registry(self, resource: str, registry_key: str | None = None) -> int:
        """Remove a resource from a registry. Phonon maintains this process's registry itself.

        Args:
            resource: The resource's name.
            registry_key: Another process's `registry_key`; None for this one's.

        Returns:
            1 if the resource was there.
        """
        return int(self._engine.run(self._track(resource, registry_key, there=False)))

    def get_registry(self, registry_key: str | None = None) -> list[str]:
        """Return the resources that a process may be responsible for, in all partitions.

        Args:
            registry_key: Another process's `registry_key`; None for this one's.
        """
        found: list[str] = self._engine.run(self._registry(registry_key))
        return found

    def parked(self) -> list[Parked]:
        """Return the batches of all processes that were parked after too many failed attempts.

        They stay until they are replayed or discarded. Meanwhile their resources go on.
        """
        found: list[Parked] = self._engine.run(self._dead_letters.find())
        return found

    def look(self, resource: str, token: int) -> list["Update"]:
        """Return the content of a parked batch: its partials as updates, in the order of storing.

        Raises:
            BatchMissingError: There is no such parked batch.
            UndecodableError: A partial cannot be read.
            UnknownClassError: The batch's class is not imported here.
        """
        found: list[Update] = self._engine.run(self._look(resource, token))
        return found

    def replay(self, resource: str, token: int) -> None:
        """Execute a parked batch now, in this process.

        The batch gets a new token, so that a database that has seen later ones accepts it. If the
        batch fails again, it is tried again and parked like any other.

        Raises:
            BatchMissingError: There is no such parked batch.
            BatchRunningError: Another batch of the resource is being executed.
            UnknownClassError: The batch's class is not imported here. The batch stays parked.
            UndecodableError: A partial cannot be read. The batch stays parked.
            Exception: The error of ``execute``.
        """
        raise_together("the batch failed again", self._errors(self._replay(resource, token)))

    def discard(self, resource: str, token: int) -> None:
        """Delete a parked batch, with its data.

        Raises:
            BatchMissingError: There is no such parked batch.
        """
        self._engine.run(self._discard(resource, token))

    def stop(self) -> None:
        """End the sessions that this process still holds, release its locks, and deregister.

        A second call does nothing; any other call raises `ProcessStoppedError` afterwards. Inside
        `batch` this ends the block. Let other threads finish their blocks first.

        Raises:
            Exception: Some sessions could not be ended; several errors come as an ExceptionGroup.
                Survivors take over the data on the server.
        """
        notice()  # a forked child stops its own copy, which has a separate lock
        _lifetime.forget(self)
        engine = self._engine
        # A worker's on_error may call this while another thread stops the process and waits for
        # the worker.
        if not self._stop_lock.acquire(blocking=not engine.is_worker):
            return
        try:
            if engine.stopped:
                return
            errors: list[BaseException] = []
            try:
                batch = engine.batch
                if batch is not None:
                    errors += batch.close()
                errors += engine.stop()
            finally:
                engine.close()
                self._close_connection()
        finally:
            self._stop_lock.release()
        raise_together("stopping left something undone", errors_only(errors))

    def begin_after_fork(self) -> None:
        """Reset the child's copy. Threads of the parent may have held its locks."""
        self._stop_lock = threading.RLock()
        self._engine.driver.executor = None  # its threads are the parent's
        self._engine.after_fork_in_child()

    def _errors(self, flow: Flow[Sequence[BaseException]]) -> list[Exception]:
        return errors_only(self._engine.run(flow))


def url_first(session_length: Any, url: str | None) -> tuple[Any, str | None]:
    """Return session length and URL, also if the URL was given in place of the first.

    Raises:
        ConfigurationError: There are two URLs.
    """
    if isinstance(session_length, str) and "://" not in session_length:
        raise ConfigurationError(
            f"the first argument is the URL of the server, not {session_length!r}: write "
            f'"redis://{session_length}", or host=, port= and db=; or it is session_length, a '
            "number"
        )
    if hasattr(session_length, "execute_command"):
        raise ConfigurationError("a client is not the first argument: give it as client=")
    if not isinstance(session_length, str):
        return session_length, url
    if url is not None:
        raise ConfigurationError("there are two URLs: give one, as url= or as the first argument")
    return SESSION_LENGTH, session_length


def make_codec(engine: Engine, serializer: Serializer, *, is_async: bool) -> UpdateCodec:
    """Return the codec of a process."""

    def key(kind: str, resource: str) -> str:
        partition, name = engine.members.place(resource)
        prefix = engine.identity.partitions.prefixes[partition]
        return f"{_text(prefix)}{kind}:{decode(name)}"

    return UpdateCodec(serializer, engine.public, is_async, key)


def _registry_prefix(identity: Any) -> bytes:
    prefix: bytes = identity.partitions.prefixes[0] + b"registry:"
    return prefix


def _text(key: bytes) -> str:
    return key.decode(ENCODING, ERRORS)
