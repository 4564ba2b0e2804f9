"""Decodes partials without their class, so that no user code runs."""

from typing import Any

import msgpack

from phonon._admin.records import Partial
from phonon._core.codec import CONTENT_LENGTH, FORMAT
from phonon.serializers import ExactSerializer

_exact = ExactSerializer()
#: The layout, the class's name, the serializer's name, and the content.
_ENVELOPE = 4


def class_name_of(partial: bytes) -> str | None:
    """Return the name of a partial's class; None if it cannot be read."""
    envelope = _open(partial)
    return None if isinstance(envelope, str) else envelope[0]


def read_partial(partial: bytes) -> Partial:
    """Decode a partial as far as possible without its class, and without unpickling."""
    size = len(partial)
    envelope = _open(partial)
    if isinstance(envelope, str):
        return _unreadable("", "", size, envelope)
    name, serializer, body = envelope
    if serializer != _exact.name:
        why = f"its content was encoded by {serializer!r}, which only its processes can read"
        return _unreadable(name, serializer, size, why)
    try:
        content: Any = _exact.loads(body)
        if type(content) is not list or len(content) != CONTENT_LENGTH:
            return _unreadable(name, serializer, size, "it does not hold an update's content")
        _id, database, collection, spec, doc, state = content
    except Exception as error:  # noqa: BLE001 - an operator must be able to see any stored data
        return _unreadable(name, serializer, size, f"{type(error).__name__}: {error}")
    state = state if isinstance(state, dict) else {}
    return Partial(
        name, serializer, size, _id, str(database), str(collection), spec, doc, state, error=""
    )


def _unreadable(name: str, serializer: str, size: int, why: str) -> Partial:
    return Partial(name, serializer, size, None, "", "", None, None, {}, error=why)


def _open(partial: bytes) -> tuple[str, str, bytes] | str:
    """Return class, serializer and content; or the reason why the partial cannot be read."""
    try:
        opened = msgpack.unpackb(
            partial, unicode_errors="surrogatepass", max_array_len=_ENVELOPE, max_map_len=0
        )
    except Exception as error:  # noqa: BLE001 - msgpack raises many errors, which mean the same here
        return f"it is not one of Phonon's: {error}"
    if not isinstance(opened, list) or len(opened) != _ENVELOPE:
        return "it is not one of Phonon's"
    layout, name, serializer, body = opened
    if layout != FORMAT:
        return f"it has layout {layout!r}, and this release reads {FORMAT}"
    if not (isinstance(name, str) and isinstance(serializer, str) and isinstance(body, bytes)):
        return "it is not one of Phonon's"
    return name, serializer, body
