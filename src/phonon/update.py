"""Updates: small messages about a key, merged wherever they arrive, executed once a session."""

import time
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn, Self

from phonon._core import classes, codec
from phonon._core.attributes import attributes_of, methods_for
from phonon._core.copies import DEEP, PLAIN, copied
from phonon._core.detached import DetachedEngine, detached
from phonon._core.engine import Engine, errors_only
from phonon._core.flows import CALLER_GONE, Flow
from phonon._core.forks import SAME, notice
from phonon._core.local import (
    DEFAULT,
    HARD_SESSION,
    ODD,
    SHARED,
    SOFT_SESSION,
    LocalUpdate,
    prefix_of,
)
from phonon._core.parcels import Ending
from phonon._core.shown import shown
from phonon.errors import ConfigurationError
from phonon.reference import Reference
from phonon.settings import check_flag, check_owner

if TYPE_CHECKING:
    from phonon.process import Process


class Update(LocalUpdate):
    """Data about one record, merged wherever it arrives and written to the database once.

    Subclass it and override `merge` and `execute`; override `state` and `reset_states` if you set
    attributes of your own. An update made in one process is merged there with later ones of the
    same record (`LruCache` does so), with those of other processes on the server, and is executed
    by the last process that ends its session.

    Set attributes that `state` returns *before* calling this constructor.

    A class is known on the server by its qualified name. The class keyword ``name`` gives it
    another one, for a class that is made in a function or that moves:
    ``class Row(Update, name="row")``. With ``aliases=["app.rows.Row"]`` it executes data of its
    former names as well, and with ``version=2`` what version 1 has stored goes through `upgrade`.

    Args:
        process: The process it belongs to. None, for a unit test of `merge` and `execute`: then
            nothing of the update can be stored.
        _id: The record's key; with ``database`` and ``collection`` it names the resource.
        database: The name of the database, for your `execute`.
        collection: The name of the collection or table, for your `execute`.
        spec: The identification of the record, for your `execute`. The update has a copy.
        doc: The data. The update has a copy.
        init_cache: Whether to store the data on the server at once, so that it survives this
            process. Inside `Process.batch` all data is stored when the block ends, unless
            ``durable=False`` is given there.
        block: Taken for compatibility; ending a session needs no lock.
        hard_session: Seconds after which the session is over although messages keep coming.
        soft_session: Seconds without a message after which the session is over.

    Attributes:
        resource_id: The name of the resource.
        token: The batch's token while `execute` runs, an int that grows strictly per resource and
            is the same in every attempt at the batch; else None.

    Raises:
        NotStorableError: A value has a type that cannot be stored.
        ConnectionLostError: The server does not answer. The data is kept and stored once, when the
            server is back: do not hand the message back to its broker.
        BacklogFullError: Too much work is unfinished; the update was not taken in.
        ConfigurationError: An argument is invalid.

    Example:
        >>> class Visits(Update):
        ...     def merge(self, other):
        ...         self.doc["n"] += other.doc["n"]
        ...     def execute(self):
        ...         print("write", self._id, self.doc["n"])
        >>> cache = LruCache(max_entries=1000)
        >>> for user in ("ada", "ada"):
        ...     cache.set(user, Visits(process, user, doc={"n": 1}))
        True
        False
        >>> cache.expire_all()
        write ada 2
    """

    __slots__ = ()

    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        version: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        classes.check_methods(cls, is_async=cls.is_async)
        cls._look_at_methods_()
        if not cls.is_folded_:
            # Before the first instance is made, a decorator of the class may replace the methods.
            cls._has_state_ = True
            cls._survey_ = cls._first_survey_  # type: ignore[assignment, method-assign]  # until then
        classes.register(cls, name, aliases, version)

    def __init__(  # noqa: C901, PLR0912, PLR0915 - all in one place: calls cost time
        self,
        process: "Process | None",
        _id: Any,
        database: str = DEFAULT,
        collection: str = DEFAULT,
        spec: Any = None,
        doc: Any = None,
        init_cache: bool = True,
        block: bool = True,
        hard_session: float = HARD_SESSION,
        soft_session: float = SOFT_SESSION,
    ) -> None:
        try:
            engine = process._engine or process.engine  # type: ignore[union-attr]  # noqa: SLF001 - a property costs time
        except AttributeError:
            if process is not None:
                check_owner(process)
            process = self._detached_()
            engine = process.engine
        if not SAME[0]:
            notice()
        next(engine.messages)
        self._id = _id
        self._process_ = process
        self._engine_ = engine
        self._generation_ = engine.identity.generation
        self.database = database
        self.collection = collection
        if database is DEFAULT and collection is DEFAULT:
            self.resource_id = resource = f"test.test.{_id}"
        else:
            self.resource_id = resource = f"{prefix_of(engine, database, collection)}{_id}"
        # An argument that equals the class's default needs no attribute of the instance.
        if block is not True:
            self.block = check_flag("block", block)
        if init_cache is not True and init_cache is not False:
            init_cache = check_flag("init_cache", init_cache)
        if hard_session is not HARD_SESSION:
            self.hard_session = _seconds("hard_session", hard_session)
        if soft_session is not SOFT_SESSION:
            self.soft_session = _seconds("soft_session", soft_session)
        self._lock_ = self._emptied_ = self._batch_ = self.spec = self.doc = None
        self._unsent_ = True
        self._is_opener_ = False
        self._check_at_ = 0.0
        found = 0 if type(_id) in PLAIN else ODD
        if spec is not None:
            self.spec = own = copied(spec)
            found = ODD if own is DEEP else found
        if doc is not None:
            own = None
            if type(doc) is dict:
                for key in doc:
                    kind = type(doc[key])
                    if kind is not int and kind not in PLAIN:
                        break
                    if type(key) is not str and type(key) not in PLAIN:
                        break
                else:
                    own = doc.copy()
            if own is None:
                own = copied(doc)
                found = ODD if own is DEEP else found
            self.doc = own
        if self._has_state_:
            try:
                found |= self._survey_()
            except AttributeError as error:
                self._explain_(error)
                raise
        if found & ODD:
            self._check_(engine, spec, doc)
        if found & SHARED:
            self._own_(engine)
        if engine.trace is not None:
            engine.trace(self)
        self._begun_ = self._touched_ = time.monotonic()
        if engine.outbox.full:
            self._begin_(engine, init_cache=init_cache)
            return
        if engine.batches:
            batch = getattr(engine.local, "batch", None)
            if batch is not None and batch.is_open and (batch.durable or init_cache):
                self._batch_ = batch
                fresh = batch.fresh
                fresh.append(self)
                if len(fresh) > batch.merge_at:
                    batch.shrink()
                return
        if init_cache:
            self._begin_(engine, init_cache=True)
            return
        opener = engine.members.held.get(resource)
        if opener is None or opener() is None:
            self._begin_(engine, init_cache=False)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} of {shown(self.resource_id)}: {self.doc!r}>"

    # To override

    def merge(self, other: Any) -> None:
        """Combine another update of the same record into this one.

        Partial results of several processes meet in any order, so the outcome must not depend on
        the order: addition, union, maximum, "latest by its own time stamp" are fine.

        `merge` runs in any process that has the class, also while the session goes on, and its
        result is merged again. `execute` sees the final result only.

        Args:
            other: An instance of the same class.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define merge(other)")

    def execute(self) -> Any:  # None; something to await in an AsyncUpdate
        """Write the merged record to the database.

        `execute` may run again if it raises or if its process dies before it could report back.
        A database has every batch exactly once if it stores `token` beside the record, in the
        same transaction, and skips a token that is not greater than the stored one.

        In a process that took over from a dead one your constructor has not run: the instance has
        the attributes of `state`, ``spec``, ``doc``, ``collection`` and ``database``.
        """
        if not self.executes_many():
            raise NotImplementedError(f"{type(self).__qualname__} must define execute()")
        for _, error in self.execute_many([self]) or ():
            raise error

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> Any:
        """Write many merged records to the database at once, if it is overridden.

        Sessions that end together, as in `LruCache.expire_all` and at the end of a
        `Process.batch` block, come in lists of up to 250, each update with its `token`. The rules
        of `execute` apply to each of them. A class may define this method, `execute`, or both.

        Args:
            updates: The records, each of another resource.

        Returns:
            Pairs of a failed update and its error; None if all succeeded. The failed ones are kept
            and tried again, as when `execute` raises.

        Raises:
            Exception: The method is called again for each record alone, so that only the bad
                records fail. So a write of the first call must be rolled back with its transaction,
                or be recognized by its token.
        """
        raise NotImplementedError(f"{cls.__qualname__} must define execute() or execute_many()")

    def state(self) -> dict[str, Any]:
        """Return your own attributes that are part of the record, by name."""
        return {}

    def reset_states(self) -> Any:
        """Empty the attributes that `state` returns, because their content is on the server now.

        ``doc`` is emptied already. Set them here, or return them as a dict.
        """

    def clear(self) -> Any:
        """Do the same as `reset_states`, under a newer name; override either."""
        return self.reset_states()

    @classmethod
    def upgrade(cls, old: dict[str, Any], version: int) -> dict[str, Any]:
        """Convert the stored content of an earlier version of the class to this version.

        Args:
            old: ``spec``, ``doc`` and the attributes of its `state`, by name; yours to change.
            version: The version that has stored it.

        Returns:
            The same attributes, as this version has them.
        """
        raise NotImplementedError(f"{cls.__qualname__} must define upgrade(old, version)")

    # To use

    def process(self) -> "Process":
        """Return the process that this update belongs to."""
        process: Process = self._process_
        return process

    @property
    def ref(self) -> Reference:
        """The reference to the record's resource."""
        if self._ref_ is None:
            self._ref_ = Reference(self._process_, self.resource_id, self.block)
        reference: Reference = self._ref_
        return reference

    def cache(self) -> None:
        """Store the unsent data on the server, so that it survives this process.

        Raises:
            NotStorableError: A value has a type that cannot be stored.
            ConnectionLostError: The server does not answer. The process keeps the data and stores
                it, once, when the server is back; call again to wait for that.
        """
        engine = self._own_engine_()
        self._check_loop_(engine)
        batch = engine.batch
        if batch is not None:
            batch.keep(self)
            batch.add(self)
        else:
            raise_first(engine.run(self.storing(engine)))

    def refresh(self, other: "Update") -> None:
        """Merge a newer update of the same record into this one, and extend the session.

        A session that is over is not extended.

        Args:
            other: The newer update, which is empty afterwards.

        Raises:
            ConfigurationError: It belongs to another record or class. Nothing was merged.
            ForkedError: This update belongs to the parent process.
        """
        self._own_engine_()
        if type(other) is not type(self) or other.resource_id != self.resource_id:
            raise self._not_the_same_(other)
        self._locked_(self._absorb_slowly_, other, self._now_())

    def is_expired(self) -> bool:
        """Return whether the session is over: silent for ``soft_session``, or too long in all."""
        return self._is_over_(self._now_())

    def end_session(self, block: bool = True) -> None:
        """End the session: send the data to the server, or to the database if this is the last one.

        An expired update, or one whose reference has ``force_expiry`` set, executes the data that
        has come together so far, even if other processes still hold the record. Inside
        `Process.batch` the session ends when the block does.

        Args:
            block: Taken for compatibility; ending a session needs no lock.

        Raises:
            Exception: The error that `execute` raised. The batch is kept and tried again.
            NotStorableError: A value has a type that cannot be stored; the data is still here.
            ConnectionLostError: The server does not answer. The session ends when it is back.
        """
        del block
        engine = self._own_engine_()
        self._check_loop_(engine)
        batch = engine.batch
        if batch is not None:
            batch.end(self)
        else:
            try:
                errors = engine.run(self.ending(engine))
            finally:
                self._renew_()
            raise_first(errors)

    def force_expiry(self) -> None:
        """Execute the data that has come together so far, even if other processes hold the record.

        Raises:
            Exception: As from `end_session`.
        """
        self._check_loop_(self._own_engine_())
        self.ref.force_expiry = True
        try:
            self.end_session()
        finally:
            self.ref.force_expiry = False

    def set_force_expiry(self, value: bool = True) -> None:
        """Set whether the next `end_session` executes the data that has come together so far."""
        self.ref.force_expiry = check_flag("value", value)

    @classmethod
    def executes_many(cls) -> bool:
        """Return whether the class has an `execute_many` of its own."""
        return cls.execute_many.__func__ is not Update.execute_many.__func__  # type: ignore[attr-defined]  # of classmethods

    # Flows

    def storing(self, engine: Engine) -> Flow[list[BaseException]]:
        """Store the unsent data, and wait for data that is under way.

        Returns:
            The errors.
        """
        if self.has_unsent():
            errors: list[BaseException] = yield from engine.outbox.store((self,))
            return errors
        # Another thread may be sending this data. A lane keeps the order, so the answer to this
        # join comes after the answer to that call.
        yield from engine.members.join(self.resource_id)
        return []

    def ending(self, engine: Engine) -> Flow[Sequence[BaseException]]:
        """End the session.

        Returns:
            The errors.
        """
        ending = Ending(self.resource_id, self, self.forced)
        (result,) = yield from engine.outbox.end((ending,))
        return result.errors

    def beginning(self, engine: Engine) -> Flow[list[BaseException]]:
        """Store the data of a new update. Data that the server refuses is not kept.

        Returns:
            The errors.
        """
        errors: list[BaseException] = yield from engine.outbox.store((self,))
        # A caller that has gone was told that the data is kept.
        if errors and not (yield CALLER_GONE) and not self.discard():
            errors[0].add_note("phonon: the data is kept all the same: do not hand it back")
        return errors

    # Machinery

    @classmethod
    def _look_at_methods_(cls) -> None:
        """Note which methods the class has of its own, and compile others for its `state`."""
        cls._has_state_ = cls.state is not Update.state
        listed = tuple(attributes_of(cls.state))
        if listed != cls._listed_:
            cls._listed_ = listed
            for own, method in methods_for(listed, LocalUpdate).items():
                setattr(cls, own, method)
        cls._has_default_expiry_ = (
            cls.refresh is Update.refresh and cls.is_expired is Update.is_expired
        )

    def _first_survey_(self) -> int:
        cls = type(self)
        cls._survey_ = methods_for(cls._listed_, LocalUpdate)["_survey_"]  # type: ignore[method-assign]  # in place of this one
        cls._look_at_methods_()
        return self._survey_() if self._has_state_ else 0

    def _now_(self) -> float:
        return time.monotonic()

    def _begin_(self, engine: Any, *, init_cache: bool) -> None:
        """Store the data, or join the session; inside a batch, when that ends."""
        self._check_loop_(engine)
        if type(engine) is DetachedEngine:
            return
        if engine.outbox.full:
            engine.outbox.wait_for_room(self._process_.BLOCKING_TIMEOUT)
        if self._is_left_to_others_(engine, init_cache=init_cache):
            return
        if init_cache:
            raise_first(engine.run(self.beginning(engine)))
        else:
            engine.run(engine.members.join(self.resource_id))
        self._open_(engine)

    def _is_left_to_others_(self, engine: Engine, *, init_cache: bool) -> bool:
        """Let an open batch, or the update that opened the session, store this; return if so."""
        batch = engine.batch
        if batch is not None and (batch.durable or init_cache):
            batch.add_new(self)
            return True
        if init_cache:
            return False
        held, resource = engine.members.held, self.resource_id
        if resource in held:
            opener = held[resource]
            if opener is None or opener() is None:
                self._open_(engine)
            return True
        if batch is None:
            return False
        if batch.joins.get(resource) is None:
            batch.joins[resource] = self
            self._is_opener_ = True
        return True

    def _detached_(self) -> Any:
        """Return what stands in for a process."""
        return detached(is_async=self.is_async)

    def _check_loop_(self, engine: Any) -> None:
        if engine.is_async:
            raise self._in_wrong_process_()

    def _in_wrong_process_(self) -> ConfigurationError:
        if self.is_async:
            return ConfigurationError(
                f"{type(self).__qualname__} is an AsyncUpdate and needs an AsyncProcess"
            )
        return ConfigurationError(
            f"{type(self).__qualname__} belongs to an AsyncProcess and this cannot be called from "
            "here: await the method of its asyncio twin, phonon.aio.AsyncUpdate"
        )

    def _explain_(self, error: AttributeError) -> None:
        error.add_note(
            f"phonon: {type(self).__qualname__}.state() is used by the constructor of Update: "
            "set the attributes that it returns before calling super().__init__()"
        )

    def _own_(self, engine: Engine) -> None:
        """Copy the attributes, because the caller may go on changing its objects."""
        for name, value in codec.state_of(self).items():
            if type(value) not in PLAIN and getattr(self, name, None) is value:
                own = copied(value)
                setattr(self, name, _deep_copy(value, engine) if own is DEEP else own)

    def _check_(self, engine: Engine, spec: Any, doc: Any) -> None:
        """Refuse at once a value that cannot be stored: later the data would be lost."""
        self.spec, self.doc = spec, doc
        codec.dump(self, engine.codec.serializer)
        for name, value in (("_id", self._id), ("spec", spec), ("doc", doc)):
            own = copied(value)
            setattr(self, name, _deep_copy(value, engine) if own is DEEP else own)


class _NoHeaders(dict[str, bytes]):
    """The headers of `Update` itself, which has no records."""

    def get(self, *_: Any) -> NoReturn:
        raise ConfigurationError(
            "Update itself stores nothing: make a subclass with merge(other) and execute()"
        )


Update._headers_ = _NoHeaders()


def _deep_copy(value: Any, engine: Engine) -> Any:
    serializer = engine.codec.serializer
    return serializer.loads(serializer.dumps(value))


class ConflictFreeUpdate(Update):
    """An update whose numbers add up.

    The default `merge` adds the numbers in ``doc``, also in nested dicts, and copies new keys. Of
    two values that are not numbers the greater one stays, so that the outcome does not depend on
    the order in which processes meet.

    Example:
        >>> class Views(ConflictFreeUpdate):
        ...     def execute(self):
        ...         print("write", self._id, self.doc)
        >>> views = Views(process, "/home", doc={"views": 1, "by": {"ada": 1}})
        >>> more = Views(process, "/home", doc={"views": 2, "by": {"bob": 2}}, init_cache=False)
        >>> views.refresh(more)
        >>> views.end_session()
        write /home {'views': 3, 'by': {'ada': 1, 'bob': 2}}
    """

    def merge(self, other: Any) -> None:
        """Add up the numbers of two docs."""
        add_up(self, other)


def add_up(mine: Update, other: Update) -> None:
    """Add the numbers in one update's doc to those in another's.

    Raises:
        TypeError: A doc is not a dict, or two of its values do not add up.
    """
    for update in (mine, other):
        if update.doc is not None and not isinstance(update.doc, Mapping):
            raise TypeError(
                f"the doc of {update!r} does not add up: give it a dict of numbers, as in "
                'doc={"n": 1}, or override merge()'
            )
    mine.doc = _sum(mine.doc or {}, other.doc or {})


def _sum(mine: Mapping[Any, Any], others: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(mine)
    for key, value in others.items():
        old = merged.get(key)
        if type(old) is int and type(value) is int:
            merged[key] = old + value
        elif old is None:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex | Decimal)


def _seconds(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigurationError(
            f"{argument} is a number of seconds, not {value!r}: give one like {argument}=60.0"
        )
    return value


def raise_first(errors: Iterable[BaseException]) -> None:
    """Raise an interrupt among errors, or the first of them."""
    for error in errors_only(errors):
        raise error
