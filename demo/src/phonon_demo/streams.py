"""From a file's name, or standard input, to lines of text."""

import contextlib
import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from phonon_demo.errors import InputError

STDIN = "-"

_GZIP = b"\x1f\x8b"
# What people have instead of UTF-8 text, by its first bytes.
_FOREIGN = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a spreadsheet or a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
}
_LONGEST_MAGIC = max(map(len, _FOREIGN))


class _Measured(io.RawIOBase):
    """A stream whose first bytes had been read already, and that knows how far it is.

    A pipe cannot be rewound, so those bytes are put in front again.
    """

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]  # typeshed: Buffer
        data = self._head or self._rest.read1(len(buffer))  # type: ignore[attr-defined]  # buffered
        data, self._head = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class Text:
    """The lines of an input. What is no UTF-8 comes as lone surrogates.

    Attributes:
        name: What messages call it.
        size: Bytes; None if it has no end that is known.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        head = stream.read(_LONGEST_MAGIC)
        for magic, what in _FOREIGN.items():
            if head.startswith(magic):
                raise InputError(f"{name} is {what}: make it UTF-8 text, plain or gzip")
        status = os.fstat(stream.fileno())
        self.name = name
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        self._measured = _Measured(head, stream)
        plain = io.BufferedReader(self._measured)
        raw = gzip.GzipFile(fileobj=plain) if head.startswith(_GZIP) else plain
        # The csv module wants line ends as they are. "-sig" takes a byte order mark away.
        self._lines = io.TextIOWrapper(
            raw, encoding="utf-8-sig", errors="surrogateescape", newline=""
        )

    @property
    def position(self) -> int:
        """How many bytes of the input have been read."""
        return self._measured.position

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._lines
        except (EOFError, OSError, zlib.error) as error:  # gzip reports damage in three ways
            raise InputError(
                f"{self.name} cannot be read to its end: {error}; get the file once more"
            ) from error


@contextlib.contextmanager
def open_text(path: str) -> Iterator[Text]:
    """Open a file, gzip or not.

    Args:
        path: Its name; ``-`` for standard input.

    Raises:
        InputError: It cannot be opened, or is no text.
    """
    name = "standard input" if path == STDIN else repr(path)
    with contextlib.ExitStack() as stack:
        try:
            if path != STDIN:
                stream: BinaryIO = stack.enter_context(Path(path).open("rb"))
            elif sys.stdin is not None:
                stream = sys.stdin.buffer  # not ours to close
            else:
                raise InputError("standard input is closed: give --input the name of a file")
            text = Text(stream, name)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"{name} cannot be read: {reason}; --input takes the name of a file, or - for "
                "standard input"
            ) from error
        yield text
