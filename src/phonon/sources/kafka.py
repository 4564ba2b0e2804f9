"""Topics of Kafka, and of other brokers with its protocol, each message once.

Phonon stores the offsets up to which messages are stored, in the same atomic step as their data.
They are committed to the broker too, for its tools.

This module needs the extra ``phonon[kafka]``: confluent-kafka.
"""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phonon.errors import ConfigurationError, PhononError
from phonon.source import Source
from phonon.sources._loop import (
    Loop,
    MessageHandler,
    OnPoison,
    SupportsExpireAll,
    check_topics,
    is_transient,
)

try:
    from confluent_kafka import (
        OFFSET_INVALID,
        Consumer,
        KafkaError,
        KafkaException,
        Message,
        Producer,
        TopicPartition,
    )
except ImportError as error:
    raise ImportError(
        "phonon.sources.kafka needs confluent-kafka: pip install 'phonon[kafka]'"
    ) from error


log = logging.getLogger("phonon")

_Key = tuple[str, int]

#: Seconds that a dead letter may take to be delivered.
DELIVERY_TIMEOUT = 30.0


class BaseKafkaSource(Loop[Message]):
    """The base of `KafkaSource` and `AsyncKafkaSource`: the work of the loop's thread."""

    def __init__(
        self,
        process: Any,
        config: Mapping[str, Any],
        topics: str | Sequence[str],
        *,
        batch_size: int = 1000,
        poll_timeout: float = 0.5,
        sessions: SupportsExpireAll | None = None,
        on_poison: OnPoison[Message] | None = None,
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
        self._topics = check_topics("topics", topics)
        if not isinstance(config, Mapping) or not config.get("group.id"):
            raise ConfigurationError(
                "config has no 'group.id': name the consumer group, since positions are kept by it"
            )
        self._group = str(config["group.id"])
        self._config = {
            "auto.offset.reset": "earliest",
            **config,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
        }
        strategy = str(config.get("partition.assignment.strategy", ""))
        self._cooperative = "cooperative" in strategy or config.get("group.protocol") == "consumer"
        self._poll_timeout = poll_timeout
        self._producer: Any = None
        self._sources: dict[_Key, Source] = {}
        #: The offset up to which each partition is stored.
        self._done: dict[_Key, int] = {}
        self._consumer: Any = None

    def name_of(self, topic: str, partition: int) -> str:
        """Return the name of a partition's source; see `Process.source`."""
        return f"kafka/{self._group}/{topic}/{partition}"

    def _read(self, handler: MessageHandler[Message]) -> None:
        """Read and handle messages until the loop has to be left, and leave the group."""
        self._consumer = consumer = Consumer(self._config)
        try:
            consumer.subscribe(
                self._topics,
                on_assign=self._assigned,
                on_revoke=self._revoked,
                on_lost=self._lost,
            )
            while not self.stopping:
                messages = consumer.consume(self._batch_size, self._poll_timeout)
                self._store(handler, messages)
                if not messages:
                    self._settle(list(self._sources))
            self._settle(list(self._sources))
        finally:
            consumer.close()
            self._sources.clear()
            if self._producer is not None:
                self._producer.flush(DELIVERY_TIMEOUT)
            # In a forked child the client's garbage collection would wait for the parent's threads.
            self._consumer = self._producer = None

    # Implemented for threads and for tasks

    def _claimed(self, name: str) -> Any:
        """Claim a source."""
        return self._process.source(name)

    def _settled(self, source: Any) -> None:
        """Settle a source."""
        source.settle()

    def _store(self, handler: MessageHandler[Message], messages: Sequence[Message]) -> None:
        batches: dict[_Key, list[Message]] = {}
        for message in messages:
            error = message.error()
            if error is None:
                batches.setdefault(_key_of(message), []).append(message)
            elif error.fatal():
                raise KafkaException(error)
            elif error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - its public name
                log.warning("kafka: %s", error)
        for key, batch in batches.items():
            source = self._sources.get(key)
            if source is None:
                continue  # revoked: the member that has the partition reads them
            self.received += len(batch)
            try:
                handler.store(source.batch, batch)
            except PhononError as error:
                if not is_transient(error):
                    raise
                log.warning("%s", error)
                self._begin_again(key)
            else:
                self._done[key] = int(batch[-1].offset() or 0) + 1
                self._report_end(key, source)
                self._commit([key], wait=False)

    def _report_end(self, key: _Key, source: Any) -> None:
        """Report the end of the topic to operators, by the broker's last answer."""
        reach = self._consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
        if reach is not None and reach[1] >= 0:
            source.report_end(reach[1])

    def _commit(self, keys: Sequence[_Key], *, wait: bool) -> None:
        """Commit the offsets to the broker, only for its tools."""
        offsets = [TopicPartition(*key, self._done[key]) for key in keys if key in self._done]
        if not offsets:
            return
        try:
            self._consumer.commit(offsets=offsets, asynchronous=not wait)
        except KafkaException as error:
            log.debug("kafka: %s", error)

    def _settle(self, keys: Sequence[_Key]) -> None:
        """Store the positions of partitions that are silent, or that another member takes."""
        for key in keys:
            source = self._sources.get(key)
            if source is None or source.in_doubt:
                continue
            try:
                self._settled(source)
            except PhononError as error:
                log.info("%s", error)
                self._begin_again(key)

        # The partitions of this member

    def _claim(self, key: _Key) -> int | None:
        """Claim a partition, and retry until it succeeds. Return the offset to read on from."""
        while not self.stopping:
            try:
                source: Source = self._claimed(self.name_of(*key))
                self._sources[key] = source
                return source.position()
            except PhononError as error:
                if not is_transient(error):
                    raise
                log.warning("%s", error)
                self.pause()
        return None

    def _assigned(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            position = self._claim((partition.topic, partition.partition))
            if position is not None:
                partition.offset = position
        if self._cooperative:
            consumer.incremental_assign(partitions)
        else:
            consumer.assign(partitions)

    def _revoked(self, _consumer: Any, partitions: list[TopicPartition]) -> None:
        keys = [(partition.topic, partition.partition) for partition in partitions]
        self._commit([key for key in keys if key in self._sources], wait=True)
        for key in keys:
            source = self._sources.pop(key, None)
            if source is not None and not source.in_doubt:
                try:
                    self._settled(source)
                except PhononError as error:
                    log.info("%s", error)  # the next member only reads some messages again

    def _lost(self, _consumer: Any, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self._sources.pop((partition.topic, partition.partition), None)

    def _begin_again(self, key: _Key) -> None:
        """Claim a partition again after an error, if it is still assigned, and seek back."""
        self.pause()
        # The poll tells a member that it has lost the partition, so that it does not claim it from
        # the new member. The messages of this poll are read again.
        self._consumer.poll(0)
        if key not in self._sources or self.stopping:
            return
        position = self._claim(key)
        if position is None:
            position = OFFSET_INVALID
        partition = TopicPartition(*key, position)
        try:
            self._consumer.seek(partition)
        except KafkaException:
            # The partition is not read yet, or not any more.
            if self._cooperative:
                self._consumer.incremental_unassign([partition])
                self._consumer.incremental_assign([partition])
            else:
                others = [p for p in self._consumer.assignment() if (p.topic, p.partition) != key]
                for other in others:
                    position = self._sources[other.topic, other.partition].position()
                    other.offset = OFFSET_INVALID if position is None else position
                self._consumer.assign([*others, partition])

    # Dead letters

    def _send_dead_letter(self, message: Message, error: Exception) -> None:
        if self._producer is None:
            security = ("security.", "sasl.", "ssl.", "bootstrap.servers")
            config = {k: v for k, v in self._config.items() if k.startswith(security)}
            self._producer = Producer({**config, "enable.idempotence": True})
        failures: list[Any] = []
        headers = [
            *(message.headers() or ()),
            ("phonon-error", f"{type(error).__name__}: {error}".encode("utf-8", "replace")),
            ("phonon-topic", str(message.topic()).encode()),
            ("phonon-partition", str(message.partition()).encode()),
            ("phonon-offset", str(message.offset()).encode()),
        ]
        self._producer.produce(
            self._dead_letters,
            message.value(),
            message.key(),
            headers=headers,
            on_delivery=lambda failure, _: failures.append(failure),
        )
        self._producer.flush(DELIVERY_TIMEOUT)
        if failures != [None]:
            raise KafkaException(failures[0] if failures else "a dead letter was not delivered")


class KafkaSource(BaseKafkaSource):
    """Reads topics as a member of a consumer group, and hands each message to a function.

    It claims the assigned partitions, so that a former member that does not know of its loss yet
    cannot store any more, and reads on at their stored positions.

    Args:
        process: The process that stores the messages.
        config: The configuration of confluent-kafka's `Consumer`: ``bootstrap.servers``,
            ``group.id`` and others. Automatic commits are off, and ``auto.offset.reset`` is
            ``earliest`` by default.
        topics: The topic, or several.
        batch_size: The most messages that are stored together. A larger batch costs less a message.
        poll_timeout: Seconds to wait for messages.
        sessions: A cache or a collection, whose sessions are ended when the loop ends. (Sessions
            that are over earlier end by themselves.)
        on_poison: Called with a message that cannot be handled, and the error. When it has
            returned, the message is skipped.
        dead_letters: Instead of ``on_poison``: the topic to which such a message is sent, with its
            error in the headers.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> config = {"bootstrap.servers": "localhost:9092", "group.id": "views"}
        >>> source = KafkaSource(process, config, "clicks", sessions=cache)  # doctest: +SKIP
        >>> source.run(lambda message: cache.set(...))  # doctest: +SKIP
    """

    def run(
        self,
        handle: Callable[[Message], object],
        *,
        stop_on: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    ) -> None:
        """Read and handle messages until `stop` is called, or a signal comes.

        In the end it stores the present batch, leaves the group, and ends the sessions.

        Args:
            handle: Makes the updates of one message. It should do nothing else, because it is
                called again for a message that could not be stored.
            stop_on: Signals that end the loop, if it runs in the main thread.

        Raises:
            Exception: The error of ``handle``, if there is neither ``on_poison`` nor
                ``dead_letters``; or of ending the sessions.
        """
        with self.running(stop_on):
            self._read(MessageHandler(self._counted(handle), self._on_poison))
            self.finish()


def _key_of(message: Message) -> _Key:
    return str(message.topic()), int(message.partition() or 0)
