"""Updates: small messages about a key, merged wherever they arrive, executed once a session."""

import marshal
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Self

from phonon import partials
from phonon.errors import ForkedError, NotStorableError
from phonon.reference import Reference

if TYPE_CHECKING:
    from phonon.engine import Engine
    from phonon.process import Process

#: Seconds without a message after which a session is over.
SOFT_SESSION = 30 * 60.0
#: Seconds after which a session is over although messages keep coming.
HARD_SESSION = 12 * 3600.0

# Types that need no look inside to be stored, and those that are looked into without ado.
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_FLAT = frozenset({list, tuple, set, frozenset})


class Update:
    """What has become known about one record, to be merged and written to the database once.

    Subclass it and override `merge` and `execute`; override `state` and `reset_states` if you set
    attributes of your own. An update made in one process is merged there with later ones of the
    same record (`LruCache` does so), with those of other processes on the server, and is executed
    by whoever is the last process to end its session.

    Set attributes that `state` returns *before* calling this constructor.

    Args:
        process: The process it belongs to.
        _id: The record's key; with ``database`` and ``collection`` it names the resource.
        database: The name of the database, for your `execute`.
        collection: The name of the collection or table, for your `execute`.
        spec: What identifies the record, for your `execute`.
        doc: The data.
        init_cache: Whether to store the data on the server at once, so that it survives this
            process. Inside `Process.batch` all is stored, when the block ends, unless that is told
            otherwise.
        block: Taken for compatibility; ending a session needs no lock.
        hard_session: Seconds after which the session is over although messages keep coming.
        soft_session: Seconds without a message after which the session is over.

    Attributes:
        resource_id: The name of the resource.
        token: The batch's token while `execute` runs, an int that grows strictly per resource and
            is the same in every attempt at the batch; else None.

    Raises:
        NotStorableError: A value has a type that cannot be stored.
        ConnectionLostError: The server does not answer; whether the data was stored is not known.
        BacklogFullError: Too much is left undone; this was not taken in.
    """

    #: Whether `execute` is a coroutine function, for processes of `phonon.aio`.
    is_async: ClassVar[bool] = False
    token: int | None = None
    resource_id: str
    block: bool = True
    hard_session: float = HARD_SESSION
    soft_session: float = SOFT_SESSION
    __process: "Process"
    __ref: Reference | None = None
    __home: object
    __lock: AbstractContextManager[Any]
    #: Whether it has what is nowhere else; and if not, what it had when it was emptied.
    __unsent: bool = True
    __emptied: bytes | None = None
    #: Whether it is the one that the process knows of this resource.
    __opens: bool = False
    __begun: float
    __touched: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        partials.register(cls)

    def __init__(
        self,
        process: "Process",
        _id: Any,
        database: str = "test",
        collection: str = "test",
        spec: Any = None,
        doc: Any = None,
        init_cache: bool = True,
        block: bool = True,
        hard_session: float = HARD_SESSION,
        soft_session: float = SOFT_SESSION,
    ) -> None:
        self._id = _id
        self.database = database
        self.collection = collection
        self.spec = spec
        self.doc = doc
        # What the class says already is not said again for each message.
        if not block:
            self.block = block
        if hard_session != HARD_SESSION:
            self.hard_session = hard_session
        if soft_session != SOFT_SESSION:
            self.soft_session = soft_session
        engine = self._attach(process)
        self.__check()
        self._open(engine, init_cache=init_cache)

    def _open(self, engine: "Engine", *, init_cache: bool, keep: bool = False) -> None:
        """Store the data, or join its session; inside a batch, when that ends."""
        if engine.backlog.full:
            engine.backlog.wait(self.process().BLOCKING_TIMEOUT)
        batch = engine.batch
        if batch is not None and (batch.durable or init_cache):
            batch.add(self)
        elif init_cache:
            base = engine.keys.base(self.resource_id)
            engine.run(base, engine.storing(self, keep=keep))
        else:
            opener = engine.held.get(self.resource_id)
            if opener is not None:
                if opener() is None:
                    self.opens(engine)
            elif batch is not None:
                batch.join(self.resource_id)
                self.opens(engine)
            else:
                engine.join(self.resource_id, engine.keys.base(self.resource_id), self)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} of {self.resource_id!r}: {self.doc!r}>"

    # To override

    def merge(self, other: Any) -> None:
        """Combine another update of the same record into this one.

        Partial results meet in no particular order of processes, so the outcome must not depend
        on it: addition, union, maximum, "latest by its own time stamp" are fine.

        It runs in any process that has the class, also while the session goes on, and what it
        came to is merged again. Of what is merged `execute` sees the result only.

        Args:
            other: An instance of the same class.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define merge(other)")

    def execute(self) -> Any:  # None; something to await in an AsyncUpdate
        """Write the merged record to the database.

        It may run again if it raises or if its process dies before it could report back. A
        database that stores `token` beside the record, in the same transaction, and skips a token
        that is not greater than the stored one, has every batch exactly once.

        In a process that took over from a dead one the instance was not made by your constructor:
        it has what `state` returned, ``spec``, ``doc``, ``collection`` and ``database``.
        """
        if not self.executes_many():
            raise NotImplementedError(f"{type(self).__qualname__} must define execute()")
        for _, error in self.execute_many([self]) or ():
            raise error

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> Any:
        """Write many merged records to the database at once, if it is overridden.

        Sessions that end together, as in `LruCache.expire_all` and at the end of a
        `Process.batch` block, come in lists of up to 250, each update with its `token`. What holds
        for `execute` holds for each of them. A class may define this one, `execute`, or both.

        Args:
            updates: The records, each of another resource.

        Returns:
            Pairs of those that failed and their errors; None if none did. They are kept and tried
            again, as when `execute` raises.

        Raises:
            Exception: It is called again for each record by itself, so that only those that are at
                fault fail: whatever it had written must not count (a transaction is rolled back)
                or be recognized by its token.
        """
        raise NotImplementedError(f"{cls.__qualname__} must define execute() or execute_many()")

    def state(self) -> dict[str, Any]:
        """The attributes of your own that are part of the record, by name."""
        return {}

    def reset_states(self) -> Any:
        """Empty the attributes that `state` returns: their content is on the server now.

        ``doc`` is emptied already. Set them here, or return them as a dict.
        """

    def clear(self) -> Any:
        """The later name of `reset_states`; override either."""
        return self.reset_states()

    # To use

    def process(self) -> "Process":
        """The process that this update belongs to."""
        return self.__process

    @property
    def ref(self) -> Reference:
        """The reference to the record's resource."""
        if self.__ref is None:
            self.__ref = Reference(self.__process.engine.process, self.resource_id, self.block)
        return self.__ref

    def cache(self) -> None:
        """Store what is unsent on the server, so that it survives this process.

        Raises:
            NotStorableError: A value has a type that cannot be stored.
            ConnectionLostError: The server does not answer. The process keeps the data and stores
                it, once, when the server is back; call again to wait for that.
        """
        engine = self.__engine()
        batch = engine.batch
        if batch is not None:
            batch.add(self)
        else:
            engine.run(engine.keys.base(self.resource_id), engine.storing(self))

    def refresh(self, other: "Update") -> None:
        """Merge a newer update of the same record into this one, and extend the session.

        A session that is over is not extended.

        Args:
            other: It is spent afterwards.

        Raises:
            ForkedError: This update is the parent process's.
        """
        engine = self.__engine()
        with self.__lock:
            # An update that was changed and set in its cache again is not its own double.
            if other is not self and other.__has_unsent():  # noqa: SLF001 - of this class
                if self.__has_unsent():
                    self.merge(other)
                else:
                    self.__adopt(other)
                self.__unsent = True
                other.__spent()  # noqa: SLF001 - of this class
                if other.__opens:  # noqa: SLF001 - of this class
                    other.__opens = False  # noqa: SLF001 - of this class
                    self.opens(engine)
            now = time.monotonic()
            if now - self.__touched < self.soft_session:  # a session that is over stays so
                self.__touched = now
        batch = engine.batch
        if batch is not None:
            batch.replace(other, self)

    def is_expired(self) -> bool:
        """Whether the session is over: silent for too long, or just too long."""
        now = time.monotonic()
        return now - self.__touched >= self.soft_session or now - self.__begun >= self.hard_session

    def end_session(self, block: bool = True) -> None:
        """End the session here: the data goes to the server, or to the database if we are the last.

        An expired update, or one whose reference is told to (``ref.force_expiry``), executes what
        has come together so far although other processes still hold the record. Inside
        `Process.batch` the session ends when the block does.

        Args:
            block: Taken for compatibility; ending a session needs no lock.

        Raises:
            Exception: What `execute` raised. The batch is kept and tried again.
            NotStorableError: A value has a type that cannot be stored; the data is still here.
            ConnectionLostError: The server does not answer. The session ends when it is back.
        """
        del block
        engine = self.__engine()
        batch = engine.batch
        if batch is not None:
            batch.end(self)
            return
        task = engine.ending(self.resource_id, self)
        engine.run_all([task])
        self.begin_session()
        for error in engine.errors_of(task):
            raise error

    def force_expiry(self) -> None:
        """Execute what has come together so far, although other processes may hold the record.

        Raises:
            Exception: As `end_session`.
        """
        self.ref.force_expiry = True
        try:
            self.end_session()
        finally:
            self.ref.force_expiry = False

    @property
    def forced(self) -> bool:
        """Whether the end of the session does not wait for other processes."""
        return self.is_expired() or (self.__ref is not None and self.__ref.force_expiry)

    def begin_session(self) -> None:
        """Whatever comes after the end belongs to another session."""
        self.__begun = self.__touched = time.monotonic()

    def has_unsent(self) -> bool:
        """Whether it has data that is not on the server."""
        with self.__lock:
            return self.__has_unsent()

    # The parcel that flows move to the server

    def take(self) -> bytes | None:
        """Move out what is unsent, as one partial; None if there is nothing.

        Raises:
            NotStorableError: A value has a type that cannot be stored; nothing was moved.
            ForkedError: The data is the parent process's.
        """
        self.__engine()
        with self.__lock:
            if not self.__has_unsent():
                return None
            partial = self._pack()
            self.__empty()
            return partial

    def put_back(self, partial: bytes) -> None:
        """The server refused a partial: it is unsent again."""
        older = partials.rebuild(self.__process.engine, self.resource_id, partial, "memory")
        with self.__lock:
            if self.__has_unsent():
                older.merge(self)
            self.__adopt(older)
            self.__unsent = True

    # Machinery

    def opens(self, engine: "Engine") -> None:
        """Be the update with which the process ends the session, if nobody else does."""
        self.__opens = True
        engine.held[self.resource_id] = weakref.ref(self)

    def _attach(self, process: "Process") -> "Engine":
        """What every instance has, however it came to be."""
        engine = process.engine
        self.__process = process
        self.__home = engine.home
        prefix = engine.prefixes.get((self.database, self.collection))
        if prefix is None:
            parts = (self.database, self.collection)
            escaped = (part.replace("%", "%25").replace(".", "%2E") for part in parts)
            prefix = engine.prefixes[parts] = ".".join(escaped) + "."
        self.resource_id = f"{prefix}{self._id}"
        self.__lock = engine.stripes[hash(self.resource_id) % len(engine.stripes)]
        self.__begun = self.__touched = time.monotonic()
        return engine

    def __engine(self) -> "Engine":
        engine = self.__process.engine
        if self.__home is not engine.home:
            raise ForkedError(
                f"{self!r} was made before fork() and belongs to the parent process: make updates "
                "in the process that handles the message"
            )
        return engine

    def __state(self) -> dict[str, Any]:
        try:
            return self.state()
        except AttributeError as error:
            error.add_note(
                f"phonon: {type(self).__qualname__}.state() is used by the constructor of Update: "
                "set the attributes that it returns before calling super().__init__()"
            )
            raise

    def __check(self) -> None:
        """Refuse what cannot be stored where it is made, not where it would be lost."""
        # Nearly all is plain, and a look that tells takes a tenth of the time that encoding does.
        if not (
            type(self._id) in _PLAIN
            and (self.spec is None or _are_plain((self.spec,)))
            and (self.doc is None or _are_plain((self.doc,)))
            and (type(self).state is Update.state or _are_plain(self.__state().values()))
        ):
            self.__dump()

    def __dump(self) -> bytes:
        """The record's content, encoded."""
        state = self.__state()
        content = [self._id, self.database, self.collection, self.spec, self.doc, state]
        serializer = self.__process.engine.serializer
        try:
            return serializer.dumps(content)
        except NotStorableError:
            named = {"_id": self._id, "spec": self.spec, "doc": self.doc, **state}
            for name, value in named.items():
                partials.explain(serializer, value, f"{type(self).__qualname__}.{name}")
            raise

    def _pack(self) -> bytes:
        """The record as it is, as one partial."""
        return partials.pack(type(self), self.__process.engine.serializer, self.__dump())

    def __empty(self) -> None:
        """The content is on the server: go on with none."""
        if self.doc is not None:
            self.doc = {}
        values = self.clear()
        if isinstance(values, dict):
            self.__set(values)
        self.__unsent = False
        self.__mark()

    def __mark(self) -> None:
        """Nothing is unsent now; what is changed from here on, without our being told, will be."""
        try:
            self.__emptied = self.__look()
        except NotStorableError:  # what execute has left need not be
            self.__emptied = None

    def __look(self) -> bytes:
        """What the content is, to see whether it changes."""
        try:
            return marshal.dumps((self.spec, self.doc, self.state()), 2)
        except ValueError:  # not of the interpreter's own types
            return self.__dump()

    def __has_unsent(self) -> bool:
        if self.__unsent:
            return True
        try:
            return self.__emptied is not None and self.__look() != self.__emptied
        except NotStorableError:  # it was not so when it was emptied
            return True

    def __spent(self) -> None:
        self.__unsent, self.__emptied = False, None

    def __adopt(self, other: "Update") -> None:
        """Become what the other is. An empty update never merges: it need not have a zero."""
        self.spec, self.doc = other.spec, other.doc
        self.__set(other.state())

    def _restore(self, process: "Process", content: list[Any]) -> None:
        """Become what was stored."""
        self._id, self.database, self.collection, self.spec, self.doc, state = content
        self._attach(process)
        self.__set(state)

    def __set(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    @classmethod
    def executes_many(cls) -> bool:
        """Whether it has an `execute_many` of its own."""
        return cls.execute_many.__func__ is not Update.execute_many.__func__  # type: ignore[attr-defined]  # of classmethods

    @contextmanager
    def executing(self, merged: Self, token: int) -> Iterator[Self]:
        """Have a merged record in an instance while it executes.

        That is this one, which has what its constructor gave it, unless it has newer data.
        """
        with self.__lock:
            instance = merged if self.__unsent else self
            if instance is self:
                self.__adopt(merged)
                self.__spent()
        instance.token = token
        try:
            with self.__process.engine.backlog.working():
                yield instance
        finally:
            instance.token = None
            if instance is self:
                self.__mark()


class ConflictFreeUpdate(Update):
    """An update whose numbers add up.

    The default `merge` adds the numbers in ``doc``, also in nested dicts, and takes over what is
    new. Of anything else the greater value stays, so that the outcome does not depend on the
    order in which processes meet.
    """

    def merge(self, other: Any) -> None:
        """Add up the numbers of two docs."""
        self.doc = _sum(self.doc or {}, other.doc or {})


def _sum(mine: Mapping[Any, Any], others: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(mine)
    for key, value in others.items():
        old = merged.get(key)
        if old is None:
            merged[key] = value
        elif isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _sum(old, value)
        elif value is None:
            pass
        elif isinstance(old, bool) or isinstance(value, bool):
            merged[key] = old or value
        else:
            try:
                merged[key] = (
                    old + value if _is_number(old) and _is_number(value) else max(old, value)
                )
            except TypeError:
                raise TypeError(
                    f"doc[{key!r}]: {type(old).__name__} and {type(value).__name__} do not add up; "
                    "override merge()"
                ) from None
    return merged


def _are_plain(values: Iterable[Any]) -> bool:
    """Whether they surely can be stored: plain, or collections of what is plain."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind in _FLAT:
            if _PLAIN.issuperset(map(type, value)):
                continue
        elif (
            kind is dict
            and _PLAIN.issuperset(map(type, value))
            and _PLAIN.issuperset(map(type, value.values()))
        ):
            continue
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex | Decimal)
