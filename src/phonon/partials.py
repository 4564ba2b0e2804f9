"""Partials: how an update's content travels, and how a batch of them is executed."""

from typing import TYPE_CHECKING, Any, cast

import msgpack

from phonon.errors import NotStorableError, UndecodableError, UnknownClassError
from phonon.protocol.messages import Batch
from phonon.serializers import ExactSerializer, Serializer

if TYPE_CHECKING:
    from phonon.engine import Engine
    from phonon.update import Update

#: The layout of a partial; it changes when partials of the old one can no longer be read.
FORMAT = 1
#: _id, database, collection, spec, doc, state
CONTENT_LENGTH = 6

#: For ever: a class that nobody refers to any more may still have data on the server.
_classes: "dict[str, type[Update]]" = {}


def register(cls: "type[Update]") -> None:
    """Make a class known by its qualified name, so that its batches can be executed here."""
    _classes[_name(cls)] = cls


def is_known(class_name: str) -> bool:
    """Whether a class of that qualified name is imported here."""
    return class_name in _classes


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
    update._restore(engine.process, content)  # noqa: SLF001 - this is half of its constructor
    return update


def run_batch(engine: "Engine", resource: str, batch: Batch, local: "Update | None") -> None:
    """Merge a batch's partials and execute the result, class by class.

    Args:
        engine: The process's.
        resource: Whose batch.
        batch: The partials, in the order in which they were stored.
        local: The update whose session ended here; it executes what is of its class.
    """
    where = engine.keys.base(resource).decode("utf-8", "replace") + ":batch"
    merged: dict[type[Update], Update] = {}
    for partial in batch.partials:
        update = rebuild(engine, resource, partial, where)
        first = merged.setdefault(type(update), update)
        if first is not update:
            first.merge(update)
    for i, (cls, update) in enumerate(merged.items()):
        # Each class has a token of its own, all below the next batch's.
        executor = local if local is not None and type(local) is cls else update
        executor._execute(update, batch.token + i)  # noqa: SLF001 - see there
