"""Contenders of several processes, from a stream to a database's verified totals."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import redis

from comparison import sink
from comparison.sink import Row, Sink
from comparison.stream import Message, Total, batches, shares
from comparison.updates import Tally
from phonon import LruCache, Process

#: Seconds that a worker may take to start.
START = 60.0
#: Keys that the flusher claims and writes together.
CLAIM = 500


def upsert_per_message(_url: str, messages: Sequence[Message], path: Path, _: Barrier) -> None:
    """One transaction a message."""
    database = Sink(path)
    for key, count, element, height in messages:
        database.write([(key, count, [element], height, 0)])
    database.close()


def flusher(url: str, messages: Sequence[Message], path: Path, done: Barrier) -> None:
    """Pipelined commands; then each worker claims keys that have changed, and writes them."""
    client = redis.Redis.from_url(url)
    for batch in batches(messages):
        pipeline = client.pipeline(transaction=False)
        for key, count, element, height in batch:
            pipeline.hincrby("n:" + key, "n", count)
            pipeline.sadd("s:" + key, element)
            pipeline.zadd("high", {key: height}, gt=True)
            pipeline.sadd("changed", key)
        pipeline.execute()
    done.wait(START)
    database = Sink(path)
    claimed: list[bytes] = client.spop("changed", CLAIM)  # type: ignore[assignment]  # a count
    while claimed:
        database.write(_claim(client, [key.decode() for key in claimed]))
        claimed = client.spop("changed", CLAIM)  # type: ignore[assignment]  # a count
    database.close()
    client.close()


def _claim(client: "redis.Redis", keys: Sequence[str]) -> list[Row]:
    pipeline = client.pipeline(transaction=True)
    for key in keys:
        pipeline.hget("n:" + key, "n")
        pipeline.smembers("s:" + key)
        pipeline.zscore("high", key)
        pipeline.delete("n:" + key, "s:" + key)
        pipeline.zrem("high", key)
    answers: list[Any] = pipeline.execute()
    return [
        (key, int(count), [e.decode() for e in elements], int(height), 0)
        for key, count, elements, height in zip(
            keys, answers[::5], answers[1::5], answers[2::5], strict=True
        )
    ]


def phonon(url: str, messages: Sequence[Message], path: Path, done: Barrier) -> None:
    """Process.batch of a thousand messages each, and one write a session."""
    Tally.sink = Sink(path)
    phonon_ingest(url, messages, path, done)
    Tally.sink.close()


def phonon_ingest(url: str, messages: Sequence[Message], _path: Path, done: Barrier) -> None:
    """Store a stream, and measure no writing."""
    process = Process(url=url)
    cache: LruCache[Tally] = LruCache(max_entries=len(messages))
    for batch in batches(messages):
        with process.batch():
            for message in batch:
                cache.set(message.key, Tally(process, message))
    done.wait(START)
    cache.expire_all()
    process.stop()


Work = Callable[[str, Sequence[Message], Path, Barrier], None]


def _worker(
    work: Work, url: str, messages: Sequence[Message], path: Path, begin: Barrier, done: Barrier
) -> None:
    begin.wait(START)
    work(url, messages, path, done)


def measure(
    work: Work, url: str, stream: Sequence[Message], workers: int, path: Path
) -> tuple[float, dict[str, Total]]:
    """Have workers work off a stream.

    Returns:
        Seconds from when all have started until the last one has ended, or, for `phonon_ingest`,
        until all is stored; and what is in the database.
    """
    sink.make(path)
    context = multiprocessing.get_context("spawn")
    begin, done = (
        context.Barrier(workers + 1),
        context.Barrier(workers + int(work is phonon_ingest)),
    )
    started = [
        context.Process(target=_worker, args=(work, url, share, path, begin, done))
        for share in shares(stream, workers)
    ]
    for worker in started:
        worker.start()
    begin.wait(START)
    begun = time.perf_counter()
    if work is phonon_ingest:
        done.wait(START)
        seconds = time.perf_counter() - begun
    for worker in started:
        worker.join()
    if work is not phonon_ingest:
        seconds = time.perf_counter() - begun
    if any(worker.exitcode for worker in started):
        raise RuntimeError(f"a worker of {work.__name__} has failed")
    return seconds, sink.read(path)
