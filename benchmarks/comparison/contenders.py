"""Contenders of one process: each function works off a stream, and returns its totals."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis

from comparison.locks import Maker
from comparison.stream import BATCH, Message, Total, batches, totals
from comparison.updates import Silent, Tally
from phonon import LruCache, Process

EMPTY = "#!lua name=bench\nredis.register_function('bench_empty', function() return 1 end)"


@dataclass
class Arena:
    """The server and the stream that contenders work with.

    Attributes:
        process: Phonon's.
        client: A client of the same server, as redis-py makes it, with a database of its own.
        stream: The messages.
    """

    process: Process
    client: "redis.Redis"
    stream: Sequence[Message]

    def wipe(self) -> None:
        """Nothing is left of the last one."""
        self.client.flushdb()
        Tally.kept.clear()


#: Its seconds, and its totals: None if there is nothing to compare.
Result = tuple[float, dict[str, Total] | None]


class WrongError(Exception):
    """A contender's totals are not those of the stream."""


def verify(name: str, stream: Sequence[Message], found: dict[str, Total] | None) -> None:
    """Compare with the totals of the stream.

    Raises:
        WrongError: It is something else.
    """
    if found is not None and found != (wanted := totals(stream)):
        wrong = sum(found.get(key) != total for key, total in wanted.items())
        raise WrongError(f"{name}: {wrong} of {len(wanted)} keys have other totals")


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    begun = time.perf_counter()
    ended = 0.0

    def seconds() -> float:
        return ended - begun

    yield seconds
    ended = time.perf_counter()


# In memory


class _Bare:
    def __init__(self, message: Message) -> None:
        self.key, self.count, element, self.high = message
        self.elements = {element}

    def merge(self, other: "_Bare") -> None:
        self.count += other.count
        self.elements |= other.elements
        self.high = max(self.high, other.high)


def bare_loop(arena: Arena) -> Result:
    """An object for each message, merged in an OrderedDict."""
    entries: OrderedDict[str, _Bare] = OrderedDict()
    with _timed() as seconds:
        for message in arena.stream:
            entry = entries.get(message.key)
            if entry is None:
                entries[message.key] = _Bare(message)
            else:
                entry.merge(_Bare(message))
                entries.move_to_end(message.key)
    return seconds(), {k: (e.count, frozenset(e.elements), e.high) for k, e in entries.items()}


def bytewax(arena: Arena) -> Result:
    """A session window in one worker; nothing is durable."""
    from bytewax import operators  # noqa: PLC0415 - a peer, which need not be installed
    from bytewax.dataflow import Dataflow  # noqa: PLC0415 - as above
    from bytewax.operators import windowing  # noqa: PLC0415 - as above
    from bytewax.testing import TestingSink, TestingSource, run_main  # noqa: PLC0415 - as above

    def fold(state: _Bare | None, message: Message) -> _Bare:
        if state is None:
            return _Bare(message)
        state.merge(_Bare(message))
        return state

    def merge(state: _Bare, other: _Bare) -> _Bare:
        state.merge(other)
        return state

    out: list[tuple[str, tuple[int, _Bare]]] = []
    flow = Dataflow("bench")
    source = operators.input("in", flow, TestingSource(arena.stream, batch_size=BATCH))
    keyed = operators.key_on("key", source, lambda message: message.key)
    windows = windowing.fold_window(
        "fold",
        keyed,
        windowing.SystemClock(),
        windowing.SessionWindower(gap=timedelta(minutes=30)),
        lambda: None,
        fold,
        merge,
        ordered=False,
    )
    operators.output("out", windows.down, TestingSink(out))
    with _timed() as seconds:
        run_main(flow)
    found = {key: (e.count, frozenset(e.elements), e.high) for key, (_, e) in out}
    return seconds(), found


def phonon_in_memory(arena: Arena) -> Result:
    """LruCache.set, nothing durable, memberships joined a thousand messages at a time."""
    process = arena.process
    cache: LruCache[Tally] = LruCache(max_entries=len(arena.stream))
    with _timed() as seconds:
        for batch in batches(arena.stream):
            with process.batch(durable=False):
                for message in batch:
                    cache.set(message.key, Tally(process, message, init_cache=False))
    cache.expire_all()
    return seconds(), dict(Tally.kept)


# Durable


def hincrby(arena: Arena) -> Result:
    """One pipelined HINCRBY a message: the sum alone."""
    with _timed() as seconds:
        for batch in batches(arena.stream):
            pipeline = arena.client.pipeline(transaction=False)
            for message in batch:
                pipeline.hincrby(message.key, "n", message.times)
            pipeline.execute()
    return seconds(), None


def merged_hincrby(arena: Arena) -> Result:
    """Sums merged locally first, then one pipelined HINCRBY a key: the sum alone."""
    with _timed() as seconds:
        for batch in batches(arena.stream):
            sums: dict[str, int] = {}
            for message in batch:
                sums[message.key] = sums.get(message.key, 0) + message.times
            pipeline = arena.client.pipeline(transaction=False)
            for key, n in sums.items():
                pipeline.hincrby(key, "n", n)
            pipeline.execute()
    return seconds(), None


def three_commands(arena: Arena) -> Result:
    """The same three facts: pipelined HINCRBY, SADD and ZADD GT."""
    with _timed() as seconds:
        for batch in batches(arena.stream):
            pipeline = arena.client.pipeline(transaction=False)
            for key, count, element, height in batch:
                pipeline.hincrby("n:" + key, "n", count)
                pipeline.sadd("s:" + key, element)
                pipeline.zadd("high", {key: height}, gt=True)
            pipeline.execute()
    return seconds(), _read_commands(arena)


def _read_commands(arena: Arena) -> dict[str, Total]:
    found: dict[str, Total] = {}
    heights: Any = arena.client.zrange("high", 0, -1, withscores=True)
    for name, height in heights:
        key = name.decode()
        elements: set[bytes] = arena.client.smembers("s:" + key)  # type: ignore[assignment]  # no await
        count = int(arena.client.hget("n:" + key, "n") or 0)
        found[key] = count, frozenset(e.decode() for e in elements), int(height)
    return found


def phonon_durable(arena: Arena) -> Result:
    """Process.batch of a thousand messages, all of it on the server when the block ends."""
    process = arena.process
    cache: LruCache[Tally] = LruCache(max_entries=len(arena.stream))
    with _timed() as seconds:
        for batch in batches(arena.stream):
            with process.batch():
                for message in batch:
                    cache.set(message.key, Tally(process, message))
    cache.expire_all()
    return seconds(), dict(Tally.kept)


# Calls


def bare_calls(arena: Arena) -> Result:
    """An empty function, twice, a thousand times."""
    call = arena.client.execute_command
    with _timed() as seconds:
        for _ in range(BATCH):
            call("FCALL", "bench_empty", 1, "key", "argument")
            call("FCALL", "bench_empty", 1, "key", "argument")
    return seconds(), None


def references(arena: Arena) -> Result:
    """create_reference and dereference, a thousand times."""
    process = arena.process
    with _timed() as seconds:
        for _ in range(BATCH):
            process.create_reference("resource").dereference()
    return seconds(), None


#: Threads that make references side by side.
THREADS = 8


def threaded_references(arena: Arena) -> Result:
    """The same by eight threads, each on a resource of its own."""
    process = arena.process

    def work(i: int) -> None:
        for _ in range(BATCH // THREADS):
            process.create_reference(f"resource{i}").dereference()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))  # the threads are there
        with _timed() as seconds:
            list(pool.map(work, range(THREADS)))
    return seconds(), None


def lock_pairs(owner: Any, make: Maker) -> Result:
    """Acquire and release a new lock object, a thousand times, without contention."""
    with _timed() as seconds:
        for _ in range(BATCH):
            lock = make(owner, "lock")
            lock.acquire()
            lock.release()
    return seconds(), None


SESSIONS = 10_000


def pipelined_calls(arena: Arena) -> Result:
    """An empty function twice a session, in pipelines of a thousand."""
    with _timed() as seconds:
        for first in range(0, 2 * SESSIONS, BATCH):
            pipeline = arena.client.pipeline(transaction=False)
            for i in range(first, first + BATCH):
                pipeline.execute_command("FCALL", "bench_empty", 1, f"key{i}", "argument")
            pipeline.execute()
    return seconds(), None


def end_sessions(arena: Arena) -> Result:
    """expire_all of ten thousand sessions, with nothing to write."""
    process = arena.process
    cache: LruCache[Any] = LruCache(max_entries=SESSIONS)
    with process.batch(durable=False):
        for i in range(SESSIONS):
            cache.set(i, Silent(process, Message(f"user{i}", 1, "page", 1), init_cache=False))
    with _timed() as seconds:
        cache.expire_all()
    return seconds(), None
