"""Partials: how an update's content travels, and how a batch of them is executed."""

import logging
from typing import TYPE_CHECKING, Any, cast

import msgpack

from phonon.errors import NotStorableError, UndecodableError, UnknownClassError
from phonon.protocol.messages import Batch
from phonon.serializers import ExactSerializer, Serializer

if TYPE_CHECKING:
    from phonon.engine import Engine
    from phonon.update import Update

log = logging.getLogger("phonon")

#: The layout of a partial; it changes when partials of the old one can no longer be read.
FORMAT = 1
#: _id, database, collection, spec, doc, state
CONTENT_LENGTH = 6

#: For ever: a class that nobody refers to any more may still have data on the server.
_classes: "dict[str, type[Update]]" = {}

#: Of which resources and classes it was said that their partials are not merged before the end.
_unmerged: set[tuple[str, str]] = set()
#: It is forgotten when there are so many: that is better than to remember all.
MOST_UNMERGED = 1000


def register(cls: "type[Update]") -> None:
    """Make a class known by its qualified name, so that its batches can be executed here."""
    _classes[_name(cls)] = cls


def is_known(class_name: str) -> bool:
    """Whether a class of that qualified name is imported here."""
    return class_name in _classes


def can_execute(engine: "Engine", class_name: str) -> bool:
    """Whether that process can execute batches of a class."""
    cls = _classes.get(class_name)
    return cls is not None and (engine.runtime.is_async or not cls.is_async)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def pack(cls: type, serializer: Serializer, content: bytes) -> bytes:
    """A partial: an envelope that says what is inside."""
    return cast("bytes", msgpack.packb([FORMAT, _name(cls), serializer.name, content]))


def explain(serializer: Serializer, value: Any, where: str) -> None:
    """Raise the error that names where the value is, if it is this one that cannot be stored."""
    if isinstance(serializer, ExactSerializer):
        serializer.dumps(value, where)
        return
    try:
        serializer.dumps(value)
    except NotStorableError as error:
        raise NotStorableError(f"{where}: {error}") from error


def rebuild(engine: "Engine", resource: str, partial: bytes, where: str) -> "Update":
    """Make an update of what was stored, without calling its constructor.

    Raises:
        UndecodableError: The data cannot be read.
        UnknownClassError: Its class is not imported here.
    """
    place = f"a partial of {resource!r} in {where}"
    try:
        layout, name, serializer, body = msgpack.unpackb(partial)
    except Exception as error:
        raise UndecodableError(f"{place} is not one of Phonon's: {error}") from error
    if layout != FORMAT:
        raise UndecodableError(f"{place} has layout {layout!r}; this release reads {FORMAT}")
    if serializer != engine.serializer.name:
        raise UndecodableError(
            f"{place} was stored by serializer {serializer!r}, and this process has "
            f"{engine.serializer.name!r}: give all processes the same serializer="
        )
    cls = _classes.get(name)
    if cls is None:
        raise UnknownClassError(
            f"{place} belongs to {name}, which is not imported in this process: import it, so that "
            "its batches can be executed here",
            name,
        )
    try:
        content = engine.serializer.loads(body)
    except UndecodableError as error:
        raise UndecodableError(f"{place}: {error}") from error
    if (
        not isinstance(content, list)
        or len(content) != CONTENT_LENGTH
        or not isinstance(content[5], dict)
    ):
        raise UndecodableError(f"{place} does not hold an update's content")
    update = cls.__new__(cls)
    update._restore(engine.process.public, content)  # noqa: SLF001 - this is half of its constructor
    return update


def class_of(partial: bytes) -> "type[Update] | None":
    """Whose it is, as far as that can be told."""
    try:
        return _classes.get(msgpack.unpackb(partial)[1])
    except Exception:  # noqa: BLE001 - it is dealt with when it is executed
        return None


def merge_batch(engine: "Engine", resource: str, batch: Batch) -> "dict[type[Update], Update]":
    """Merge a batch's partials, class by class, in the order of the classes' first ones."""
    where = engine.keys.base(resource).decode("utf-8", "replace") + ":batch"
    merged: dict[type[Update], Update] = {}
    for partial in batch.partials:
        update = rebuild(engine, resource, partial, where)
        if not can_execute(engine, name := _name(type(update))):
            raise UnknownClassError(
                f"a batch of {resource!r} belongs to {name}, an AsyncUpdate, and this process has "
                "no event loop: run an AsyncProcess that imports it",
                name,
            )
        first = merged.setdefault(type(update), update)
        if first is not update:
            first.merge(update)
    return merged


def merge_stored(engine: "Engine", resource: str, stored: list[bytes]) -> list[bytes]:
    """Merge partials of a session that goes on, class by class.

    What is executed in the end is the same: each class has its partials in the order in which they
    were stored, and the classes come in the order of their first ones. What cannot be merged here
    stays as it is, and what cannot be read is not passed over.

    Returns:
        Partials that come to the same as these.
    """
    where = engine.keys.base(resource).decode("utf-8", "replace") + ":partials"
    merged: list[bytes | None] = list(stored)
    groups: dict[type[Update], list[tuple[int, Update]]] = {}
    for i, partial in enumerate(stored):
        try:
            update = rebuild(engine, resource, partial, where)
        except UnknownClassError as error:
            _not_merged(resource, error.class_name, error)
        except Exception as error:  # noqa: BLE001 - setting its attributes may run the user's code
            _not_merged(resource, "", error)
            _merge_groups(resource, groups, merged)
            groups.clear()
        else:
            groups.setdefault(type(update), []).append((i, update))
    _merge_groups(resource, groups, merged)
    return [partial for partial in merged if partial is not None]


def _merge_groups(
    resource: str,
    groups: "dict[type[Update], list[tuple[int, Update]]]",
    merged: list[bytes | None],
) -> None:
    """Put the merge of each group into the place of its first partial."""
    for cls, ((at, first), *others) in groups.items():
        if not others:
            continue
        try:
            for _, other in others:
                first.merge(other)
            partial = first._pack()  # noqa: SLF001 - the other half of rebuild
        except Exception as error:  # noqa: BLE001 - it will be raised when the batch is executed
            _not_merged(resource, _name(cls), error)
            continue
        merged[at] = partial
        for i, _ in others:
            merged[i] = None


def _not_merged(resource: str, class_name: str, error: Exception) -> None:
    """Say it once: the same partials are met again and again."""
    if (resource, class_name) in _unmerged:
        return
    if len(_unmerged) >= MOST_UNMERGED:
        _unmerged.clear()
    _unmerged.add((resource, class_name))
    log.debug("partials of %r are not merged before their session ends: %s", resource, error)
