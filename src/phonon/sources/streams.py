"""Streams of Redis and Valkey with consumer groups, each entry once.

The consumers of a group share the entries, and take over those of dead consumers, so entries come
in no particular order. Their ids are stored with their data, for a window of time
(`phonon.Process.batch` with ``dedupe``): an entry that is delivered again in it changes nothing.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import redis

from phonon._transport.failures import is_passing
from phonon.errors import ConfigurationError, PhononError
from phonon.settings import check_name, check_seconds
from phonon.source import WINDOW, Messages
from phonon.sources._loop import (
    Loop,
    MessageHandler,
    OnPoison,
    SupportsExpireAll,
    check_topics,
    is_transient,
)

if TYPE_CHECKING:
    from phonon.process import Process

log = logging.getLogger("phonon")

_PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
)


class StreamEntry(NamedTuple):
    """An entry of a stream.

    Attributes:
        id: The entry's id.
        fields: The entry's content.
        stream: The stream's key.
    """

    id: bytes
    fields: Mapping[bytes, bytes]
    stream: str


class StreamSource(Loop[StreamEntry]):
    """Reads streams as a consumer of a group, and hands each entry to a function.

    Args:
        process: The process that stores the entries. Its server has the streams, unless ``client``
            is given.
        streams: The stream's key, or several. In a cluster give one.
        group: The consumer group. If it does not exist, it is made and begins at the first entry.
        client: Another `redis.Redis` to read the streams from.
        batch_size: The most entries that are stored together.
        poll_timeout: Seconds to wait for entries.
        claim_idle: Seconds after which an entry that another consumer has not acknowledged is taken
            over.
        window: Seconds for which ids are remembered: much longer than ``claim_idle``, and than any
            outage after which entries must count once.
        sessions: A cache or a collection, whose sessions are ended when the loop ends. (Sessions
            that are over earlier end by themselves.)
        on_poison: Called with an entry that cannot be handled, and the error. When it has returned,
            the entry is skipped.
        dead_letters: Instead of ``on_poison``: the stream to which such an entry is added, with its
            error.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    _process: "Process"

    def __init__(
        self,
        process: "Process",
        streams: str | Sequence[str],
        group: str,
        *,
        client: "redis.Redis | None" = None,
        batch_size: int = 1000,
        poll_timeout: float = 0.5,
        claim_idle: float = 60.0,
        window: float = WINDOW,
        sessions: SupportsExpireAll | None = None,
        on_poison: OnPoison[StreamEntry] | None = None,
        dead_letters: str | None = None,
    ) -> None:
        super().__init__(
            process,
            batch_size=batch_size,
            poll_timeout=poll_timeout,
            sessions=sessions,
            on_poison=on_poison,
            dead_letters=dead_letters,
        )
        check_name("group", group)
        check_seconds("claim_idle", claim_idle)
        check_seconds("window", window)
        if window <= claim_idle:
            raise ConfigurationError(
                f"window must be longer than claim_idle, {claim_idle:g} s, not {window!r}: an "
                "entry that is taken over later than that would count twice"
            )
        self._streams = check_topics("streams", streams)
        self._group = group
        self._client: Any = client if client is not None else process.client
        self._block_ms = max(1, int(poll_timeout * 1000))
        self._idle_ms = int(claim_idle * 1000)
        self._window = window
        self._claim_at = 0.0
        self._again = False
        self._lacks_groups = False
        self._consumer = process.id

    def scope_of(self, stream: str) -> str:
        """Return the scope of a stream's ids; see `Process.batch`."""
        return f"stream/{self._group}/{stream}"

    def run(
        self,
        handle: Callable[[StreamEntry], object],
        *,
        stop_on: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    ) -> None:
        """Read and handle entries until `stop` is called, or a signal comes.

        In the end it stores the present batch, and ends the sessions.

        Args:
            handle: Makes the updates of one entry. It should do nothing else, because it is called
                again for an entry that could not be stored.
            stop_on: Signals that end the loop, if it runs in the main thread.

        Raises:
            Exception: The error of ``handle``, if there is neither ``on_poison`` nor
                ``dead_letters``; or of ending the sessions.
        """
        handler = MessageHandler(self._counted(handle), self._on_poison)
        with self.running(stop_on):
            while not self.stopping:
                try:
                    if self._lacks_groups:
                        self._make_groups()
                    self._read(handler)
                except redis.RedisError as error:
                    self._lacks_groups = str(error).startswith("NOGROUP")
                    if not self._lacks_groups:
                        if not _is_passing(error):
                            raise
                        log.warning("streams: %s", error)
                        self._again = True
                        self.pause()
                except PhononError as error:
                    if not is_transient(error):
                        raise
                    log.warning("%s", error)
                    self.pause()
            self._leave()
            self.finish()

    def _make_groups(self) -> None:
        for stream in self._streams:
            try:
                self._client.xgroup_create(stream, self._group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):  # it exists
                    raise
        self._lacks_groups = False

    def _leave(self) -> None:
        """Leave the group, unless others have to take over entries of this consumer."""
        with contextlib.suppress(redis.RedisError):
            for stream in self._streams:
                self._forget(stream, lambda consumer: consumer["name"] == self._consumer.encode())

    def _forget(self, stream: str, is_gone: Callable[[Any], bool]) -> None:
        for consumer in self._client.xinfo_consumers(stream, self._group):
            if not consumer["pending"] and is_gone(consumer):
                self._client.xgroup_delconsumer(stream, self._group, consumer["name"])

    def _read(self, handler: MessageHandler[StreamEntry]) -> None:
        now = time.monotonic()
        if now >= self._claim_at:
            self._claim_at = now + self._idle_ms / 2000
            self._take_over(handler)
        # Entries that could not be stored are still this consumer's, and come first.
        after, self._again = ("0" if self._again else ">"), False
        found = self._client.execute_command(
            "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", self._batch_size,
            "BLOCK", self._block_ms, "STREAMS", *self._streams, *[after] * len(self._streams),
        )  # fmt: skip
        for stream, entries in _items(found):
            self._store(handler, _text(stream), entries)

    def _take_over(self, handler: MessageHandler[StreamEntry]) -> None:
        """Take over entries that others have not acknowledged for a long time."""
        for stream in self._streams:
            start: Any = "0-0"
            while not self.stopping:
                start, entries, *_ = self._client.execute_command(
                    "XAUTOCLAIM", stream, self._group, self._consumer, self._idle_ms, start,
                    "COUNT", self._batch_size,
                )  # fmt: skip
                if entries:
                    self._store(handler, stream, entries)
                if start in (b"0-0", "0-0"):
                    break
            self._forget(stream, lambda consumer: consumer["idle"] > 10 * self._idle_ms)
            ids = self._process.engine.sources.ids(self.scope_of(stream), self._window)
            ids.lag = self._waiting(stream)

    def _waiting(self, stream: str) -> int | None:
        """Return how many entries were not delivered yet; None if the server cannot tell."""
        for group in self._client.xinfo_groups(stream):
            if _text(group["name"]) == self._group:
                lag: int | None = group.get("lag")
                return lag
        return None

    def _store(self, handler: MessageHandler[StreamEntry], stream: str, raw: Sequence[Any]) -> None:
        entries = [
            StreamEntry(id_, _fields(fields), stream) for id_, fields in raw if fields is not None
        ]
        self.received += len(entries)

        def open_batch(entries: Sequence[StreamEntry]) -> Messages[StreamEntry]:
            return self._process.batch(entries, dedupe=self.scope_of(stream), window=self._window)

        try:
            handler.store(open_batch, entries)
        except PhononError:
            self._again = True
            raise
        if raw:
            self._client.xack(stream, self._group, *[id_ for id_, _ in raw])

    def _send_dead_letter(self, entry: StreamEntry, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
        more = {b"phonon-error": text, b"phonon-id": entry.id, b"phonon-stream": entry.stream}
        self._client.xadd(self._dead_letters, {**entry.fields, **more})


def _is_passing(error: redis.RedisError) -> bool:
    """Return whether to ask again after an error: a server is away, is replaced, or is full."""
    # For some answers the client has a class, and leaves their code out of the text.
    return isinstance(error, _PASSING) or (
        isinstance(error, redis.ResponseError) and is_passing(error)
    )


def _items(found: Any) -> Sequence[tuple[Any, Any]]:
    """Return streams and their entries, from the answer of either version of the protocol."""
    if not found:
        return ()
    return list(found.items()) if isinstance(found, dict) else found


def _fields(raw: Any) -> Mapping[bytes, bytes]:
    if isinstance(raw, Mapping):
        return raw
    return dict(zip(raw[::2], raw[1::2], strict=True))


def _text(name: Any) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
