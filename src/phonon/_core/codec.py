"""The codec: the envelope of partials, and how a batch becomes records.

A partial is a msgpack array: the layout's number, the class's name, the serializer's name, and the
content, which the serializer has made of ``[_id, database, collection, spec, doc, state]``.
Everything read here may be forged or damaged: it is decoded within bounds, it sets no attribute but
those that the class's ``state`` names, and undecodable data raises an `UndecodableError`.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from inspect import iscoroutine
from typing import Any, ClassVar, Protocol

import msgpack

from phonon._core import classes
from phonon._core.classes import forget
from phonon._core.shown import shown
from phonon.errors import NotStorableError, UndecodableError, UnknownClassError
from phonon.serializers import ExactSerializer, Serializer, loads_plain

__all__ = ["Storable", "UpdateCodec", "UpdateRecord", "dump", "forget", "merge", "pack"]

log = logging.getLogger("phonon")

#: The layout of a partial; it changes when partials of the old one can no longer be read.
FORMAT = 1
#: _id, database, collection, spec, doc, state
CONTENT_LENGTH = 6
#: Longer data is checked before it is decoded: a forged array header of five bytes makes msgpack
#: allocate eight times the data's length, at each level.
_LOOK_THROUGH = 2048


class Storable(Protocol):
    """The interface of an update, as the codec uses it."""

    _id: Any
    database: str
    collection: str
    spec: Any
    doc: Any
    resource_id: str
    is_async: ClassVar[bool]
    #: The first bytes of the class's partials, by the serializer's name; never inherited.
    _headers_: ClassVar[dict[str, bytes]]

    def merge(self, other: Any) -> None:
        """Combine another update of the same record into this one."""

    def state(self) -> dict[str, Any]:
        """Return the attributes of the subclass, by name."""

    @classmethod
    def merge_stored_(cls, bodies: Sequence[bytes], serializer: Serializer) -> Any:
        """Merge contents by code of its own; None if it has none, or they are not so simple."""

    @classmethod
    def executes_many(cls) -> bool:
        """Return whether its records are executed together."""

    @classmethod
    def missing_requirement_(cls) -> str:
        """Return the requirement that this interpreter lacks for records of the class, or ""."""

    def attach(self, process: Any) -> None:
        """Give the update a process."""

    def begin_execution(self, merged: Any, token: int) -> Any:
        """Return the instance that executes a merged record."""

    def end_execution(self, instance: Any) -> None:
        """Note that an instance has executed."""


#: The number of bytes that give the length of msgpack's bytes, by their first byte.
_WIDTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_BIN8 = [bytes((0xC4, length)) for length in range(0x100)]
_BIN32 = 0x10000

#: The lists of attribute names that a class's `state` has returned so far.
_states: "weakref.WeakKeyDictionary[type[Any], set[tuple[str, ...]]]" = weakref.WeakKeyDictionary()


# Encoding


def pack(update: Storable, serializer: Serializer) -> bytes:
    """Return an update's content as a partial.

    Args:
        update: The update.
        serializer: Encodes the content.

    Raises:
        NotStorableError: A value has a type that cannot be stored; the message names the attribute.
    """
    return enveloped(type(update), serializer, dump(update, serializer))


def enveloped(cls: type[Any], serializer: Serializer, content: bytes) -> bytes:
    """Return the partial of a class that has this content."""
    length = len(content)
    header = cls._headers_.get(serializer.name) or _header(cls, serializer)
    if length < len(_BIN8):  # msgpack's bin 8, 16 and 32
        return header + _BIN8[length] + content
    if length < _BIN32:
        return b"%b\xc5%b%b" % (header, length.to_bytes(2, "big"), content)
    return b"%b\xc6%b%b" % (header, length.to_bytes(4, "big"), content)


def too_large(update: Storable, size: int, most: int) -> NotStorableError:
    """Return the error for content that is too large for the server."""
    return NotStorableError(
        f"{type(update).__qualname__} of {update.resource_id!r} has {size:,} bytes, and the server "
        f"takes {most:,}: make it smaller, or raise the server's proto-max-bulk-len and "
        "client-query-buffer-limit; its data is still in the update"
    )


def dump(update: Storable, serializer: Serializer) -> bytes:
    """Return an update's content, encoded by the serializer; see `pack`."""
    state = state_of(update)
    content = [update._id, update.database, update.collection, update.spec, update.doc, state]  # noqa: SLF001 - its public name
    try:
        data: object = serializer.dumps(content)
    except NotStorableError:
        if type(state) is not dict:
            raise TypeError(
                f"{type(update).__qualname__}.state() returned {state!r}: it returns a dict of "
                "attributes by name"
            ) from None
        named = {"_id": content[0], "spec": update.spec, "doc": update.doc, **state}
        for name, value in named.items():
            _explain(serializer, value, f"{type(update).__qualname__}.{name}")
        raise
    if not isinstance(data, bytes):
        raise TypeError(f"{serializer!r}.dumps() returned {data!r}: it returns bytes")
    return data


def state_of(update: Storable) -> dict[str, Any]:
    """Return the value of an update's `state`."""
    try:
        return update.state()
    except StopIteration as error:
        raise stopped(update, "state", error) from error


def stopped(update: Storable, method: str, error: StopIteration) -> RuntimeError:
    """Return the error for a method that has raised StopIteration, which would end a flow."""
    return RuntimeError(f"{type(update).__qualname__}.{method}() has raised {error!r}")


def _explain(serializer: Serializer, value: Any, where: str) -> None:
    """Raise an error that names the attribute, if this value cannot be stored."""
    if isinstance(serializer, ExactSerializer):
        serializer.dumps(value, where)
        return
    try:
        serializer.dumps(value)
    except NotStorableError as error:
        raise NotStorableError(f"{where}: {error}") from error


def _header(cls: type[Any], serializer: Serializer) -> bytes:
    """Return the first bytes of all partials of a class."""
    named = [FORMAT, classes.name_of(cls), serializer.name]
    parts = [msgpack.packb(part, unicode_errors="surrogatepass") for part in named]
    header: bytes = b"\x94" + b"".join(parts)
    cls._headers_[serializer.name] = header
    return header


# Decoding


def merge(mine: Storable, other: Storable) -> None:
    """Call a class's `merge`.

    Raises:
        TypeError: It returned a value, such as a coroutine, which nothing awaits.
        Exception: The error that it raised.
    """
    try:
        result: object = mine.merge(other)  # type: ignore[func-returns-value]  # it should not
    except StopIteration as error:
        raise stopped(mine, "merge", error) from error
    if result is not None:
        raise returned(mine, result)


def returned(
    update: Storable,
    result: Any,
    method: str = "merge",
    does: str = "changes self and returns None",
) -> TypeError:
    """Return the error for a method whose value would be ignored."""
    if iscoroutine(result):
        result.close()
    return TypeError(f"{type(update).__qualname__}.{method}() returned {result!r}: it {does}")


class UpdateCodec:
    """Turns partials into records, and records into partials.

    Args:
        serializer: Encodes contents.
        owner: Returns the public process that decoded updates belong to.
        is_async: Whether coroutine functions can be executed here.
        key: Returns the key of a resource, given the key's kind, for messages.
    """

    def __init__(
        self,
        serializer: Serializer,
        owner: Callable[[], Any],
        is_async: bool,
        key: Callable[[str, str], str] = lambda kind, resource: f"{kind}:{resource}",
    ) -> None:
        self.serializer = serializer
        self._owner = owner
        self._is_async = is_async
        self._key = key
        #: Resources and classes for which the log already says that partials are not merged early.
        self._unmerged: set[tuple[str, str]] = set()

    def can_execute(self, class_name: str) -> bool:
        """Return whether this process can execute batches of a class."""
        cls = classes.find(class_name)
        return (
            cls is not None
            and (self._is_async or not cls.is_async)
            and not cls.missing_requirement_()
        )

    def records(self, resource: str, partials: Sequence[bytes], local: Any) -> list["UpdateRecord"]:
        """Merge the partials of a batch, class by class, in the order of the classes' first ones.

        Args:
            resource: The batch's resource.
            partials: In the order in which they were stored.
            local: The update whose session ended here; it executes the record of its class.

        Raises:
            UnknownClassError: A class is not known here.
            UndecodableError: A partial cannot be read.
            Exception: The user's ``merge`` raised it.
        """
        update = self._merged_alike(resource, partials, local)
        if update is not None:
            self._check_loop(type(update), resource)
            return [UpdateRecord(local if type(local) is type(update) else update, update)]
        merged: dict[type[Any], Any] = {}
        where = ""
        for partial in partials:
            where = where or self._key("batch", resource)
            update = self.decode(resource, partial, where)
            cls = type(update)
            self._check_loop(cls, resource)
            first = merged.setdefault(cls, update)
            if first is not update:
                merge(first, update)
        return [
            UpdateRecord(local if type(local) is cls else update, update)
            for cls, update in merged.items()
        ]

    def kept(self, resource: str, partial: bytes, local: Any, content: Any) -> list["UpdateRecord"]:
        """Do what `records` does, for the only partial of a batch, which an update has just sent.

        Args:
            resource: The batch's resource.
            partial: The partial.
            local: The update.
            content: The content that its `take_last` has returned.
        """
        return [KeptRecord(self, resource, partial, local, content)]

    def _check_loop(self, cls: type[Any], resource: str) -> None:
        if cls.is_async and not self._is_async:
            name = classes.name_of(cls)
            raise UnknownClassError(
                f"a batch of {shown(resource)} belongs to {name}, an AsyncUpdate, and this process "
                "has no event loop: run an AsyncProcess that imports it",
                name,
            )
        lacking = cls.missing_requirement_()
        if lacking:
            name = classes.name_of(cls)
            raise UnknownClassError(
                f"a batch of {shown(resource)} belongs to {name}, which lacks {lacking}", name
            )

    def merge(self, resource: str, partials: Sequence[bytes]) -> list[bytes]:
        """Merge partials of an open session into fewer, class by class.

        The records that are executed in the end are the same: each class keeps its partials in the
        order in which they were stored, and the classes keep the order of their first partials. A
        partial that cannot be merged stays as it is, and none is moved past a partial that cannot
        be read.

        Returns:
            Partials with the same content.
        """
        update = self._merged_alike(resource, partials)
        if update is not None:
            with contextlib.suppress(Exception):  # what cannot be stored stays as it is
                return [self._packed(update)]
        where = self._key("partials", resource)
        merged: list[bytes | None] = list(partials)
        groups: dict[type[Any], list[tuple[int, Any]]] = {}
        for i, partial in enumerate(partials):
            try:
                update = self.decode(resource, partial, where)
            except UnknownClassError as error:
                self._not_merged(resource, error.class_name, error)
            except Exception as error:  # noqa: BLE001 - setting attributes may run the user's code
                self._not_merged(resource, "", error)
                self._merge_groups(resource, groups, merged)
                groups.clear()
            else:
                groups.setdefault(type(update), []).append((i, update))
        self._merge_groups(resource, groups, merged)
        return [partial for partial in merged if partial is not None]

    def _merge_groups(
        self,
        resource: str,
        groups: dict[type[Any], list[tuple[int, Any]]],
        merged: list[bytes | None],
    ) -> None:
        """Put the merge of each group into the place of its first partial."""
        for cls, ((at, first), *others) in groups.items():
            if not others:
                continue
            try:
                for _, other in others:
                    merge(first, other)
                partial = self._packed(first)
            except Exception as error:  # noqa: BLE001 - the error comes again when the batch is executed
                self._not_merged(resource, classes.name_of(cls), error)
                continue
            merged[at] = partial
            for i, _ in others:
                merged[i] = None

    def _packed(self, update: Any) -> bytes:
        partial = pack(update, self.serializer)
        most = self._owner().engine.most_bytes
        if len(partial) > most:
            raise too_large(update, len(partial), most)
        return partial

    def _merged_alike(self, resource: str, partials: Sequence[bytes], local: Any = None) -> Any:
        """Merge partials of one class and version by that class's own code.

        Args:
            resource: Their resource.
            partials: The partials.
            local: An update of the resource, if there is one.

        Returns:
            The update; None if they are not alike, or something is wrong with one of them.
        """
        if len(partials) < ALIKE and getattr(local, "_like_", None) is None:
            return None
        try:
            cls, version, body = self._open(resource, partials[0], "")
            bodies = _bodies(partials, body) if version == cls._version_ else None
            if bodies is None:
                return None
            if cls._like_ is not None and type(self.serializer) is ExactSerializer:
                known = type(local) is cls and cls._listed_ in _states.get(cls, ())
                update = self._merged_one_by_one(
                    resource, partials, bodies, local if known else None
                )
            else:
                update = cls.merge_stored_(bodies, self.serializer)
                if update is not None:
                    update.attach(self._owner())
        except Exception:  # noqa: BLE001 - it is met again where they are decoded one by one
            return None
        return update if update is not None and update.resource_id == resource else None

    def _merged_one_by_one(
        self, resource: str, partials: Sequence[bytes], bodies: Sequence[bytes], like: Any
    ) -> Any:
        """Merge partials of a class whose `state` only lists attributes; see `_merged_alike`.

        Args:
            resource: Their resource.
            partials: The partials.
            bodies: Their contents.
            like: An update of the resource, of the same class; None to decode the first partial.
        """
        merged: Any = None
        for partial, body in zip(partials, bodies, strict=True):
            if like is None:
                like = merged = self.decode(resource, partial, "")
                continue
            update = like._like_(loads_plain(body))
            if update is None:
                return None
            update.attach_like(like)
            if merged is None:
                merged = update
            else:
                merge(merged, update)
        return merged

    def _not_merged(self, resource: str, class_name: str, error: Exception) -> None:
        """Log that partials do not merge, once: the same ones come up again and again."""
        if (resource, class_name) in self._unmerged:
            return
        if len(self._unmerged) >= MOST_UNMERGED:
            self._unmerged.clear()
        self._unmerged.add((resource, class_name))
        log.debug("partials of %r are not merged before their session ends: %s", resource, error)

    def check(self, resource: str, partial: bytes, where: str = "") -> None:
        """Check that a partial can be decoded, and executed, here.

        Raises:
            UnknownClassError: Its class is not known here.
            UndecodableError: It cannot be read.
        """
        update = self.decode(resource, partial, where or self._key("batch", resource))
        self._check_loop(type(update), resource)

    def decode(self, resource: str, partial: bytes, where: str) -> Any:
        """Turn a partial into an update, without calling its constructor.

        Args:
            resource: The resource under which it is stored.
            partial: The partial.
            where: The key that holds it, for messages.

        Raises:
            UndecodableError: It cannot be read.
            UnknownClassError: Its class is not imported here.
        """
        cls, version, body = self._open(resource, partial, where)
        try:
            content = self.serializer.loads(body)
        except Exception as error:
            raise UndecodableError(f"{_place(resource, where)}: {error}") from error
        if (
            type(content) is not list
            or len(content) != CONTENT_LENGTH
            or type(content[1]) is not str
            or type(content[2]) is not str
            or not isinstance(content[5], dict)
        ):
            raise UndecodableError(f"{_place(resource, where)} does not hold an update's content")
        if version != cls._version_:
            try:
                content = cls.upgraded_(content, version)
            except Exception as error:
                error.add_note(f"phonon: {_place(resource, where)} was stored by version {version}")
                raise
        update: Any = object.__new__(cls)
        update._id, update.database, update.collection, update.spec, update.doc, state = content  # noqa: SLF001 - its public name
        update.attach(self._owner())
        if update.resource_id != resource:
            raise UndecodableError(
                f"{_place(resource, where)} belongs to another resource, "
                f"{shown(update.resource_id)}"
            )
        if state:
            _set_state(update, state, resource, where)
        fault = update.fault_()
        if fault:
            raise UndecodableError(f"{_place(resource, where)}: {fault}")
        return update

    def _open(self, resource: str, partial: bytes, where: str) -> tuple[type[Any], int, bytes]:
        try:
            if len(partial) > _LOOK_THROUGH:
                _look_through(partial)
            opened = msgpack.unpackb(partial, unicode_errors="surrogatepass")
            layout, name, serializer, body = opened
        except Exception as error:
            what = str(error) or type(error).__name__
            raise UndecodableError(
                f"{_place(resource, where)} is not one of Phonon's: {what}"
            ) from error
        if layout != FORMAT:
            raise UndecodableError(
                f"{_place(resource, where)} has layout {layout!r}; this release reads {FORMAT}"
            )
        if serializer != self.serializer.name:
            raise UndecodableError(
                f"{_place(resource, where)} was stored by serializer {serializer!r}, and this "
                f"process has {self.serializer.name!r}: give all processes the same serializer="
            )
        if type(name) is not str or type(body) is not bytes:
            raise UndecodableError(f"{_place(resource, where)} is not one of Phonon's")
        found = classes.resolve(name)
        if found is None:
            raise UnknownClassError(
                f"{_place(resource, where)} belongs to {name}, which is not imported in this "
                "process: import it, so that its batches can be executed here",
                name,
            )
        return *found, body


class UpdateRecord:
    """The part of a batch that belongs to one class.

    Attributes:
        group_class: The class, if its records are executed together; else None.
        instance: The update that executes it.
    """

    __slots__ = ("_local", "_merged", "group_class", "instance")

    def __init__(self, local: Any, merged: Any) -> None:
        self._local = local
        self._merged = merged
        self.group_class = type(merged) if merged.executes_many() else None
        self.instance: Any = None

    def begin(self, token: int) -> Any:
        """Return the instance that executes; it knows its token until `finish`."""
        self.instance = self._local.begin_execution(self._merged, token)
        return self.instance

    def finish(self) -> None:
        """Note that the execution has ended."""
        self._local.end_execution(self.instance)


class KeptRecord(UpdateRecord):
    """A batch whose only partial an update of this process has just sent: nothing is decoded.

    Args:
        codec: Decodes the partial, if the update has newer data by now.
        resource: The batch's resource.
        partial: The partial.
        local: The update.
        content: The content that its `take_last` has returned.
    """

    __slots__ = ("_codec", "_content", "_partial", "_resource")

    def __init__(
        self, codec: UpdateCodec, resource: str, partial: bytes, local: Any, content: Any
    ) -> None:
        super().__init__(local, local)
        # No closure: many sessions end together, and the garbage collector looks at each object.
        self._codec = codec
        self._resource = resource
        self._partial = partial
        self._content = content

    def begin(self, token: int) -> Any:
        """Return the instance that executes; it knows its token until `finish`."""
        if self._merged is self._local:
            if self._local.begin_again(self._content, token):
                self.instance = self._local
                return self.instance
            (record,) = self._codec.records(self._resource, (self._partial,), self._local)
            self._merged = record._merged  # noqa: SLF001 - of the same class
        return super().begin(token)


def _bodies(partials: Sequence[bytes], first: bytes) -> list[bytes] | None:
    """Return the contents of partials that begin alike; None if some do not.

    Args:
        partials: The partials.
        first: The content of the first one.
    """
    width = 1 if len(first) < len(_BIN8) else 2 if len(first) < _BIN32 else 4
    header = partials[0][: -len(first) - width - 1]
    at = len(header)
    short = header + b"\xc4"
    bodies: list[bytes] = []
    for partial in partials:
        if partial.startswith(short) and partial[at + 1] == len(partial) - at - 2:
            bodies.append(partial[at + 2 :])
            continue
        width = _WIDTHS.get(partial[at], 0) if partial.startswith(header) else 0
        begin = at + 1 + width
        if not width or int.from_bytes(partial[at + 1 : begin], "big") != len(partial) - begin:
            return None
        bodies.append(partial[begin:])
    return bodies


def _place(resource: str, where: str) -> str:
    return f"a partial of {shown(resource)} in {where}"


def _look_through(data: bytes) -> None:
    """Check, in memory of constant size, that data has just the elements that it announces.

    Raises:
        ValueError: The data ends too early, or goes on behind them.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        raise ValueError("it ends too early") from None
    if unpacker.tell() != len(data):
        raise ValueError("it goes on behind its end")


def _set_state(update: Any, state: dict[Any, Any], resource: str, where: str) -> None:
    """Set the attributes of a decoded update that its `state` names; refuse all others."""
    cls = type(update)
    names = tuple(state)
    known = _states.get(cls)
    if known is None:
        known = _states[cls] = set()
    if names not in known:
        wrong = [name for name in names if not _may_be_set(cls, name)]
        if wrong:
            raise _not_named(cls, wrong, resource, where)
    for name, value in state.items():
        setattr(update, name, value)
    if names not in known:
        named = state_of(update)
        wrong = [name for name in names if name not in named]
        if wrong:
            raise _not_named(cls, wrong, resource, where)
        if len(known) < MOST_STATES:
            known.add(names)


def _not_named(cls: type[Any], wrong: Iterable[Any], resource: str, where: str) -> UndecodableError:
    listed = ", ".join(map(repr, wrong))
    return UndecodableError(
        f"{_place(resource, where)} has attributes that {cls.__qualname__}.state() does not name: "
        f"{listed}"
    )


def _may_be_set(cls: type[Any], name: Any) -> bool:
    """Return whether an attribute may be data of the user's: no method, and nothing of Phonon's."""
    if type(name) is not str or name.startswith("__") or name in _OWN_NAMES:
        return False
    found = None
    for base in cls.__mro__:
        if name in base.__dict__:
            if base is object or base.__module__ in _OWN_MODULES:
                return False
            found = base.__dict__[name]
            break
    if found is None or hasattr(type(found), "__set__"):
        return True
    return not callable(found) and not isinstance(found, classmethod | staticmethod)


_OWN_MODULES = frozenset({"phonon._core.local", "phonon.update", "phonon.aio.update"})
_OWN_NAMES = frozenset({"_id", "database", "collection", "spec", "doc", "resource_id", "token"})

#: The fewest partials that are worth a look whether they are alike.
ALIKE = 4
#: The most resources and classes to remember: logging twice is better than growing without limit.
MOST_UNMERGED = 1000
#: The most lists of attributes to remember of a class: `state` may return another each time.
MOST_STATES = 100
