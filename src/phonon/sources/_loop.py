"""The loop that all sources share: batches, poison messages, signals, ends of sessions."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from phonon.errors import (
    AlreadyStoredError,
    BacklogFullError,
    ConfigurationError,
    InvalidMessageError,
    NotStorableError,
    PhononError,
    ServerFullError,
    SourceLostError,
)
from phonon.settings import check_callable, check_count, check_name, check_owner, check_seconds
from phonon.source import Messages

log = logging.getLogger("phonon")

M = TypeVar("M")

#: Called with a message that cannot be handled, and the error.
OnPoison = Callable[[M, Exception], object]
#: The most times that the same messages are handled if other consumers store them too.
ATTEMPTS = 10
#: Seconds to wait before a server or a broker that did not answer is asked again.
PAUSE = 0.5


class SupportsExpireAll(Protocol):
    """The interface of an object that holds sessions, such as a `phonon.LruCache`."""

    def expire_all(self) -> None:
        """End all sessions."""


class MessageHandler(Generic[M]):
    """Handles batches of messages, and puts poison ones aside.

    Args:
        handle: The user's function, which makes the updates of one message.
        on_poison: Called with each message that cannot be handled, and the error. When it has
            returned, the message is skipped.
    """

    def __init__(self, handle: Callable[[M], object], on_poison: OnPoison[M] | None) -> None:
        self.handle = handle
        self._on_poison = on_poison

    def store(
        self, open_batch: Callable[[Sequence[M]], Messages[M]], messages: Sequence[M]
    ) -> None:
        """Handle messages, and store their data.

        If a message cannot be handled, the others are handled again without it.

        Args:
            open_batch: Returns the batch for some messages.
            messages: The messages.

        Raises:
            PhononError: The messages could not be stored, and no message is the cause.
            Exception: A message is poison, and there is no ``on_poison``.
        """
        waiting = [messages]
        while waiting:
            part = waiting.pop()
            at: list[int] = []
            try:
                self._try(open_batch, part, at)
            except Exception as error:
                if not is_about_message(error):
                    raise
                # If a handler raised, its message is known. If storing raised, find the message.
                if len(part) == 1:
                    self._put_aside(open_batch, part, error)
                elif at:
                    waiting += [part[at[0] + 1 :], part[at[0] : at[0] + 1], part[: at[0]]]
                else:
                    half = len(part) // 2
                    waiting += [part[half:], part[:half]]
                waiting = [each for each in waiting if each]

    def _try(
        self,
        open_batch: Callable[[Sequence[M]], Messages[M]],
        messages: Sequence[M],
        at: list[int],
    ) -> None:
        for attempt in range(ATTEMPTS):
            batch = open_batch(messages)
            try:
                self.run_through(batch, self.handle, messages, at)
            except Exception as raised:
                error = weightiest(raised)
                if isinstance(error, AlreadyStoredError) and attempt < ATTEMPTS - 1:
                    continue  # now the stored ones are known here, and will be skipped
                if not batch.is_stored or isinstance(error, PhononError):
                    if error is raised:
                        raise
                    raise error from None
                # A database may be away. No message is the cause, and none is lost.
                log.warning("ending sessions failed, and is tried again: %s", error)
                return
            else:
                return

    def _put_aside(
        self,
        open_batch: Callable[[Sequence[M]], Messages[M]],
        messages: Sequence[M],
        error: Exception,
    ) -> None:
        if self._on_poison is None:
            error.add_note(
                "phonon: the message cannot be handled, and holds up the source: give it an "
                "on_poison, or a place for dead letters"
            )
            raise error
        self._on_poison(messages[0], error)
        self.run_through(open_batch(messages), pass_over, messages, [])

    def run_through(
        self, batch: Any, handle: Callable[[M], object], messages: Sequence[M], at: list[int]
    ) -> None:
        """Hand each message of a batch to a function, and store its updates.

        Args:
            batch: The batch.
            handle: The function.
            messages: The messages of the batch.
            at: Gets the index of the message for which the function has raised.
        """
        with batch:
            for message in batch:
                try:
                    handle(message)
                except Exception:
                    at[:] = [index_of(messages, message)]
                    raise


def pass_over(message: object) -> None:
    """Make no update for a message, so that only its receipt is stored."""


def index_of(messages: Sequence[Any], message: Any) -> int:
    """Return the index of a message, which may be equal to others."""
    for index, each in enumerate(messages):
        if each is message:
            return index
    raise AssertionError(message)


class Loop(Generic[M]):
    """A loop that a signal or another thread can stop.

    Args:
        process: The process that stores the messages.
        batch_size: The most messages that are stored together.
        poll_timeout: Seconds to wait for messages.
        sessions: The sessions to end after the loop.
        on_poison: Called with a message that cannot be handled, and the error.
        dead_letters: The place to which such a message is sent instead.

    Attributes:
        handled: The number of handled messages, repeated ones included.
        received: The number of received messages, repeated ones included.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    #: Whether ``on_poison`` may be a coroutine function.
    _is_async = False

    def __init__(
        self,
        process: Any,
        *,
        batch_size: int,
        poll_timeout: float,
        sessions: SupportsExpireAll | None,
        on_poison: OnPoison[M] | None,
        dead_letters: str | None,
    ) -> None:
        check_owner(process)
        check_count("batch_size", batch_size)
        check_seconds("poll_timeout", poll_timeout)
        if sessions is not None and not hasattr(sessions, "expire_all"):
            raise ConfigurationError(
                f"sessions has the method expire_all, as an LruCache has, not {sessions!r}: give "
                "the cache or the collection that the messages go to"
            )
        check_callable("on_poison", on_poison, is_async=self._is_async)
        if dead_letters is not None:
            check_name("dead_letters", dead_letters)
        if on_poison is not None and dead_letters is not None:
            raise ConfigurationError("give on_poison or dead_letters, not both")
        self._process = process
        self._batch_size = batch_size
        self._sessions = sessions
        self._on_poison = on_poison if dead_letters is None else self._send_dead_letter
        self._dead_letters = dead_letters
        self._stopping = threading.Event()
        self.handled = 0
        self.received = 0

    def _send_dead_letter(self, message: M, error: Exception) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Leave the loop when the batch in hand is stored. Any thread may call this."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Return whether the loop has to be left."""
        return self._stopping.is_set()

    def pause(self) -> None:
        """Wait a little, unless the loop has to be left."""
        self._stopping.wait(PAUSE)

    @contextlib.contextmanager
    def running(self, signals: Sequence[signal.Signals]) -> Iterator[None]:
        """Stop on signals, if this is the main thread."""
        self._stopping.clear()
        previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                previous[number] = signal.signal(number, lambda *_: self.stop())
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _counted(self, handle: Callable[[Any], object]) -> Callable[[Any], object]:
        """Return a function that counts the messages that it hands to another one."""

        def counted(message: Any) -> object:
            self.handled += 1
            return handle(message)

        return counted

    def finish(self) -> None:
        """End all sessions."""
        if self._sessions is not None:
            self._sessions.expire_all()


def check_topics(argument: str, value: Any) -> list[str]:
    """Return the names of one or several topics.

    Raises:
        ConfigurationError: There is no name, or a value of another type.
    """
    names = [value] if isinstance(value, str) else value
    if (
        not isinstance(names, Sequence)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise ConfigurationError(f"{argument} is a name, or a list of names, not {value!r}")
    return list(names)


def is_transient(error: Exception) -> bool:
    """Return whether to go on after an error, by claiming or asking the source again."""
    return isinstance(
        error,
        SourceLostError | AlreadyStoredError | BacklogFullError | ServerFullError | ConnectionError,
    )


def is_about_message(error: Exception) -> bool:
    """Return whether a message is the cause of an error, and not the server or the process."""
    return isinstance(error, InvalidMessageError | NotStorableError) or not isinstance(
        error, PhononError
    )


def weightiest(error: Exception) -> Exception:
    """Return the error of a group that decides how to go on; any other error is returned as it is.

    A batch raises a group if several partitions refuse it. Of such a group an error that ends the
    loop comes first, then one to go on after; only if there is neither, a message is the cause.
    """
    if not isinstance(error, ExceptionGroup):
        return error
    leaves = [weightiest(each) for each in error.exceptions]
    others = [each for each in leaves if not is_about_message(each)]
    return min(others, key=is_transient, default=error)
