"""A worker's notes, which outlive it."""

import json
import logging
import os
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

from phonon._core.takeover import TAKEN_OVER
from phonon.errors import DeclaredDeadError


class Journal(logging.Handler):
    """The notes of one worker, in a file of its own; also a handler of Phonon's log.

    Args:
        folder: The folder of the run.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(logging.WARNING)
        path = Path(folder) / f"{os.getpid()}-{uuid.uuid4().hex}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, name: str, value: Any = 1) -> None:
        """Note something. One write, so that a kill leaves a whole line or none."""
        os.write(self._file, json.dumps([name, value]).encode() + b"\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Note a takeover."""
        if record.msg == TAKEN_OVER and isinstance(record.args, tuple):
            _, sessions, _, batches = record.args
            self.note("sessions", sessions)
            self.note("batches", batches)

    def trouble(self, error: Exception) -> None:
        """Note a background error that is a rebirth."""
        if isinstance(error, DeclaredDeadError):
            self.note("reborn")


def is_at_work(folder: str, pid: int) -> bool:
    """Return whether a worker has begun."""
    return any(Path(folder).glob(f"{pid}-*"))


def read(folder: str) -> dict[str, list[Any]]:
    """Return what all workers have noted, by name."""
    found: dict[str, list[Any]] = defaultdict(list)
    for file in Path(folder).iterdir():
        for line in file.read_text().splitlines():
            name, value = json.loads(line)
            found[name].append(value)
    return found
