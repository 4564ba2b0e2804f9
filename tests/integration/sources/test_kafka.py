"""Kafka: the real client against librdkafka's mock cluster."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import Message, TopicPartition

from chaos.servers import MockKafka
from phonon import Process
from phonon.errors import ConfigurationError, SourceRewoundError
from phonon.sources.kafka import KafkaSource
from support import consumers
from support.counted import Count
from support.world import Make, Redis, wait_until

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


@pytest.mark.slow
def test_an_error_of_one_partition_passes_over_nothing_of_the_others(
    make: Make, kafka: MockKafka, namespace: str
) -> None:
    topic = f"{namespace}-others"

    def send(partition: int, numbers: range) -> Counter[Any]:
        for n in numbers:
            kafka.producer.produce(topic, b"%d" % n, partition=partition)
        assert kafka.producer.flush(10) == 0
        return Counter(n % 30 for n in numbers)

    expected = send(0, range(10)) + send(1, range(10, 20))
    consumer = Consumer(make(), kafka.config(topic), topic)
    wait_until(lambda: len(consumer.seen) == 20, 30)
    other = make()
    name = f"kafka/{topic}/{topic}/0"
    wait_until(lambda: other.engine.run(other.engine.sources.position(name)) == 10)
    other.source(name)
    expected += send(0, range(20, 21))
    wait_until(lambda: consumer.source._sources[topic, 0].in_doubt)
    # It pauses, and then asks the broker what became of its partitions.
    expected += send(1, range(30, 60))
    wait_until(lambda: stored(other, topic, topic) == 51, 30)
    consumer.stop()
    assert consumer.error is None
    consumer.process.stop()
    assert Count.executed == expected


@pytest.fixture
def remade() -> Iterator[MockKafka]:
    """Another cluster: its topics have the names of the first one's, and other messages."""
    kafka = MockKafka()
    yield kafka
    kafka.close()


@pytest.mark.slow
def test_a_topic_that_was_made_again_is_not_passed_over(
    make: Make,
    kafka: MockKafka,
    remade: MockKafka,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    topic = f"{namespace}-again"
    fill(kafka, topic, 0, 400)
    observer = make()
    first = Consumer(make(), kafka.config(topic), topic)
    wait_until(lambda: stored(observer, topic, topic) == 400, 30)
    first.stop()
    Count.executed.clear()
    expected = fill(remade, topic, 0, 100)
    second = Consumer(make(), remade.config(topic), topic)
    second.thread.join(30)
    assert isinstance(second.error, SourceRewoundError)
    assert "no committed offset" in caplog.text
    for partition in range(MockKafka.partitions):
        name = f"kafka/{topic}/{topic}/{partition}"
        assert f"process.source({second.error.source!r}).claim(0)" in str(second.error)
        observer.source(name).claim(0)
    third = Consumer(make(), remade.config(topic), topic)
    wait_until(lambda: stored(observer, topic, topic) == 100, 30)
    third.stop()
    assert third.error is None
    assert Count.executed == expected


@pytest.mark.slow
def test_where_a_partition_begins_that_phonon_has_no_position_of(
    make: Make, kafka: MockKafka, own_server: Redis, namespace: str
) -> None:
    """Behind what a consumer without Phonon committed; at the begin, if the server was emptied."""
    topic = f"{namespace}-begin"
    fill(kafka, topic, 0, 200)
    client = Client(kafka.config(topic, **{"auto.offset.reset": "earliest"}))
    reach = [
        client.get_watermark_offsets(TopicPartition(topic, p), 10)[1]
        for p in range(MockKafka.partitions)
    ]
    client.commit(
        offsets=[TopicPartition(topic, p, end) for p, end in enumerate(reach)], asynchronous=False
    )
    client.close()
    expected = fill(kafka, topic, 200, 300)
    observer = make()
    consumer = Consumer(make(), kafka.config(topic), topic)
    wait_until(lambda: stored(observer, topic, topic) == 300, 30)
    consumer.stop()
    assert consumer.error is None
    assert consumer.seen.keys() == set(range(200, 300))
    assert Count.executed == expected
    with Process(own_server.url) as process:
        again = Consumer(process, kafka.config(topic), topic)
        wait_until(lambda: len(again.seen) == 300, 30)
        again.stop()
        assert again.error is None


def test_what_cannot_be_meant_is_refused(make: Make) -> None:
    process = make()
    with pytest.raises(ConfigurationError, match=r"'group\.id'"):
        KafkaSource(process, {"bootstrap.servers": "x"}, "t")
    with pytest.raises(ConfigurationError, match="not both"):
        KafkaSource(process, {"group.id": "g"}, "t", dead_letters="d", on_poison=print)
    with pytest.raises(ConfigurationError, match="topics is a name"):
        KafkaSource(process, {"group.id": "g"}, [""])
    with pytest.raises(ConfigurationError, match="is 'earliest' or 'latest'"):
        KafkaSource(process, {"group.id": "g", "auto.offset.reset": "error"}, "t")
