"""Topics of Kafka, and of other brokers with its protocol, each message once.

Phonon stores the offsets up to which messages are stored, in the same atomic step as their data.
They are committed to the broker too, for its tools.

This module needs the extra ``phonon[kafka]``: confluent-kafka.
"""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phonon.errors import ConfigurationError, PhononError, SourceRewoundError
from phonon.source import Source
from phonon.sources._loop import (
    Loop,
    MessageHandler,
    OnPoison,
    SupportsExpireAll,
    check_topics,
    is_transient,
    weightiest,
)

try:
    from confluent_kafka import (
        OFFSET_BEGINNING,
        OFFSET_END,
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
#: The beginning in a partition that was never read, by the client's names for it.
_STARTS = dict.fromkeys(("smallest", "earliest", "beginning"), OFFSET_BEGINNING) | dict.fromkeys(
    ("largest", "latest", "end"), OFFSET_END
)

#: Seconds that a dead letter may take to be delivered.
DELIVERY_TIMEOUT = 30.0
#: Seconds that the broker may take to tell an offset.
ANSWER_TIMEOUT = 10.0
#: Marks the offsets that are committed here, so that they are not taken for those of a consumer
#: without Phonon.
COMMITTED = "phonon"


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
        reset = config.get("auto.offset.reset", "earliest")
        if reset not in _STARTS:
            raise ConfigurationError(
                f"auto.offset.reset is 'earliest' or 'latest', not {reset!r}: it says where to "
                "begin with a partition that was never read, and nothing else"
            )
        self._start = _STARTS[reset]
        self._config = {
            **config,
            # The client would go silently to the beginning or the end.
            "auto.offset.reset": "error",
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
        #: Partitions to claim again after an error.
        self._failed: set[_Key] = set()
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
                # Only now: a member has been told which partitions it has lost, and does not claim
                # them from the new member.
                failed, self._failed = self._failed, set()
                self._store(handler, messages, failed)
                for key in failed:
                    self._begin_again(key)
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

    def _store(
        self, handler: MessageHandler[Message], messages: Sequence[Message], failed: set[_Key]
    ) -> None:
        """Store messages, except those of partitions that are read again from another position."""
        for key, batch in self._by_partition(messages).items():
            source = None if key in failed else self._sources.get(key)
            if source is None:
                continue  # revoked: the member that has the partition reads them
            self.received += len(batch)
            try:
                handler.store(source.batch, batch)
            except PhononError as error:
                if not is_transient(error):
                    raise
                log.warning("%s", error)
                self._failed.add(key)
                self.pause()
            else:
                self._done[key] = int(batch[-1].offset() or 0) + 1
                self._report_end(key, source)
                self._commit([key], wait=False)

    def _by_partition(self, messages: Sequence[Message]) -> dict[_Key, list[Message]]:
        batches: dict[_Key, list[Message]] = {}
        for message in messages:
            error = message.error()
            if error is None:
                batches.setdefault(_key_of(message), []).append(message)
            elif error.fatal():
                raise KafkaException(error)
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - its public name
                self._failed.add(_key_of(message))
            elif error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - its public name
                log.warning("kafka: %s", error)
        return batches

    def _report_end(self, key: _Key, source: Any) -> None:
        """Report the end of the topic to operators, by the broker's last answer."""
        reach = self._consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
        if reach is not None and reach[1] >= 0:
            source.report_end(reach[1])

    def _commit(self, keys: Sequence[_Key], *, wait: bool) -> None:
        """Commit the offsets to the broker, only for its tools."""
        offsets = [
            TopicPartition(*key, self._done[key], COMMITTED) for key in keys if key in self._done
        ]
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
            if source is not None and not self._settles(source):
                self._failed.add(key)

    def _settles(self, source: Any) -> bool:
        """Settle a source, unless it is in doubt. Return False after an error."""
        if source.in_doubt:
            return True
        try:
            self._settled(source)
        except Exception as raised:
            error = weightiest(raised)
            if not isinstance(error, PhononError):
                raise
            log.info("%s", error)
            return False
        return True

        # The partitions of this member

    def _claim(self, key: _Key) -> int | None:
        """Claim a partition, and retry until it succeeds. Return the offset to read on from."""
        while not self.stopping:
            try:
                source: Source = self._claimed(self.name_of(*key))
                self._sources[key] = source
                return self._offset(key, source.position())
            except (PhononError, KafkaException) as error:
                if not is_transient(error) and not isinstance(error, KafkaException):
                    raise
                log.warning("%s", error)
                self.pause()
        return None

    def _offset(self, key: _Key, position: int | None) -> int:
        """Return the offset to read on from, which the broker has.

        Raises:
            SourceRewoundError: More messages are stored than the broker ever had.
            KafkaException: The broker does not answer.
        """
        name = self.name_of(*key)
        [known] = self._consumer.committed([TopicPartition(*key)], ANSWER_TIMEOUT)
        if position is None:
            if known.offset < 0:
                return self._start
            if known.metadata != COMMITTED:
                return int(known.offset)  # a consumer without Phonon has read until there
            log.error(
                "kafka: the server has lost the position of %s, which was %d or more: its messages "
                "are read again",
                name,
                known.offset,
            )
            return self._start
        if known.offset < 0:
            log.warning(
                "kafka: the broker has no committed offset of %s, of which the messages before %d "
                "are stored: if the topic was deleted and made again, its new messages with those "
                "offsets are passed over; see Source.claim",
                name,
                position,
            )
        reach = self._consumer.get_watermark_offsets(TopicPartition(*key), ANSWER_TIMEOUT)
        if reach is None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))  # noqa: SLF001 - its public name
        first, end = reach
        if position > end:
            raise SourceRewoundError(
                f"partition {key[1]} of topic {key[0]!r} ends at {end}, but its messages before "
                f"{position} are stored already: the topic was deleted and made again, or its "
                f"broker has lost messages. To store the messages that are there now, move the "
                f"source on: process.source({name!r}).claim({first}); to pass over them: "
                f"claim({end})",
                name,
            )
        if position < first:
            log.error(
                "kafka: the broker has deleted %d messages of %s, from %d on, before they were "
                "read: the topic's retention is too short",
                first - position,
                name,
                position,
            )
        return position if position > first else int(first)

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
            if source is not None:
                self._settles(source)  # after an error the next member reads some messages again

    def _lost(self, _consumer: Any, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self._sources.pop((partition.topic, partition.partition), None)

    def _begin_again(self, key: _Key) -> None:
        """Claim a partition again after an error, if it is still assigned, and seek back."""
        if key not in self._sources:
            return
        position = self._claim(key)
        if position is None:
            return
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
                    reader = self._sources.get((other.topic, other.partition))
                    if reader is None or reader.in_doubt or reader.position() is None:
                        # Begins anywhere, and is sent to its position by the next round.
                        self._failed.add((other.topic, other.partition))
                    else:
                        other.offset = reader.position()
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
            ``group.id`` and others. Automatic commits are off. ``auto.offset.reset``, which is
            ``earliest`` by default, says where to begin with a partition that was never read.
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
