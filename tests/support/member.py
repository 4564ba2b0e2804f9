"""A process of its own that a test can kill, pause, and tell what to do.

`Member` is the test's side: it starts an interpreter that runs `main`, sends it the names of
`Actor` methods and gets their results. What is executed, wherever, is written to a `Journal`.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Self

from phonon import Process, RetryPolicy, Update
from phonon._core.settings import Durability
from phonon.aio import AsyncUpdate
from phonon.lock import Lock
from phonon.reference import Reference

#: The journal to which `Entry` writes its executions. Each test has a folder of its own.
FOLDER = "PHONON_TEST_JOURNAL"
TESTS = Path(__file__).parents[1]
PATIENCE = 30.0


class Line(NamedTuple):
    """One call of ``execute``."""

    record: str
    doc: dict[str, Any]
    token: int
    process: str
    pid: int


class Journal:
    """The sessions that all processes of a test have executed, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal"

    def lines(self, record: str | None = None) -> list[Line]:
        """Return the executed sessions; of one record, if it is named."""
        if not self.path.exists():
            return []
        whole = self.path.read_text().rpartition("\n")[0]  # a line may be under way
        lines = [Line(*json.loads(line)) for line in whole.splitlines()]
        return [line for line in lines if record in (None, line.record)]

    def applied(self) -> dict[str, dict[str, int]]:
        """Return the rows of a database that skips tokens which are not greater than the last."""
        last: dict[str, int] = {}
        sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for line in self.lines():
            if line.token > last.get(line.record, 0):
                last[line.record] = line.token
                sums[line.record].update(line.doc)
        return {record: dict(total) for record, total in sums.items()}

    def begun(self, record: str) -> bool:
        """Return whether a process has begun to execute a record that waits for `open`."""
        return (self.folder / f"begun-{record}").exists()

    def open(self, record: str) -> None:
        """Let those who execute a record go on."""
        (self.folder / f"open-{record}").touch()


class Entry(Update):
    """Adds up ``doc``. A record's name begins with what its ``execute`` does first.

    ``hang-…`` waits for `Journal.open`; ``die-…`` kills its process; ``fail-…`` raises until
    `Journal.open`; ``slow-…`` takes a while. The ``merge`` of ``halt-…`` waits for `Journal.open`.
    """

    def merge(self, other: Any) -> None:
        if str(self._id).startswith("halt-"):
            self._wait(Path(os.environ[FOLDER]), str(self._id))
        self.doc = dict(Counter(self.doc) + Counter(other.doc))

    @staticmethod
    def _wait(folder: Path, record: str) -> None:
        (folder / f"begun-{record}").touch()
        give_up = time.monotonic() + PATIENCE
        while not (folder / f"open-{record}").exists() and time.monotonic() < give_up:
            time.sleep(0.002)

    def execute(self) -> None:
        folder = Path(os.environ[FOLDER])
        record = str(self._id)
        opened = folder / f"open-{record}"
        if record.startswith("hang-"):
            self._wait(folder, record)
        elif record.startswith("die-"):
            with (folder / "deaths").open("a") as deaths:
                deaths.write(f"{record}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        elif record.startswith("fail-") and not opened.exists():
            raise OSError(f"no database for {record}")
        elif record.startswith("slow-"):
            time.sleep(0.05)
        note(self)


def note(update: Update | AsyncUpdate) -> None:
    """Write the executions to the journal."""
    record, doc, token = str(update._id), dict(update.doc), update.token or 0
    line = Line(record, doc, token, update.process().id, os.getpid())
    journal = Path(os.environ[FOLDER]) / "journal"
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())  # one write: it stays whole
    finally:
        os.close(descriptor)


def learn(name: str) -> type[Entry]:
    """Define a class that other processes do not know."""
    return type(name, (Entry,), {"__module__": Entry.__module__, "__qualname__": name})


class Actor:
    """The actions of a `Member`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.errors: list[list[Any]] = []
        if "retry" in options:
            options["retry"] = RetryPolicy(**options["retry"])
        if "durability" in options:
            options["durability"] = Durability(**options["durability"])
        self.process = Process(**options, on_error=self._note)
        self.kinds: dict[str, type[Entry]] = {"Entry": Entry}
        self.updates: dict[str, Update] = {}
        self.references: dict[str, Reference] = {}
        self.locks: dict[str, Lock] = {}

    def _note(self, error: Exception) -> None:
        about = [getattr(error, "resource", None), getattr(error, "token", None)]
        self.errors.append([type(error).__name__, str(error), *about])

    def learn(self, name: str) -> None:
        self.kinds[name] = learn(name)

    def id(self) -> str:
        return self.process.id

    def told(self) -> list[list[Any]]:
        """Return the errors that ``on_error`` got: type, text, resource and token."""
        return self.errors

    def put(self, record: str, n: int = 1, kind: str = "Entry") -> None:
        """Store a message about a record."""
        update = self.kinds[kind](self.process, record, doc={"n": n}, init_cache=False)
        self.updates.setdefault(record, update).refresh(update)
        self.updates[record].cache()

    def put_times(self, record: str, times: int) -> None:
        """Store so many messages about a record, one after the other."""
        for _ in range(times):
            self.put(record)

    def keep(self, record: str, n: int = 1) -> None:
        """Merge a message into the local data, and leave it there."""
        update = Entry(self.process, record, doc={"n": n}, init_cache=False)
        self.updates.setdefault(record, update).refresh(update)

    def put_many(self, prefix: str, count: int) -> None:
        with self.process.batch():
            for i in range(count):
                name = f"{prefix}{i}"
                self.updates[name] = Entry(self.process, name, doc={"n": 1})

    def end(self, record: str) -> None:
        self.updates.pop(record).end_session()

    def join(self, resource: str) -> None:
        self.references[resource] = self.process.create_reference(resource)

    def modify(self, resource: str) -> None:
        self.references[resource].increment_times_modified()

    def leave(self, resource: str) -> bool:
        return self.references.pop(resource).dereference()

    def count(self, resource: str) -> int:
        return self.references[resource].count()

    def acquire(self, resource: str) -> int | None:
        lock = self.locks[resource] = self.process.lock(resource)
        lock.acquire()
        return lock.token

    def owned(self, resource: str) -> bool:
        return self.locks[resource].owned()

    def release(self, resource: str) -> None:
        self.locks.pop(resource).release()

    def guard(self, resource: str, record: str) -> None:
        """Hold a lock in a ``with`` block while a record is executed."""
        with self.process.lock(resource):
            Entry(self.process, record, doc={"n": 1}, init_cache=False).execute()

    def replay(self, resource: str, token: int) -> None:
        self.process.replay(resource, token)

    def stop(self) -> None:
        self.process.stop()


class Refused(Exception):  # noqa: N818 - the other side's error is inside
    """An action of a member has raised."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Member:
    """A process that does what a test says."""

    #: The code that it runs.
    program = "from support import member; member.main()"

    def __init__(self, journal: Journal, options: dict[str, Any]) -> None:
        paths = [TESTS, TESTS.parent / "src"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            FOLDER: str(journal.folder),
        }
        self._replies: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._writing = threading.Lock()
        with (journal.folder / "errors").open("ab") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", self.program, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self.id = str(self.do("id"))

    def begin(self, action: str, *args: Any) -> "Future[Any]":
        """Tell it to do something, without waiting for the result."""
        number, reply = next(self._numbers), Future[Any]()
        self._replies[number] = reply
        assert self.popen.stdin is not None
        with self._writing:
            self.popen.stdin.write((json.dumps([number, action, args]) + "\n").encode())
            self.popen.stdin.flush()
        return reply

    def do(self, action: str, *args: Any) -> Any:
        """Tell it to do something.

        Raises:
            Refused: That has raised.
        """
        return self.begin(action, *args).result(PATIENCE)

    def told(self, kind: str) -> list[list[Any]]:
        """The reported errors of a kind."""
        return [error for error in self.do("told") if error[0] == kind]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def pause(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._reading.join(5)
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            number, result, error = json.loads(line)
            if error is None:
                self._replies[number].set_result(result)
            else:
                self._replies[number].set_exception(Refused(*error))


#: Seconds between the heartbeats of those that a `Crew` makes. They are dead after four of them.
BEAT = 0.25
#: Seconds within which survivors must have everything that a dead process held.
PROMISED = 6 * BEAT
#: Seconds that a machine with other things to do may add to that.
SLACK = 20.0


class Crew:
    """Processes of one test: members, that it can kill, and its own."""

    def __init__(self, url: str, namespace: str, folder: Path) -> None:
        self.journal = Journal(folder)
        self.defaults = {"url": url, "namespace": namespace, "heartbeat_interval": BEAT}
        self._members: list[Member] = []
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        os.environ[FOLDER] = str(self.journal.folder)
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.close()
        try:
            for process in self._processes:
                process.stop()
        finally:
            del os.environ[FOLDER]

    def member(self, **options: Any) -> Member:
        self._members.append(Member(self.journal, {**self.defaults, **options}))
        return self._members[-1]

    def process(self, **options: Any) -> Process:
        self._processes.append(Process(**{**self.defaults, **options}))
        return self._processes[-1]


def _requests() -> Iterator[tuple[int, str, list[Any]]]:
    for line in sys.stdin:
        number, action, args = json.loads(line)
        yield number, action, args


def main(make_actor: Callable[[dict[str, Any]], Any] = Actor) -> None:
    """Run in the interpreter that a `Member` starts."""
    actor = make_actor(json.loads(sys.argv[1]))
    writing = threading.Lock()

    def act(number: int, action: str, args: list[Any]) -> None:
        result, failure = None, None
        try:
            result = getattr(actor, action)(*args)
        except BaseException as error:  # noqa: BLE001 - it is the test's
            failure = [type(error).__name__, str(error)]
        with writing:
            sys.stdout.write(json.dumps([number, result, failure]) + "\n")
            sys.stdout.flush()

    for request in _requests():
        threading.Thread(target=act, args=request, daemon=True).start()
