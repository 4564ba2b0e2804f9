"""`assert_exact`: tests the user's ``merge`` and ``execute`` under all kinds of crashes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeVar

from phonon import LruCache, Process, Update
from phonon.errors import ConfigurationError
from phonon.settings import check_count, check_iterable
from phonon.testing.faults import kill, lose_answers, pause
from phonon.testing.lab import Lab, Server

M = TypeVar("M")

#: Seconds, longer than detecting a death and retrying a failed batch.
_LONG = 120.0


class _Trial:
    """One run of all messages through a few processes, one of which goes through a crash.

    Args:
        lab: The lab of the processes.
        update: Makes the update of a message.
        messages: The messages.
        processes: The number of processes.
    """

    def __init__(
        self,
        lab: Lab,
        update: Callable[[Process, M], Update],
        messages: Sequence[M],
        processes: int,
    ) -> None:
        self.lab = lab
        self.processes: list[Process] = [lab.process() for _ in range(processes)]
        self.victim = self.processes[0]
        self.caches: list[LruCache[Update]] = [LruCache() for _ in self.processes]
        self.errors: list[BaseException] = []
        self.cls: type[Update] = Update
        self._update = update
        self._messages = messages

    def store(self) -> None:
        """Deal out the messages, and store them."""
        for i, (process, cache) in enumerate(zip(self.processes, self.caches, strict=True)):
            with process.batch():
                for message in self._messages[i :: len(self.processes)]:
                    update = self._update(process, message)
                    self.cls = type(update)
                    cache.set(update.resource_id, update)

    def end(self) -> None:
        """End all sessions, the victim's last, so that it executes. Then let a long time pass."""
        for process, cache in reversed(list(zip(self.processes, self.caches, strict=True))):
            if process.engine.stopped:
                continue
            try:
                cache.expire_all()
            except* Exception as errors:  # noqa: BLE001 - retried; reported if the table is wrong
                self.errors.extend(errors.exceptions)
        self.lab.clock.advance(_LONG)
        with self.lab.process() as last:  # executes batches that have no process
            self.lab.clock.advance(_LONG)
            self.errors += [RuntimeError(parked.error) for parked in last.parked()]

    @contextlib.contextmanager
    def around_execute(
        self, before: Callable[[], object] | None = None, after: Callable[[], object] | None = None
    ) -> Iterator[None]:
        """Call a function once when the victim executes."""
        cls = self.cls
        name = "execute_many" if cls.executes_many() else "execute"
        own = vars(cls).get(name)
        original: Any = getattr(cls, name)
        function = getattr(original, "__func__", original)
        struck: list[bool] = []

        @wraps(function)
        def execute(first: Any, *rest: Any) -> Any:
            of = rest[0][0] if rest else first
            strikes = of.process() is self.victim and not struck
            if strikes:
                struck.append(True)
                if before is not None:
                    before()
            result = function(first, *rest)
            if strikes and after is not None:
                after()
            return result

        setattr(cls, name, classmethod(execute) if name == "execute_many" else execute)
        try:
            yield
        finally:
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)


def _nothing(trial: _Trial) -> None:
    trial.store()
    trial.end()


def _dies_with_open_sessions(trial: _Trial) -> None:
    trial.store()
    kill(trial.victim)
    trial.end()


def _dies_before_execute(trial: _Trial) -> None:
    def die() -> None:
        kill(trial.victim)
        raise _DiedError

    trial.store()
    with trial.around_execute(before=die):
        trial.end()


def _dies_after_execute(trial: _Trial) -> None:
    trial.store()
    with trial.around_execute(after=lambda: kill(trial.victim)):
        trial.end()


def _fails_once(trial: _Trial) -> None:
    def fail() -> None:
        raise RuntimeError("phonon.testing: execute fails once")

    trial.store()
    with trial.around_execute(before=fail):
        trial.end()


def _loses_answers(trial: _Trial) -> None:
    with contextlib.ExitStack() as stack:
        for process in trial.processes:
            stack.enter_context(lose_answers(process, 2))
        trial.store()
        for process in trial.processes:
            stack.enter_context(lose_answers(process, 2))
        trial.end()


def _is_paused_with_open_sessions(trial: _Trial) -> None:
    trial.store()
    with pause(trial.victim):
        trial.lab.clock.advance(_LONG)
    trial.end()


def _is_paused_before_execute(trial: _Trial) -> None:
    def wait() -> None:
        with pause(trial.victim):
            trial.lab.clock.advance(_LONG)  # the others execute the batch meanwhile

    trial.store()
    with trial.around_execute(before=wait):
        trial.end()


class _DiedError(Exception):
    """Raised to end the thread of a process that has died."""


#: The crashes of one of the processes, by description.
_FAULTS: dict[str, Callable[[_Trial], None]] = {
    "nothing happens": _nothing,
    "answers are lost": _loses_answers,
    "execute fails once": _fails_once,
    "a process dies with open sessions": _dies_with_open_sessions,
    "a process dies just before execute": _dies_before_execute,
    "a process dies after execute, before it can say so": _dies_after_execute,
    "a process is paused with open sessions, and goes on after others took over": (
        _is_paused_with_open_sessions
    ),
    "a process is paused before execute, and goes on after others executed": (
        _is_paused_before_execute
    ),
}


def assert_exact(
    update: Callable[[Process, M], Update],
    messages: Sequence[M],
    *,
    read: Callable[[], Any],
    expected: Any,
    clear: Callable[[], object] = lambda: None,
    processes: int = 3,
    server: Server | None = None,
) -> None:
    """Assert that your ``merge`` and ``execute`` produce the right table after each kind of crash.

    For each kind of crash it calls ``clear``, deals out all messages to a few processes, and ends
    all their sessions. The crashes are: a process dies with open sessions, just before and just
    after it executed, or is paused until others have taken over; ``execute`` fails once; answers
    are lost. The clock is advanced, so the test does not wait.

    Args:
        update: Makes the update of one message.
        messages: The messages.
        read: Returns the content of your database.
        expected: The content that it should have in the end.
        clear: Empties your database.
        processes: The number of processes.
        server: Their server; None: a new one.

    Raises:
        AssertionError: The table is not as expected; the message names the crash.

    Example:
        >>> table = {}
        >>> class Visits(phonon.ConflictFreeUpdate):
        ...     def execute(self):
        ...         n, token = table.get(self._id, (0, 0))
        ...         if self.token > token:
        ...             table[self._id] = n + self.doc["n"], self.token
        >>> assert_exact(
        ...     lambda process, user: Visits(process, user, doc={"n": 1}),
        ...     ["ada", "bob", "ada"],
        ...     read=lambda: {user: n for user, (n, _) in table.items()},
        ...     expected={"ada": 2, "bob": 1},
        ...     clear=table.clear,
        ... )
    """
    for argument, value in (("update", update), ("read", read), ("clear", clear)):
        if not callable(value):
            raise ConfigurationError(f"{argument} is a function, not {value!r}: give one")
    check_iterable("messages", messages)
    messages = list(messages)
    check_count("processes", processes)
    with contextlib.ExitStack() as stack:
        where = server or stack.enter_context(Server())
        for name, run in _FAULTS.items():
            clear()
            with Lab(where) as lab:
                trial = _Trial(lab, update, messages, processes)
                run(trial)
                found = read()
                left = lab.keys()
            if found != expected or left:
                raise AssertionError(_explain(name, found, expected, left, trial.errors))


def _explain(
    name: str, found: Any, expected: Any, left: set[str], errors: Sequence[BaseException]
) -> str:
    lines = [f"where {name}:", f"the table is {found!r}", f"and should be {expected!r}"]
    if left:
        lines.append(f"and this is not executed: {sorted(left)}")
    lines += [f"execute or the server said: {error!r}" for error in errors[:5]]
    if name.startswith("a process") and found != expected and not left:
        lines.append(
            "a batch whose process dies runs again, under the same self.token: does execute store "
            "the token beside the row, in the same transaction, and skip one that is not greater?"
        )
    return "\n".join(lines)
