"""The library of server functions: its text, its name, and the names of its functions."""

import hashlib
import re
from functools import cache
from importlib import resources
from typing import NamedTuple

from phonon._protocol.answers import Reply
from phonon._protocol.operations import Code

#: Processes of the same protocol share keys. The number changes when the meaning of a key does.
PROTOCOL = 2

FILES = ("prelude", "members", "batches", "sources", "locks", "reap", "processes", "apply", "admin")
#: The file with the functions for operators.
OPERATORS = "admin"


#: A step's call of a command of the server, and perhaps a subcommand.
_COMMAND = re.compile(r"\bp?call\('([A-Z]+)'(?:, '([A-Z]+)')?")


class Request(NamedTuple):
    """A command for the server.

    Attributes:
        key: The key that routes it in a cluster: the prefix of a partition, or of the namespace.
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
        test_clock: The key of a string that holds the time of a clock for tests, microseconds. None
            for the server's own clock.

    Attributes:
        name: Its name.
        source: Its text, as the server gets it.
        commands: The commands that the steps of processes use, which the server's user has to be
            allowed to run.
    """

    __slots__ = ("_functions", "commands", "name", "source")

    def __init__(self, body: str, test_clock: str | None = None) -> None:
        clock = f"'{test_clock}'" if test_clock else "false"
        codes = "\n".join(f"local {code.name} = {code.value}" for code in (*Code, *Reply))
        self.commands = sorted(commands_of(body) - of_operators())
        commands = ", ".join(f"'{command}'" for command in self.commands)
        constants = f"local TEST_CLOCK = {clock}\nlocal COMMANDS = {{ {commands} }}\n{codes}"
        body = f"{constants}\n{body}"
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
            prefix: The prefix of the partition or namespace. It is declared as the call's key, and
                no such key exists: so a cluster that moves its slot redirects every call, and no
                call runs where only half of the keys are.
            arguments: As the function takes them.
        """
        return Request(prefix, (b"FCALL", self.function(name), b"1", prefix, *arguments))


def commands_of(text: str) -> set[str]:
    """Return the commands of the server that a text calls, as rights name them."""
    return {f"{name}|{sub}" if sub else name for name, sub in _COMMAND.findall(text)}


@cache
def of_operators() -> frozenset[str]:
    """Return the commands that only operators' functions use; a worker needs none of them."""
    others = [name for name in FILES if name != OPERATORS]
    return frozenset(commands_of(_read(OPERATORS)) - commands_of("\n".join(map(_read, others))))


def _read(name: str) -> str:
    return (resources.files("phonon") / "_lua" / f"{name}.lua").read_text(encoding="utf-8")


def text() -> str:
    """Return the Lua files, joined."""
    return "\n".join(map(_read, FILES))


@cache
def default() -> Library:
    """Return the library as it is shipped."""
    return Library(text())
