"""Brokers that workers read from: a stream on Phonon's server, or Kafka."""

from collections.abc import Sequence
from typing import Any, Protocol

from phonon import Process
from phonon_demo.aggregations import Message
from phonon_demo.plan import GROUP


class Broker(Protocol):
    """Takes messages, and knows how many of them are stored.

    Attributes:
        address: The address that workers connect to.
        topic: The topic, or the stream.
    """

    address: str
    topic: str

    def produce(self, messages: Sequence[Message]) -> None:
        """Send messages."""

    def stored(self, process: Process) -> int:
        """Return how many messages the workers have stored."""

    def close(self) -> None:
        """End it."""


class StreamBroker:
    """A stream on Phonon's own server.

    Args:
        client: A client of the server.
        url: The server's URL.
        stream: The name of the stream.
    """

    def __init__(self, client: Any, url: str, stream: str) -> None:
        self.address = url
        self._client = client
        self.topic = stream
        self._count = 0

    def produce(self, messages: Sequence[Message]) -> None:
        """Add entries."""
        pipeline = self._client.pipeline(transaction=False)
        for message in messages:
            pipeline.xadd(self.topic, {"key": message.key, "value": message.value})
        pipeline.execute()
        self._count += len(messages)

    def stored(self, process: Process) -> int:
        """Return how many entries were acknowledged."""
        del process
        if not self._count or not (groups := self._client.xinfo_groups(self.topic)):
            return 0
        return self._count - int(groups[0]["pending"]) - int(groups[0]["lag"] or 0)

    def close(self) -> None:
        """Delete the stream."""
        self._client.delete(self.topic)


class KafkaBroker:
    """Librdkafka's mock cluster: the real protocol, without a JVM.

    Args:
        topic: The name of the topic.
    """

    PARTITIONS = 4

    def __init__(self, topic: str) -> None:
        from confluent_kafka import Producer  # noqa: PLC0415 - an extra

        self.topic = topic
        self._cluster: Any = Producer(
            {"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 2}
        )
        brokers = self._cluster.list_topics(timeout=10).brokers.values()
        self.address = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        self._producer: Any = Producer({"bootstrap.servers": self.address, "log_level": 2})

    def produce(self, messages: Sequence[Message]) -> None:
        """Send messages."""
        for message in messages:
            self._producer.produce(self.topic, message.value, message.key)
        self._producer.flush(10)

    def stored(self, process: Process) -> int:
        """Return how many messages were stored, by Phonon's positions."""
        sources = process.engine.sources
        names = [f"kafka/{GROUP}/{self.topic}/{p}" for p in range(self.PARTITIONS)]
        return sum(process.engine.run(sources.position(name)) or 0 for name in names)

    def close(self) -> None:
        """End it."""
        del self._producer, self._cluster
