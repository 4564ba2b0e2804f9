"""librdkafka's mock cluster: the real protocol on a real port, without a JVM."""

from collections.abc import Iterable
from typing import Any

from confluent_kafka import Producer

#: Members of a group are missed soon.
QUICK = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 200, "log_level": 2}


class MockKafka:
    """A cluster of one broker, with four partitions for each topic."""

    partitions = 4

    def __init__(self) -> None:
        # The client that has the broker in it. Others connect to its port.
        self._cluster: Any = Producer(
            {"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 2}
        )
        brokers = self._cluster.list_topics(timeout=10).brokers.values()
        self.servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        self.producer: Any = Producer({"bootstrap.servers": self.servers, "log_level": 2})

    def config(self, group: str, **more: Any) -> dict[str, Any]:
        return {"bootstrap.servers": self.servers, "group.id": group, **QUICK, **more}

    def produce(self, topic: str, messages: Iterable[tuple[str, bytes]]) -> None:
        for key, value in messages:
            self.producer.produce(topic, value, key)
            self.producer.poll(0)
        assert self.producer.flush(10) == 0

    def close(self) -> None:
        self.producer.flush(1)
        del self.producer, self._cluster
