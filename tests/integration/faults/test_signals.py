"""Signal handlers that raise, or stop the process, in the middle of any call (19.10, 19.11)."""

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import pytest

from phonon import LruCache, Process
from phonon.errors import LockLostError, PhononError, ProcessStoppedError
from support.samples import Tally
from support.world import ALWAYS, Redis, is_settled, keys_in, wait_until

INTERRUPTS = 10_000
STOPS = 1_000
#: Seconds after which a signal comes, at the most: as long as a call takes.
LATEST = 0.001


class TimeLimit(Exception):  # noqa: N818 - as Celery's soft time limit, an ordinary exception
    """What a handler raises."""


class Alarm:
    """Calls with a signal handler in the middle."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a test's schedule
        self.action: Callable[[], None] | None = None
        self.came = 0

    def handle(self, _: int, __: FrameType | None) -> None:
        """Do what is to be done, once."""
        action, self.action = self.action, None
        if action is not None:
            self.came += 1
            action()

    def around(self, call: Callable[[], Any], action: Callable[[], None]) -> Any:
        """Call something, and let the signal come some time meanwhile."""
        try:
            self.action = action
            signal.setitimer(signal.ITIMER_REAL, self.chance.uniform(0.00002, LATEST))
            return call()
        finally:
            self.action = None


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    alarm = Alarm(7)
    previous = signal.signal(signal.SIGALRM, alarm.handle)
    yield alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def kind(namespace: str) -> type[Tally]:
    class Written(Tally, name=f"written in {namespace}"):
        written: ClassVar[list[Any]] = []

    return Written


class World:
    """A process, and what it does; counts what was acknowledged."""

    def __init__(self, process: Process, kind: type[Tally]) -> None:
        self.process = process
        self.kind = kind
        self.cache: LruCache[Tally] = LruCache(max_entries=3)
        self.reference = process.create_reference("resource")
        self.modified = 0
        self.tried: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()
        self.calls: list[Callable[[], Any]] = [
            self.count,
            self.modify,
            self.store,
            self.keep,
            self.collect,
            self.end,
            self.lock,
            self.look,
            self.process.flush,
        ]

    def count(self) -> None:
        assert self.reference.count() <= 1

    def modify(self) -> None:
        self.reference.increment_times_modified()
        self.modified += 1

    def store(self) -> None:
        record = f"record-{len(self.tried) % 4}"
        self.tried[record] += 1
        self.cache.set(record, self.kind(self.process, record, doc={"n": 1}))
        self.acknowledged[record] += 1

    def keep(self) -> None:
        self.tried["kept"] += 1
        update = self.kind(self.process, "kept", doc={"n": 1}, init_cache=False)
        update.end_session()
        self.acknowledged["kept"] += 1

    def collect(self) -> None:
        self.tried["collected"] += 3
        with self.process.batch():
            for _ in range(3):
                self.cache.set("collected", self.kind(self.process, "collected", doc={"n": 1}))
        self.acknowledged["collected"] += 3

    def end(self) -> None:
        self.cache.expire_all()

    def lock(self) -> None:
        with contextlib.suppress(LockLostError), self.process.lock("lock"):
            self.process.lock("another", block=False).acquire()

    def look(self) -> None:
        self.process.get_registry()
        self.reference.holders()
        self.process.lock("lock").locked()

    def totals(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for entry in self.kind.written:
            found[entry.record] += entry.doc["n"]
        return found

    def check(self) -> None:
        """Nothing that was acknowledged is lost, and nothing is there that nobody brought."""
        totals = self.totals()
        for record, tried in self.tried.items():
            assert self.acknowledged[record] <= totals[record] <= tried, record


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeLimit])
def test_ten_thousand_interrupts(
    alarm: Alarm,
    error: type[BaseException],
    server: Redis,
    namespace: str,
    kind: type[Tally],
) -> None:
    def interrupt() -> None:
        raise error

    process = Process(url=server.url, namespace=namespace, retry=ALWAYS)
    world = World(process, kind)
    deadline = time.monotonic() + 200
    while alarm.came < INTERRUPTS // 2 and time.monotonic() < deadline:
        call = alarm.chance.choice(world.calls)
        # A call that waited for one that was interrupted may say so, or be told its error.
        with contextlib.suppress(error, PhononError, ExceptionGroup):
            alarm.around(call, interrupt)
    assert alarm.came == INTERRUPTS // 2
    outbox = process.engine.outbox
    wait_until(lambda: is_settled(process) and not outbox._due and not outbox.busy)
    with Process(url=server.url, namespace=namespace) as other:
        for name in ("lock", "another"):
            for held in [g for g in process.engine.leases.everywhere() if g.request.key == name]:
                process.engine.run(process.engine.leases.release(held))
            wait_until(other.lock(name, block=False).acquire)
    process.stop()
    world.check()
    assert keys_in(server, namespace) == set()


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_thousand_stops_from_a_signal_handler(
    alarm: Alarm, server: Redis, namespace: str, kind: type[Tally]
) -> None:
    """As SIGTERM does it: in the middle of a call, a batch, an execution, or of another stop."""
    deadline = time.monotonic() + 240
    tried: Counter[str] = Counter()
    acknowledged: Counter[str] = Counter()
    stops = 0
    while stops < STOPS and time.monotonic() < deadline:
        process = Process(url=server.url, namespace=namespace)
        world = World(process, kind)
        calls = [*world.calls, process.stop]
        while not process.engine.stopped:
            with contextlib.suppress(ProcessStoppedError, ExceptionGroup):
                alarm.around(alarm.chance.choice(calls), process.stop)
        process.stop()
        stops += 1
        tried += world.tried
        acknowledged += world.acknowledged
    assert stops == STOPS
    world.tried, world.acknowledged = tried, acknowledged
    world.check()
    with server.client() as client:
        assert client.zcard(f"{{{namespace}}}:processes") == 0
    assert keys_in(server, namespace) == set()
