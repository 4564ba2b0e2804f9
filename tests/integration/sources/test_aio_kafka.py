"""Kafka for tasks: the real client against librdkafka's mock cluster, and a database."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Message

from chaos.servers import MockKafka
from phonon.aio import AsyncConflictFreeUpdate, AsyncLruCache, AsyncProcess
from phonon.sources.aio_kafka import AsyncKafkaSource
from support.world import Redis

#: A busy machine takes its time to form a group.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def kafka() -> Iterator[MockKafka]:
    kafka = MockKafka()
    yield kafka
    kafka.close()


class Count(AsyncConflictFreeUpdate, name="aio_kafka_count"):
    executed: Counter[Any] = Counter()  # noqa: RUF012 - one for all

    async def execute(self) -> None:
        self.executed[self._id] += self.doc["n"]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.executed.clear()


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of another library's thread
            await asyncio.sleep(0.01)


class Consumer:
    """A loop in a task."""

    def __init__(self, process: AsyncProcess, config: Any, topic: str, **options: Any) -> None:
        self.process = process
        self.cache: AsyncLruCache[Count] = AsyncLruCache(20)
        self.seen: Counter[int] = Counter()
        self.source = AsyncKafkaSource(
            process, config, topic, poll_timeout=0.05, sessions=self.cache, **options
        )
        self.task = asyncio.ensure_future(self.source.run(self.handle))

    async def handle(self, message: Message) -> None:
        number = int(message.value() or b"")
        await asyncio.sleep(0)  # others go on meanwhile
        self.seen[number] += 1
        await self.cache.set(number % 30, Count(self.process, number % 30, doc={"n": 1}))


def fill(kafka: MockKafka, topic: str, first: int, last: int) -> Counter[Any]:
    kafka.produce(topic, [(str(n), b"%d" % n) for n in range(first, last)])
    return Counter(n % 30 for n in range(first, last))


def test_a_rebalance_and_a_cancelled_task_double_and_lose_nothing(
    server: Redis, namespace: str, kafka: MockKafka
) -> None:
    async def main() -> None:
        config = kafka.config(namespace)
        expected = fill(kafka, namespace, 0, 1000)
        async with (
            AsyncProcess(url=server.url, namespace=namespace) as one,
            AsyncProcess(url=server.url, namespace=namespace) as other,
        ):
            first = Consumer(one, config, namespace, batch_size=50)
            await until(lambda: sum(first.seen.values()) >= 500)
            second = Consumer(other, config, namespace, batch_size=50)
            await until(lambda: second.source._sources)
            expected += fill(kafka, namespace, 1000, 2000)
            await until(lambda: second.seen)
            first.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first.task
            expected += fill(kafka, namespace, 2000, 2200)
            await until(lambda: len(first.seen | second.seen) == 2200)
            second.source.stop()
            await second.task
        assert Count.executed == expected

    asyncio.run(main())


def test_poison_goes_to_a_coroutine(server: Redis, namespace: str, kafka: MockKafka) -> None:
    async def main() -> None:
        expected = fill(kafka, namespace, 0, 100)
        kafka.produce(namespace, [("x", b"poison")])
        expected += fill(kafka, namespace, 100, 200)
        put_aside: list[Any] = []

        async def on_poison(message: Message, error: Exception) -> None:
            await asyncio.sleep(0)
            put_aside.append((message.value(), type(error)))

        async with AsyncProcess(url=server.url, namespace=namespace) as process:
            consumer = Consumer(process, kafka.config(namespace), namespace, on_poison=on_poison)
            await until(lambda: put_aside and len(consumer.seen) == 200)
            consumer.source.stop()
            await consumer.task
        assert put_aside == [(b"poison", ValueError)]
        assert Count.executed == expected

    asyncio.run(main())
