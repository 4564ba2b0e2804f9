"""Kafka: the real client against librdkafka's mock cluster."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import Message, TopicPartition

from chaos.servers import MockKafka
from phonon import Process
from phonon.errors import ConfigurationError
from phonon.sources.kafka import KafkaSource
from support import consumers
from support.counted import Count
from support.world import Make, wait_until

#: A busy machine takes its time to start so many, or to form a group.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def kafka() -> Iterator[MockKafka]:
    kafka = MockKafka()
    yield kafka
    kafka.close()


class Consumer(consumers.Consumer):
    """A loop in a thread."""

    def __init__(
        self, process: Process, config: dict[str, Any], topic: str, **options: Any
    ) -> None:
        self.seen: Counter[int] = Counter()
        super().__init__(process, KafkaSource, config, topic, poll_timeout=0.05, **options)

    def handle(self, message: Message) -> None:
        value = message.value()
        assert value is not None
        number = int(value)
        self.seen[number] += 1
        self.count(number % 30)


def fill(kafka: MockKafka, topic: str, first: int, last: int) -> Counter[Any]:
    kafka.produce(topic, [(str(n), b"%d" % n) for n in range(first, last)])
    return Counter(n % 30 for n in range(first, last))


def stored(process: Process, group: str, topic: str) -> int:
    """How many messages of a topic are stored everywhere."""
    run: Callable[[Any], Any] = process.engine.run
    names = [f"kafka/{group}/{topic}/{p}" for p in range(MockKafka.partitions)]
    return sum(run(process.engine.sources.position(name)) or 0 for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_a_rebalance_doubles_and_loses_nothing(
    make: Make, kafka: MockKafka, namespace: str, strategy: str
) -> None:
    topic = f"{namespace}-{strategy}"
    config = kafka.config(topic, **{"partition.assignment.strategy": strategy})
    expected = fill(kafka, topic, 0, 2000)
    both = [Consumer(make(), config, topic, batch_size=100)]
    wait_until(lambda: sum(both[0].seen.values()) >= 1000, 30)
    both.append(Consumer(make(), config, topic, batch_size=100))
    wait_until(lambda: len(both[1].source._sources) > 0, 30)
    expected += fill(kafka, topic, 2000, 4000)
    wait_until(lambda: both[1].seen, 30)
    both[0].stop()
    expected += fill(kafka, topic, 4000, 4500)
    observer = make()
    wait_until(lambda: stored(observer, topic, topic) == 4500, 40)
    both[1].stop()
    for consumer in both:
        assert consumer.error is None
        consumer.process.stop()
    assert Count.executed == expected


@pytest.mark.slow
def test_a_topic_is_read_on_from_where_it_is_stored(
    make: Make, kafka: MockKafka, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from what was committed, which is for the eyes of tools."""
    topic = f"{namespace}-position"
    expected = fill(kafka, topic, 0, 300)
    config = kafka.config(topic)
    first = Consumer(make(), config, topic)
    wait_until(lambda: sum(first.seen.values()) == 300, 30)
    listed = first.process.engine.sources.listed
    wait_until(lambda: [lag for *_, lag in listed()] == [0] * MockKafka.partitions, 30)
    first.stop()
    client = Client(config)
    partitions = [TopicPartition(topic, partition) for partition in range(MockKafka.partitions)]
    assert sum(p.offset for p in client.committed(partitions, timeout=10)) == 300
    client.close()
    monkeypatch.setattr(KafkaSource, "_commit", lambda *_, **__: None)
    expected += fill(kafka, topic, 300, 400)
    second = Consumer(make(), config, topic)
    wait_until(lambda: sum(second.seen.values()) == 100, 30)
    second.stop()
    expected += fill(kafka, topic, 400, 500)
    third = Consumer(make(), config, topic)
    observer = make()
    wait_until(lambda: stored(observer, topic, topic) == 500, 30)
    third.stop()
    for consumer in (first, second, third):
        assert consumer.error is None
        consumer.process.stop()
    assert third.seen.keys() == set(range(400, 500))
    assert Count.executed == expected


@pytest.mark.slow
def test_poison_messages_go_to_a_topic_of_their_own(
    make: Make, kafka: MockKafka, namespace: str
) -> None:
    topic = f"{namespace}-poison"
    expected = fill(kafka, topic, 0, 100)
    kafka.produce(topic, [("x", b"poison"), ("y", b"more poison")])
    expected += fill(kafka, topic, 100, 200)
    process = make()
    consumer = Consumer(process, kafka.config(topic), topic, dead_letters=f"{topic}-dead")
    observer = make()
    wait_until(lambda: stored(observer, topic, topic) == 202, 30)
    consumer.stop()
    assert consumer.error is None
    reader = Client(kafka.config(f"{topic}-reader", **{"auto.offset.reset": "earliest"}))
    reader.subscribe([f"{topic}-dead"])
    dead: dict[Any, Any] = {}

    def read() -> bool:
        for message in reader.consume(10, 0.1):
            dead[message.value()] = dict(message.headers())  # type: ignore[arg-type]
        return len(dead) == 2

    wait_until(read, 30)
    reader.close()
    assert dead.keys() == {b"poison", b"more poison"}
    assert dead[b"poison"]["phonon-error"].startswith(b"ValueError: invalid literal")
    assert dead[b"poison"]["phonon-topic"] == topic.encode()
    assert Count.executed == expected


@pytest.mark.slow
def test_one_that_was_claimed_from_goes_back_and_goes_on(
    make: Make, kafka: MockKafka, namespace: str
) -> None:
    """Somebody else claims its partitions, and goes: it is refused, claims again, reads again."""
    topic = f"{namespace}-claim"
    expected = fill(kafka, topic, 0, 500)
    consumer = Consumer(make(), kafka.config(topic), topic, batch_size=50)
    wait_until(lambda: sum(consumer.seen.values()) >= 200, 30)
    other = make()
    for partition in range(MockKafka.partitions):
        other.source(f"kafka/{topic}/{topic}/{partition}")
    expected += fill(kafka, topic, 500, 1000)
    wait_until(lambda: stored(other, topic, topic) == 1000, 30)
    consumer.stop()
    assert consumer.error is None
    consumer.process.stop()
    assert sum(consumer.seen.values()) > 1000  # some were handled twice
    assert Count.executed == expected


def test_what_cannot_be_meant_is_refused(make: Make) -> None:
    process = make()
    with pytest.raises(ConfigurationError, match=r"'group\.id'"):
        KafkaSource(process, {"bootstrap.servers": "x"}, "t")
    with pytest.raises(ConfigurationError, match="not both"):
        KafkaSource(process, {"group.id": "g"}, "t", dead_letters="d", on_poison=print)
    with pytest.raises(ConfigurationError, match="topics is a name"):
        KafkaSource(process, {"group.id": "g"}, [""])
