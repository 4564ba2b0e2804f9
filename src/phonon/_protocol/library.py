"""The library of server functions: its text, its name, and the names of its functions."""

import hashlib
from functools import cache
from importlib import resources
from typing import NamedTuple

from phonon._protocol.answers import Reply
from phonon._protocol.operations import Code

#: Processes of the same protocol share keys. It changes when the meaning of a key does.
PROTOCOL = 2

FILES = ("prelude", "members", "batches", "sources", "locks", "reap", "processes", "apply", "admin")


class Request(NamedTuple):
    """A command for the server.

    Attributes:
        key: What routes it in a cluster: the prefix of a partition, or of the namespace.
        words: The whole command.
    """

    key: bytes
    words: tuple[bytes, ...]


class Library:
    """The function library as the server gets it.

    Its name carries the protocol's version and a hash of the text, so workers of two releases each
    call the functions that they were written for, side by side on one server.

    Args:
        body: The library's Lua text.
        test_clock: The key of a string that holds what the clock says, microseconds. For tests
            only; without it the functions have no such thing.
    """

    __slots__ = ("_functions", "name", "source")

    def __init__(self, body: str, test_clock: str | None = None) -> None:
        clock = f"'{test_clock}'" if test_clock else "false"
        codes = "\n".join(f"local {code.name} = {code.value}" for code in (*Code, *Reply))
        body = f"local TEST_CLOCK = {clock}\n{codes}\n{body}"
        digest = hashlib.sha256(body.encode()).hexdigest()[:8]
        self.name = f"phonon{PROTOCOL}_{digest}"
        self.source = f"#!lua name={self.name}\nlocal NAME = '{self.name}'\n{body}"
        self._functions: dict[str, bytes] = {}

    def function(self, name: str) -> bytes:
        """Return the name under which the server knows a function."""
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = f"{self.name}_{name}".encode()
        return found

    def request(self, name: str, prefix: bytes, *arguments: bytes) -> Request:
        """Return the call of a function.

        Args:
            name: Its name, without the library's.
            prefix: What the call is about. The key that is declared never exists: a slot of a
                cluster that is being moved sends every call on, and none works on half of its keys.
            arguments: As the function takes them.
        """
        return Request(prefix, (b"FCALL", self.function(name), b"1", prefix, *arguments))


def text() -> str:
    """Return the Lua files, joined."""
    folder = resources.files("phonon") / "_lua"
    return "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in FILES)


@cache
def default() -> Library:
    """Return the library as it is shipped."""
    return Library(text())
