"""The makers of operations, and those of single changes, which the library always makes many of."""

from typing import Any

from phonon._protocol.operations import *  # noqa: F403 - all of them, for tests to import from here
from phonon._protocol.operations import Code, Operation


def append(partition: int, resource: bytes, partial: bytes) -> Operation:
    """Become a member and store a partial."""
    return Operation(partition, (int(Code.APPEND), resource, partial), len(partial) + 64)


def leave(partition: int, resource: bytes, partial: bytes = b"", flags: int = 0) -> Operation:
    """Store the last partial, if any, and end the membership."""
    return Operation(partition, (int(Code.LEAVE), resource, flags, partial), len(partial) + 64)


def complete(partition: int, resource: bytes, token: int) -> Operation:
    """Drop a batch that was executed."""
    return Operation(partition, (int(Code.COMPLETE), resource, token))


def resume(partition: int, resource: bytes, token: int) -> Operation:
    """Take a batch of one's own up again."""
    return Operation(partition, (int(Code.RESUME), resource, token))


def code_of(answer: Any) -> int:
    """Return the code of an answer."""
    return int(answer[0]) if isinstance(answer, list) else int(answer)
