"""The library of server functions: its text, its name, and how a step is called."""

import hashlib
from functools import cache
from importlib import resources

#: Processes of the same protocol share keys. It changes when the keys' content does.
PROTOCOL = 1

FILES = ("prelude", "references", "updates", "locks", "recovery", "processes")


class Library:
    """The function library as the server gets it.

    Its name carries the protocol's version and a hash of the text, so workers of two releases
    each call the functions they were written for, side by side on one server.

    Args:
        body: The library's Lua text.
        test_clock: The key of a string that holds milliseconds to add to the server's clock.
            For tests only; without it the functions have no such thing.
    """

    __slots__ = ("name", "source")

    def __init__(self, body: str, test_clock: str | None = None) -> None:
        clock = f"'{test_clock}'" if test_clock else "false"
        body = f"local TEST_CLOCK = {clock}\n{body}"
        digest = hashlib.sha256(body.encode()).hexdigest()[:8]
        self.name = f"phonon{PROTOCOL}_{digest}"
        self.source = f"#!lua name={self.name}\nlocal NAME = '{self.name}'\n{body}"

    def function(self, step: str) -> bytes:
        """The name under which the server knows a step."""
        return f"{self.name}_{step}".encode()


def text() -> str:
    """The Lua files, joined."""
    folder = resources.files("phonon") / "lua"
    return "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in FILES)


@cache
def default() -> Library:
    """The library as it is shipped."""
    return Library(text())
