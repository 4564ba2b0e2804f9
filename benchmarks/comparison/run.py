"""Measures all contenders in turns, on one server, and compares what belongs together."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import redis

from comparison import contenders, locks, stream, workers
from comparison.contenders import Arena
from comparison.stream import Message
from phonon import Process, embedded

KEYS = 20_000
#: Messages that are enough to see whether many keys cost more than few.
FLAT = 200_000


@dataclass
class Contender:
    """A way of work that is measured.

    Attributes:
        group: The group in which it is compared.
        name: Its name.
        loses: The loss if it is killed, kill -9.
        work: Does it; returns seconds, and the number and the kind of its results.
        peer: The package that it needs.
        rates: The number a second, one for each round.
    """

    group: str
    name: str
    loses: str
    work: Callable[[], tuple[float, int]]
    peer: str = ""
    rates: list[float] = field(default_factory=list)

    @property
    def is_there(self) -> bool:
        """Return whether the packages that it needs are installed."""
        return not self.peer or find_spec(self.peer) is not None


@dataclass
class Target:
    """A target for a contender, as a ratio of two rates of the same round."""

    ours: Contender
    theirs: Contender
    at_least: float

    @property
    def ratios(self) -> list[float]:
        """One for each round."""
        return [a / b for a, b in zip(self.ours.rates, self.theirs.rates, strict=True)]

    @property
    def is_met(self) -> bool:
        """Return whether the median reaches it."""
        return statistics.median(self.ratios) >= self.at_least


@dataclass
class Results:
    """All that came out.

    Attributes:
        settings: The settings of the measurement.
        contenders: With their rates.
        targets: Those whose two sides were there.
    """

    settings: dict[str, Any]
    contenders: list[Contender]
    targets: list[Target]


class Suite:
    """The contenders.

    Args:
        url: Of the server.
        folder: For databases.
        messages: The number of messages in the stream.
        processes: The number of worker processes.
    """

    def __init__(self, url: str, folder: Path, messages: int, processes: int) -> None:
        self._url = url
        self._folder = folder
        self._processes = processes
        self._process = Process(url=url)
        client = redis.Redis.from_url(url.replace("db=1", "db=2"))
        client.config_set("appendonly", "no")
        client.function_load(contenders.EMPTY, replace=True)
        self._zipf = stream.zipf(messages, KEYS, seed=1)
        self._lab = Arena(self._process, client, self._zipf)
        self.contenders: list[Contender] = []
        self.targets: list[Target] = []
        self._in_memory()
        self._durable()
        self._end_to_end()
        self._calls()
        self._locks()
        self._flat()

    def close(self) -> None:
        """Give back the locks that are held."""
        self._process.stop()
        self._lab.client.close()

    def _add(
        self,
        group: str,
        name: str,
        loses: str,
        work: Callable[[Arena], contenders.Result],
        *,
        count: int | None = None,
        peer: str = "",
        messages: Sequence[Message] | None = None,
    ) -> Contender:
        given = self._zipf if messages is None else messages
        arena = Arena(self._process, self._lab.client, given)

        def run() -> tuple[float, int]:
            arena.wipe()
            seconds, found = work(arena)
            contenders.verify(name, given, found)
            return seconds, count or len(given)

        contender = Contender(group, name, loses, run, peer)
        self.contenders.append(contender)
        return contender

    def _in_memory(self) -> None:
        group, all_of_it = "in memory, messages/s", "all that was not written yet"
        bare = self._add(group, "bare loop", all_of_it, contenders.bare_loop)
        self._bytewax = self._add(group, "Bytewax", all_of_it, contenders.bytewax, peer="bytewax")
        ours = self._add(
            group, "Phonon, init_cache=False", "what is in its cache", contenders.phonon_in_memory
        )
        self.targets += [Target(ours, bare, 0.4), Target(ours, self._bytewax, 3.0)]

    def _durable(self) -> None:
        group, nothing = "durable, messages/s", "nothing acknowledged"
        alone = self._add(group, "HINCRBY, sum only", nothing, contenders.hincrby)
        merged = self._add(
            group, "HINCRBY of sums merged first", nothing, contenders.merged_hincrby
        )
        three = self._add(group, "HINCRBY, SADD, ZADD", nothing, contenders.three_commands)
        ours = self._add(group, "Phonon, batch()", nothing, contenders.phonon_durable)
        self.targets += [
            Target(ours, alone, 1.5),
            Target(ours, merged, 0.7),
            Target(ours, three, 0.6),
            Target(ours, self._bytewax, 1.0),
        ]

    def _end_to_end(self) -> None:
        group = f"stream to database, {self._processes} workers, messages/s"
        part = self._zipf[: max(1000, len(self._zipf) // 20)]
        path = self._folder / "totals"

        def several(
            name: str,
            loses: str,
            work: workers.Work,
            messages: Sequence[Message],
            processes: int = self._processes,
            group: str = group,
        ) -> Contender:
            def run() -> tuple[float, int]:
                self._lab.wipe()
                seconds, found = workers.measure(work, self._url, messages, processes, path)
                if work is not workers.phonon_ingest:
                    contenders.verify(name, messages, found)
                return seconds, len(messages)

            contender = Contender(group, name, loses, run)
            self.contenders.append(contender)
            return contender

        flusher = several(
            "HINCRBY and flusher", "what it has claimed and not written", workers.flusher,
            self._zipf,
        )  # fmt: skip
        upserts = several("one upsert a message", "nothing", workers.upsert_per_message, part)
        ours = several("Phonon", "nothing acknowledged", workers.phonon, self._zipf)
        self.targets += [Target(ours, flusher, 1.2), Target(ours, upserts, 10.0)]
        group = "durable ingest by workers, messages/s"
        one, two = (
            several(f"{n} worker{'s'[: n - 1]}", "nothing acknowledged", workers.phonon_ingest,
                    self._zipf, n, group)
            for n in (1, 2)
        )  # fmt: skip
        self.targets.append(Target(two, one, 1.5))

    def _calls(self) -> None:
        add, n = self._add, stream.BATCH
        bare = add("pairs/s", "two bare calls", "", contenders.bare_calls, count=n)
        name = "Phonon, create_reference and dereference"
        ours = add("pairs/s", name, "", contenders.references, count=n)
        threads = add(
            "pairs/s", "Phonon, the same by 8 threads", "", contenders.threaded_references, count=n
        )
        group, n = "sessions ended/s", contenders.SESSIONS
        calls = add(group, "two bare pipelined calls", "", contenders.pipelined_calls, count=n)
        ends = add(group, "Phonon, expire_all", "", contenders.end_sessions, count=n)
        self.targets += [
            Target(ours, bare, 0.8),
            Target(threads, ours, 1.5),
            Target(ends, calls, 0.45),
        ]

    def _locks(self) -> None:
        def add(name: str, load: Callable[[], locks.Maker], peer: str = "") -> Contender:
            def work(arena: Arena) -> contenders.Result:
                owner = arena.process if load is locks.phonon else arena.client
                return contenders.lock_pairs(owner, load())

            group = "locks nobody else wants, pairs/s"
            return self._add(group, name, "", work, count=stream.BATCH, peer=peer)

        redis_py = add("redis-py Lock", locks.redis_py)
        package = add("python-redis-lock", locks.python_redis_lock, "redis_lock")
        pottery = add("pottery Redlock", locks.pottery, "pottery")
        ours = add("Phonon, lock", locks.phonon)
        self.targets += [
            Target(ours, redis_py, 1.0),
            Target(ours, package, 1.0),
            Target(ours, pottery, 1.0),
        ]

    def _flat(self) -> None:
        """Measure whether it costs more with more keys, or with more messages."""
        count = min(len(self._zipf), FLAT)
        group = "durable, messages/s by number of keys"
        fewest: Contender | None = None
        for keys in (1000, 10_000, 100_000, 1_000_000):
            if keys > count:
                break
            # Each batch has a thousand different keys.
            messages = stream.uniform(count, keys)
            ours = self._add(
                group, f"{keys:,} keys", "", contenders.phonon_durable, messages=messages
            )
            if fewest is not None:
                self.targets.append(Target(ours, fewest, 0.8))
            fewest = fewest or ours


def run(messages: int, rounds: int, processes: int, progress: Callable[[str], None]) -> Results:
    """Measure everything, in turns, so that all meet the same noise."""
    with tempfile.TemporaryDirectory() as folder, embedded.start(folder) as server:
        url = f"unix://{server.socket_path}?db=1"
        suite = Suite(url, Path(folder), messages, processes)
        try:
            there = [contender for contender in suite.contenders if contender.is_there]
            for round_, contender in _turns(there, rounds):
                progress(f"round {round_ + 1} of {rounds}: {contender.group}: {contender.name}")
                seconds, count = contender.work()
                contender.rates.append(count / seconds)
        finally:
            suite.close()
        settings = {
            "messages": messages, "keys": KEYS, "zipf": stream.EXPONENT, "rounds": rounds,
            "workers": processes, "batch": stream.BATCH,
        }  # fmt: skip
        measured = [t for t in suite.targets if t.ours.rates and t.theirs.rates]
        return Results(settings, suite.contenders, measured)


def _turns(contenders: Sequence[Contender], rounds: int) -> Iterator[tuple[int, Contender]]:
    for round_ in range(rounds):
        for contender in contenders:
            yield round_, contender
