"""The local state of an update: its unsent data, the end of its session, and its lock.

An update is emptied when its content goes to the server, and goes on, as an entry of a cache say.
"""

import marshal
import weakref
from collections.abc import Callable
from inspect import isawaitable
from sys import getrefcount
from typing import Any, ClassVar, Self

from phonon._core import codec
from phonon._core.copies import CONTAINERS, DEEP, FLAT, MUTABLE, PLAIN, UNSHARED, copied
from phonon._core.engine import Engine
from phonon._core.forks import SAME, notice
from phonon._core.sessions import GRACE, SPREAD, share
from phonon._core.shown import shown
from phonon.errors import ConfigurationError, ForkedError

#: Seconds without a message after which a session is over.
SOFT_SESSION = 30 * 60.0
#: Seconds after which a session is over although messages keep coming.
HARD_SESSION = 12 * 3600.0
#: The default database and collection.
DEFAULT = "test"
#: The digest of an emptied update that has no attributes of its own.
EMPTY = hash(b"")
#: Findings about the values of a state; see `LocalUpdate._survey_`.
ODD, SHARED = 1, 2


class LocalUpdate:
    """The part of an update that the core, caches and batches use; see `phonon.update.Update`."""

    # Names that end in an underscore are Phonon's own: subclasses may have any others. They are
    # slots because a message reads and sets most of them.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_batch_",
        "_begun_",
        "_check_at_",
        "_emptied_",
        "_engine_",
        "_generation_",
        "_id",
        "_is_opener_",
        "_lock_",
        "_process_",
        "_touched_",
        "_unsent_",
        "collection",
        "database",
        "doc",
        "resource_id",
        "spec",
    )

    #: Whether `execute` is a coroutine function, for processes of `phonon.aio`.
    is_async: ClassVar[bool] = False
    token: int | None = None
    block: bool = True
    hard_session: float = HARD_SESSION
    soft_session: float = SOFT_SESSION
    _id: Any
    database: str
    collection: str
    resource_id: str
    spec: Any
    doc: Any
    _process_: Any
    _engine_: Any
    #: The generation of its process: a forked child has another one.
    _generation_: object
    #: When the session began, and when it was last extended.
    _begun_: float
    _touched_: float
    #: The session is not over before this time; it may have been extended since.
    _check_at_: float
    #: The lock of the cache that holds the update; None: one of the engine's stripes.
    _lock_: Any
    #: Whether the update has data that is nowhere else. If not, its fingerprint when emptied:
    #: a digest, or the values of its state, if none of them can change in place without showing it.
    _unsent_: bool
    _emptied_: int | tuple[Any, ...] | None
    #: The batch that is going to store the update.
    _batch_: Any
    #: Whether `Process.stop` may end the session with this update.
    _is_opener_: bool
    _ref_: Any = None
    #: The codec's: how partials of this class begin, by the serializer's name.
    _headers_: ClassVar[dict[str, bytes]]
    #: The version of the class's stored data.
    _version_: ClassVar[int] = 1
    #: Whether the class has a `state` of its own, and the attributes that this lists, if it does
    #: nothing else; see `attributes`.
    _has_state_: ClassVar[bool] = False
    _listed_: ClassVar[tuple[str, ...]] = ()
    #: Makes an update of the same record, not attached yet, of decoded content, or returns None if
    #: that is another record's or not so simple. None where only the codec can do so.
    _like_: ClassVar[Callable[[Any, Any], Any] | None] = None
    #: Whether a cache may merge without calling `refresh` and `is_expired`.
    _has_default_expiry_: ClassVar[bool] = True

    # The user's

    def merge(self, other: Any) -> None:
        """Combine another update of the same record into this one."""
        raise NotImplementedError(f"{type(self).__qualname__} must define merge(other)")

    def state(self) -> dict[str, Any]:
        """Return the attributes of the subclass that are part of the record, by name."""
        return {}

    def clear(self) -> Any:
        """Empty these attributes."""

    def is_expired(self) -> bool:
        """Return whether the session is over."""
        return self._is_over_(self._now_())

    @classmethod
    def executes_many(cls) -> bool:
        """Return whether the class has an `execute_many` of its own."""
        raise NotImplementedError

    #: Whether messages are folded into ``doc`` as it is, and not absorbed.
    is_folded_: ClassVar[bool] = False

    @classmethod
    def missing_requirement_(cls) -> str:
        """Return the requirement that this interpreter lacks to execute updates, or ""."""
        return ""

    # The parcel that flows move to the server

    @property
    def forced(self) -> bool:
        """Return whether the session ends without waiting for other processes."""
        expired: Any = self.is_expired()
        if expired.__class__ is not bool and isawaitable(expired):
            raise codec.returned(self, expired, "is_expired", "returns whether the session is over")
        return bool(expired) or (self._ref_ is not None and self._ref_.force_expiry)

    def has_unsent(self) -> bool:
        """Return whether it has data that is not on the server."""
        return self._unsent_ or self._has_changed_()

    def _has_changed_(self) -> bool:
        """Return whether it has changed since it was emptied."""
        emptied = self._emptied_
        if emptied is None:
            return False
        try:
            if emptied.__class__ is not tuple:
                return self._fingerprint_(self._state_()) != emptied
            if self.spec is not None or self.doc:
                return True
            values = self.state().values()
            # Containers were empty then, and may be the same objects.
            return emptied != tuple(values) or any(
                [value and type(value) not in PLAIN for value in values]  # noqa: C419 - it is faster
            )
        except Exception:  # noqa: BLE001 - it could be stored when it was emptied, so it has changed
            return True

    def take(self) -> bytes | None:
        """Move the unsent data out, as one partial; None if there is none.

        Raises:
            NotStorableError: A value has a type that cannot be stored; nothing was moved.
            ForkedError: The data is the parent process's.
        """
        return self._taken_(keep=False)[0]

    def take_last(self) -> tuple[bytes | None, Any]:
        """Do what `take` does, and return the content as well, for `begin_again`.

        Returns:
            The partial and its content. The content is None if the partial has to be decoded.
        """
        return self._taken_(keep=True)

    def _taken_(self, *, keep: bool) -> tuple[bytes | None, Any]:
        engine = self._engine_
        if self._generation_ is not engine.identity.generation:
            self._own_engine_()
        while True:
            lock = self._lock_ or self._current_lock_()
            with lock:
                if lock is self._lock_ or lock is self._current_lock_():
                    return self._take_(engine, keep=keep)

    def _take_(self, engine: Engine, *, keep: bool) -> tuple[bytes | None, Any]:
        if not (self._unsent_ or self.has_unsent()):
            return None, None
        # First: a signal handler that ends the session meanwhile must not send a part of the data.
        self.mark_sent()
        partial = None
        try:
            packed = codec.pack(self, engine.codec.serializer)
            if len(packed) > engine.most_bytes:
                raise codec.too_large(self, len(packed), engine.most_bytes)  # noqa: TRY301 - handled like the errors of pack
            kept = self._content_() if keep else None
            partial = packed
            self._empty_()
        except BaseException:
            if partial is not None:  # an interrupt may have left it half emptied
                self._adopt_(engine.codec.decode(self.resource_id, partial, "memory"))
            self._unsent_ = True
            raise
        return partial, kept

    def _content_(self) -> Any:
        """Return a copy of the content; None if only the serializer can make one."""
        spec, doc = copied(self.spec), copied(self.doc)
        if spec is DEEP or doc is DEEP:
            return None
        kept = {}
        for name, value in codec.state_of(self).items():
            own = kept[name] = value if type(value) in PLAIN else copied(value)
            if own is DEEP:
                return None
        return spec, doc, kept

    def put_back(self, partial: bytes) -> None:
        """Take back a partial that the server refused: its data is unsent again."""
        engine: Engine = self._engine_
        older = engine.codec.decode(self.resource_id, partial, "memory")
        try:
            self._locked_(self._put_back_, older)
        except Exception:  # noqa: BLE001 - merging raises again when the batch is executed
            older = engine.codec.decode(self.resource_id, partial, "memory")
            engine.outbox.unsent.append(older)

    def _put_back_(self, older: Self) -> None:
        if self.has_unsent():
            codec.merge(older, self)
        self._adopt_(older)
        self._unsent_ = True

    def discard(self) -> bool:
        """Drop the unsent data, which the caller keeps. Return whether there was any."""
        return bool(self._locked_(self._discard_))

    def _discard_(self) -> bool:
        had = self.has_unsent()
        self.mark_sent()
        return had

    # For caches

    def absorb(self, other: Any) -> bool:
        """Merge another update into this one, whose lock is held.

        Args:
            other: The other update, which is empty afterwards.

        Returns:
            Whether the session was over.

        Raises:
            ConfigurationError: It belongs to another record or class. Nothing was merged.
            ForkedError: It is the parent process's.
            Exception: The error that ``merge`` raised.
        """
        if type(other) is not type(self) or other.resource_id != self.resource_id:
            raise self._not_the_same_(other)
        now = other._begun_
        batch = self._batch_
        if (
            now >= self._check_at_
            or not other._unsent_
            or other._is_opener_
            or other is self
            or other._generation_ is not self._generation_
        ):
            return self._absorb_slowly_(other, self._now_() if other is self else now)
        if not self._unsent_ or other._batch_ is not batch:
            batch = other._batch_
            if (
                self._unsent_
                or self._batch_ is not None
                or batch is None
                or not batch.is_open
                or self._has_changed_()
            ):
                return self._absorb_slowly_(other, now)
            # The first update since the content was stored, in an open batch.
            self._adopt_(other)
            self._unsent_, other._unsent_ = True, False
            self._touched_ = now
            batch.replace(other, self)
            return False
        if batch is None and self._engine_.durable_batches:
            return self._absorb_slowly_(other, now)  # neither is in the open batch
        result: object = self.merge(other)  # type: ignore[func-returns-value]  # it should not
        if result is not None:
            raise codec.returned(self, result)
        other._unsent_ = False
        self._touched_ = now
        self._engine_.merged += 1
        if batch is not None:
            fresh = batch.fresh
            if fresh and fresh[-1] is other:
                fresh.pop()
        return False

    def cached_under(self, lock: Any) -> None:
        """Become an entry of a cache, whose lock protects this update from now on.

        Raises:
            ForkedError: It is the parent process's.
        """
        self._own_engine_()
        entered = False
        while not entered:
            current = self._current_lock_()
            with current:
                entered = current is self._current_lock_()
                if entered:
                    self._lock_ = lock
        self._check_at_ = self._session_end_(self._touched_)

    # For the codec

    def attach(self, process: Any) -> None:
        """Give a process to an update that was decoded, not constructed."""
        self._process_ = process
        self._engine_ = engine = process.engine
        self._generation_ = engine.identity.generation
        self.resource_id = f"{prefix_of(engine, self.database, self.collection)}{self._id}"
        self._begin_at_(self._now_())

    def attach_like(self, other: Self) -> None:
        """Do the same, for the record that another update is about."""
        self._id, self.database, self.collection = other._id, other.database, other.collection
        self._process_, self._engine_ = other._process_, other._engine_
        self._generation_, self.resource_id = other._generation_, other.resource_id
        self._begin_at_(other._begun_)

    def _begin_at_(self, now: float) -> None:
        self._lock_ = self._emptied_ = self._batch_ = None
        self._unsent_ = True
        self._is_opener_ = False
        self._check_at_ = 0.0
        self._begun_ = self._touched_ = now

    @classmethod
    def upgraded_(cls, content: list[Any], version: int) -> list[Any]:
        """Return decoded content as this version of the class stores it."""
        identifier, database, collection, spec, doc, state = content
        new = cls.upgrade({**state, "spec": spec, "doc": doc}, version)
        if type(new) is not dict:
            raise TypeError(f"{cls.__qualname__}.upgrade() returned {new!r}: it returns a dict")
        spec, doc = new.pop("spec", None), new.pop("doc", None)
        return [identifier, database, collection, spec, doc, new]

    @classmethod
    def upgrade(cls, old: dict[str, Any], version: int) -> dict[str, Any]:
        """Convert the stored content of an earlier version of the class to this version."""
        raise NotImplementedError

    @classmethod
    def merge_stored_(cls, bodies: Any, serializer: Any) -> Any:
        """Merge contents by code of its own; None if it has none, or they are not so simple."""
        del bodies, serializer

    def fault_(self) -> str:
        """Return the fault of decoded content; empty if it is valid."""
        return ""

    def begin_execution(self, merged: Self, token: int) -> Self:
        """Return the instance that executes a merged record.

        That is this update, which has the attributes that its constructor set, unless it has newer
        data.
        """
        instance: Self = merged
        if merged is not self:
            instance = self._locked_(self._instance_for_, merged)
        instance.token = token
        return instance

    def _instance_for_(self, merged: Self) -> Self:
        if self.has_unsent():
            return merged
        self._adopt_(merged)
        self.mark_sent()
        return self

    def begin_again(self, content: Any, token: int) -> bool:
        """Take back the content that `take_last` has returned, to execute it.

        Returns:
            Whether it did. If not, this update has newer data, and another instance executes.
        """
        if not self._locked_(self._begin_again_, *content):
            return False
        self.token = token
        return True

    def _begin_again_(self, spec: Any, doc: Any, state: dict[str, Any]) -> bool:
        if self.has_unsent():
            return False
        self.spec, self.doc = spec, doc
        for name, value in state.items():
            setattr(self, name, value)
        self.mark_sent()
        return True

    def end_execution(self, instance: Self) -> None:
        """Note that an instance has executed. Later changes to it are unsent data."""
        if instance is not None:
            instance.token = None
        if instance is self:
            self._locked_(self._mark_)

    # Machinery. Where a state only lists attributes, `attributes` replaces some of these methods.

    def _now_(self) -> float:
        raise NotImplementedError

    def _survey_(self) -> int:
        """Look at the values of the state, before the constructor takes them in.

        Returns:
            The sum of `ODD`, if a value is not of a type that can be stored at sight, and
            `SHARED`, if one may have to be copied, because the caller may change it.
        """
        state: object = self.state()
        if not isinstance(state, dict):
            raise TypeError(
                f"{type(self).__qualname__}.state() returned {state!r}: it returns a dict of "
                "attributes by name"
            )
        found = 0
        for name, value in state.items():
            if name.__class__ is not str:
                raise TypeError(
                    f"{type(self).__qualname__}.state() names an attribute {name!r}: it "
                    "returns a dict of attributes by name"
                )
            kind = type(value)
            if kind in PLAIN:
                continue
            if kind not in FLAT:
                found = ODD | SHARED
                continue
            if not PLAIN.issuperset(map(type, value)):
                found |= ODD
            # A value without other references needs no copy.
            if kind in MUTABLE and (found & ODD or getrefcount(value) > UNSHARED):
                found |= SHARED
        return found

    def mark_sent(self) -> None:
        """Note that nothing is unsent: another update or the caller has the data."""
        self._unsent_, self._emptied_ = False, None

    def _adopt_(self, other: "LocalUpdate") -> None:
        """Take the other's content. It is not merged, so `merge` needs no identity element."""
        self.spec, self.doc = other.spec, other.doc
        if self._has_state_:
            for name, value in codec.state_of(other).items():
                setattr(self, name, value)

    def _empty_(self) -> None:
        """Go on without content: the data is on the server, or its broker delivers it again."""
        self.mark_sent()  # first: see `_take_`
        if self.doc is not None:
            self.doc = {}
        try:
            values = self.clear()
        except StopIteration as error:
            raise codec.stopped(self, "clear", error) from error
        if values is not None:
            if not isinstance(values, dict):
                raise codec.returned(
                    self,
                    values,
                    "reset_states() or clear",
                    "empties self and returns None, or a dict",
                )
            for name, value in values.items():
                setattr(self, name, value)
        self._mark_()

    def _mark_(self) -> None:
        """Note the present look: a later change, of which Phonon is not told, is unsent data."""
        if self._unsent_:
            return
        try:
            state = self._state_()
            self._emptied_ = self._values_(state) or self._fingerprint_(state)
        except Exception:  # noqa: BLE001 - execute may leave values that cannot be stored
            self._emptied_ = None

    def _state_(self) -> dict[str, Any] | None:
        """Return the state; None if the class has none of its own."""
        return self.state() if self._has_state_ else None

    def _values_(self, state: dict[str, Any] | None) -> tuple[Any, ...] | None:
        """Return the values of the state, if there is no more and each is plain or empty."""
        if state is None or self.spec is not None or self.doc:
            return None
        values = tuple(state.values())
        for value in values:
            kind = type(value)
            if kind not in PLAIN and (kind not in CONTAINERS or value):
                return None
        return values

    def _fingerprint_(self, state: dict[str, Any] | None) -> int:
        """Return a digest of the content, to see whether it changes."""
        if state is not None:
            content: Any = (self.spec, self.doc, state)
        elif self.spec is None and type(self.doc) is dict and not self.doc:
            return EMPTY
        else:
            content = (self.spec, self.doc)
        try:
            return hash(marshal.dumps(content, 2))
        except ValueError:  # a type that marshal does not know
            return hash(codec.dump(self, self._engine_.codec.serializer))

    def _open_(self, engine: Engine) -> None:
        """Register as the update that `stop` flushes."""
        self._is_opener_ = True
        engine.members.held[self.resource_id] = weakref.ref(self)

    def _take_over_(self, other: "LocalUpdate") -> None:
        """Take the registration of an update that was merged into this one."""
        engine = self._engine_
        other._is_opener_, self._is_opener_ = False, True
        held = engine.members.held.get(self.resource_id)
        if held is not None and held() is other:
            engine.members.held[self.resource_id] = weakref.ref(self)
        batch = engine.batch
        if batch is not None and batch.joins.get(self.resource_id) is other:
            batch.joins[self.resource_id] = self

    def _session_end_(self, touched: float) -> float:
        return min(touched + self.soft_session, self._begun_ + self.hard_session)

    def ends_at_(self) -> float:
        """Return when the session is ended if no message comes: a random while after its end.

        A message that comes in this while ends the session in its caller's thread, which gets the
        errors.
        """
        part = 1 + SPREAD * share(self.resource_id)
        soft, hard = part * self.soft_session, part * self.hard_session
        return min(self._touched_ + soft, self._begun_ + hard) + GRACE

    def _is_over_(self, now: float) -> bool:
        return now - self._touched_ >= self.soft_session or now - self._begun_ >= self.hard_session

    def _absorb_slowly_(self, other: Any, now: float) -> bool:
        """Merge another update, in the cases that `absorb` leaves to this method."""
        over = self._is_over_(now)
        engine = self._engine_
        other._own_engine_()
        batch = other._batch_
        if batch is None or not batch.is_open:
            batch = engine.batch if engine.batches else None
            if batch is not None and not batch.durable:
                batch = None
        theirs = self._batch_
        if theirs is not None and batch is not None and theirs is not batch and other is not self:
            # Another thread's batch stores this update. Our caller does not hear of that batch's
            # end but must know when all is stored, so the other update is stored separately.
            if other._batch_ is not batch:
                batch.keep(other)
                batch.add(other)
        else:
            if theirs is not None and batch is None and theirs.is_open and other is not self:
                # If the block raises, data from outside of it must stay.
                theirs.put_aside(self, other)
            elif other is not self:
                if batch is not None:
                    batch.keep(self)
                self._merge_or_adopt_(other)
            if other._is_opener_:
                self._take_over_(other)
            if batch is not None:
                batch.replace(other, self)
        if not over:
            self._touched_ = now
            self._check_at_ = self._session_end_(now)
        return over

    def _merge_or_adopt_(self, other: Any) -> None:
        if not (other._unsent_ or other.has_unsent()):
            return
        if self._unsent_ or self.has_unsent():
            result: object = self.merge(other)  # type: ignore[func-returns-value]  # it should not
            if result is not None:
                raise codec.returned(self, result)
            self._engine_.merged += 1
        else:
            self._adopt_(other)
        self._unsent_ = True
        other._unsent_, other._emptied_ = False, None

    def _renew_(self) -> None:
        """Begin another session, to which all later messages belong."""
        self._begun_ = self._touched_ = self._now_()
        self._check_at_ = 0.0

    def _own_engine_(self) -> Any:
        if not SAME[0]:
            notice()
        engine = self._engine_
        if self._generation_ is not engine.identity.generation:
            raise ForkedError(
                f"{self!r} was made before fork() and belongs to the parent process: make updates "
                "in the process that handles the message"
            )
        return engine

    def _current_lock_(self) -> Any:
        if self._lock_ is not None:
            return self._lock_
        stripes = self._engine_.stripes
        return stripes[hash(self.resource_id) % len(stripes)]

    def _locked_(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function under this update's lock, which changes when it enters a cache."""
        while True:
            lock = self._lock_ or self._current_lock_()
            with lock:
                if lock is self._lock_ or lock is self._current_lock_():
                    return function(*arguments)

    def _not_the_same_(self, other: Any) -> ConfigurationError:
        what = f"a {type(other).__qualname__}"
        if isinstance(other, LocalUpdate):
            what = f"the {type(other).__qualname__} of {shown(other.resource_id)}"
        return ConfigurationError(
            f"{what} cannot be merged into the {type(self).__qualname__} of "
            f"{shown(self.resource_id)}: a cache has one key for each record and class; give "
            "LruCache.set the record's own key, as in cache.set(update.resource_id, update)"
        )


def prefix_of(engine: Engine, database: Any, collection: Any) -> str:
    """Return how the names of a collection's resources begin.

    Raises:
        ConfigurationError: A name is no str.
    """
    for name, value in (("database", database), ("collection", collection)):
        if not isinstance(value, str):
            raise ConfigurationError(f"{name} is a str, not {value!r}: write {name}=str(...)")
    prefix = engine.prefixes.get((database, collection))
    if prefix is None:
        escaped = [part.replace("%", "%25").replace(".", "%2E") for part in (database, collection)]
        prefix = engine.prefixes[database, collection] = ".".join(escaped) + "."
    return prefix
