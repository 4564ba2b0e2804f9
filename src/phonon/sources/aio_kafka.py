"""Kafka topics for tasks, each message once; see `phonon.sources.kafka`.

The client waits in a separate thread. The event loop handles and stores messages.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from confluent_kafka import Message

from phonon.sources._loop import MessageHandler, OnPoison, index_of
from phonon.sources.kafka import BaseKafkaSource

if TYPE_CHECKING:
    from phonon.aio.process import AsyncProcess

__all__ = ["AsyncKafkaSource"]

T = TypeVar("T")


class SupportsAsyncExpireAll(Protocol):
    """The interface of an object that holds sessions, such as a `phonon.aio.AsyncCollection`."""

    async def expire_all(self) -> None:
        """End all sessions."""


class _AsyncMessageHandler(MessageHandler[Message]):
    """Handles batches of messages on an event loop; its caller is another thread.

    Args:
        handle: The user's function.
        on_poison: Called with each message that cannot be handled, and the error.
        wait: Runs a coroutine on the event loop, and waits for it.
    """

    def __init__(
        self,
        handle: Callable[[Message], object],
        on_poison: OnPoison[Message] | None,
        wait: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        super().__init__(handle, on_poison)
        self._wait = wait

    def run_through(
        self,
        batch: Any,
        handle: Callable[[Message], object],
        messages: Sequence[Message],
        at: list[int],
    ) -> None:
        """Hand each message of a batch to a function, and store its updates."""
        self._wait(_run_through(batch, handle, messages, at))


async def _run_through(
    batch: Any, handle: Callable[[Message], object], messages: Sequence[Message], at: list[int]
) -> None:
    async with batch:
        async for message in batch:
            try:
                await _finished(handle(message))
            except Exception:
                at[:] = [index_of(messages, message)]
                raise


async def _finished(result: object) -> None:
    if isawaitable(result):
        await result


class AsyncKafkaSource(BaseKafkaSource):
    """Reads topics as a member of a consumer group; see `phonon.sources.kafka.KafkaSource`.

    Args:
        process: An `AsyncProcess`.
        config: The configuration of confluent-kafka's `Consumer`.
        topics: The topic, or several.
        batch_size: Messages that are stored together at the most.
        poll_timeout: Seconds to wait for messages.
        sessions: A collection or a cache, whose sessions are ended when the loop ends.
        on_poison: Called with a message that cannot be handled and the error; it may be a coroutine
            function.
        dead_letters: Instead of ``on_poison``: the topic to which such a message is sent.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> config = {"bootstrap.servers": "localhost:9092", "group.id": "views"}
        >>> async def handle(message):
        ...     await views.add(message.key().decode(), views=1)
        >>> source = AsyncKafkaSource(process, config, "clicks", sessions=views)  # doctest: +SKIP
        >>> await source.run(handle)  # doctest: +SKIP
    """

    _is_async = True

    def __init__(
        self,
        process: "AsyncProcess",
        config: Mapping[str, Any],
        topics: str | Sequence[str],
        *,
        batch_size: int = 1000,
        poll_timeout: float = 0.5,
        sessions: SupportsAsyncExpireAll | None = None,
        on_poison: OnPoison[Message] | None = None,
        dead_letters: str | None = None,
    ) -> None:
        super().__init__(
            process,
            config,
            topics,
            batch_size=batch_size,
            poll_timeout=poll_timeout,
            on_poison=on_poison,
            dead_letters=dead_letters,
        )
        self._to_end = sessions
        self._loop: asyncio.AbstractEventLoop | None = None
        if on_poison is not None:
            self._on_poison = lambda message, error: self._wait(
                _finished(on_poison(message, error))
            )

    async def run(
        self,
        handle: Callable[[Message], Awaitable[object] | object],
        *,
        stop_on: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    ) -> None:
        """Read and handle messages until `stop`, a signal, or the cancellation of the task.

        In the end it stores the present batch, leaves the group, and ends the sessions.

        Args:
            handle: Makes the updates of one message; a coroutine function, or a plain one. It may
                be called again for a message that could not be stored.
            stop_on: Signals that end the loop, if it runs in the main thread.

        Raises:
            Exception: The error of ``handle``, if there is neither ``on_poison`` nor
                ``dead_letters``; or of ending the sessions.
        """
        self._loop = asyncio.get_running_loop()
        handler = _AsyncMessageHandler(self._counted(handle), self._on_poison, self._wait)
        with self.running(stop_on):
            reading = asyncio.ensure_future(asyncio.to_thread(self._read, handler))
            try:
                await asyncio.shield(reading)
            except asyncio.CancelledError:
                self.stop()
                await reading
                raise
            finally:
                # Even after a cancellation: stored data has to be executed by some process.
                if self._to_end is not None and reading.done() and not reading.exception():
                    await self._to_end.expire_all()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the event loop; the caller is the loop's thread."""
        assert self._loop is not None  # noqa: S101 - for the type checker
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _claimed(self, name: str) -> Any:
        return self._wait(self._process.source(name))

    def _settled(self, source: Any) -> None:
        self._wait(source.settle())
