"""A program whose signal handler raises, or stops the process, in the middle of any public call.

It is a program of its own: what the handler raises must not hit pytest, a crash of the interpreter
must not end the tests, and a hang shows where all threads are. It prints what it counted as JSON.
"""

import contextlib
import faulthandler
import random
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from phonon import Admin, ConflictFreeUpdate, LruCache, Model, PhononError, Process
from phonon.errors import LockLostError, ProcessStoppedError
from phonon.fields import ID, Sum
from support.interrupted import HANG, LATEST, SOON, SOONEST, TimeLimit, main, told


class Alarm:
    """Calls with a signal handler in the middle."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a test's schedule
        self.action: Callable[[], object] | None = None
        self.came = 0
        signal.signal(signal.SIGALRM, self.handle)

    def handle(self, *_: object) -> None:
        action = self.action
        if action is not None:
            self.came += 1
            action()

    def around(self, call: Callable[[], Any], action: Callable[[], object], again: float) -> Any:
        """Call something, and let the signal come some time meanwhile, perhaps again and again."""
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            self.action = action
            signal.setitimer(signal.ITIMER_REAL, self.chance.uniform(SOONEST, LATEST), again)
            return call()
        finally:
            self.action = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()


class Tally(ConflictFreeUpdate, name="interrupted tally"):
    """Its database knows a batch that it has had by its token."""

    written: ClassVar[dict[tuple[Any, int], int]] = {}

    def execute(self) -> None:
        assert self.token is not None
        self.written[self._id, self.token] = self.doc["n"]


class Views(Model, name="interrupted views"):
    """The same as a model."""

    user: ID[str]
    n: Sum[int] = Sum()

    def on_complete(self) -> None:
        assert self.token is not None
        Tally.written[self.user, self.token] = self.n


class World:
    """A process, and what is done with it; it counts what was tried, and what was acknowledged."""

    def __init__(self, process: Process, chance: random.Random) -> None:
        self.process = process
        self.chance = chance
        self.cache: LruCache[Tally] = LruCache(max_entries=3)
        self.views = process.collect(Views, max_entries=3)
        self.reference = process.create_reference("resource")
        self.lock = process.lock("lock", timeout=1)
        self.another = process.lock("another", timeout=1)
        self.semaphore = process.semaphore("semaphore", 2, timeout=1)
        self.admin = Admin(client=process.client, namespace=process.engine.options.namespace)
        self.tried: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()
        self.calls: list[Callable[[], Any]] = [
            self.count,
            self.modify,
            self.refer,
            self.store,
            self.keep,
            self.collect,
            self.add,
            self.add_many,
            self.end,
            self.take,
            self.acquire,
            self.take_place,
            self.look,
            self.administrate,
            self.process.flush,
        ]

    def count(self) -> None:
        assert self.reference.count() <= 1

    def modify(self) -> None:
        self.tried["modified"] += 1
        self.reference.increment_times_modified()
        self.acknowledged["modified"] += 1

    def refer(self) -> None:
        reference = self.process.create_reference("another resource")
        assert reference.dereference()

    def store(self) -> None:
        record = f"record-{self.chance.randrange(4)}"
        self.tried[record] += 1
        self.cache.set(record, Tally(self.process, record, doc={"n": 1}))
        self.acknowledged[record] += 1

    def keep(self) -> None:
        self.tried["kept"] += 1
        Tally(self.process, "kept", doc={"n": 1}, init_cache=False).end_session()
        self.acknowledged["kept"] += 1

    def collect(self) -> None:
        self.tried["collected"] += 3
        with self.process.batch():
            for _ in range(3):
                self.cache.set("collected", Tally(self.process, "collected", doc={"n": 1}))
        self.acknowledged["collected"] += 3

    def add(self) -> None:
        user = f"user-{self.chance.randrange(4)}"
        self.tried[user] += 1
        self.views.add(user, n=1)
        self.acknowledged[user] += 1

    def add_many(self) -> None:
        self.tried["many"] += 3
        assert not self.views.add_many([{"user": "many", "n": 1}] * 3)
        self.acknowledged["many"] += 3

    def end(self) -> None:
        self.cache.expire_all()
        self.views.expire_all()

    def take(self) -> None:
        with self.another:
            pass

    def acquire(self) -> None:
        if self.lock.acquire():
            self.lock.release()

    def take_place(self) -> None:
        with self.semaphore:
            pass

    def look(self) -> None:
        self.process.get_registry()
        self.reference.holders()
        self.lock.locked()
        assert self.process.parked() == []

    def administrate(self) -> None:
        self.admin.processes()
        list(self.admin.sessions())

    def let_go(self) -> int:
        """Give back what a call had taken that was broken off at the very entry of its end."""
        count = 0
        for lock in (self.lock, self.another, self.semaphore):
            while lock.owned():
                lock.release()
                count += 1
        return count


def interrupt(url: str, namespace: str, seed: int, count: int, kind: str) -> dict[str, Any]:
    """Break calls off, so many times."""
    error: type[BaseException] = {"exit": KeyboardInterrupt, "limit": TimeLimit}[kind]
    alarm = Alarm(seed)
    process = Process(url=url, namespace=namespace, retry=SOON, heartbeat_interval=0.5)
    world = World(process, alarm.chance)

    def strike() -> None:
        raise error

    held: Counter[str] = Counter()
    while alarm.came < count or world.acknowledged.total() <= count / 10:
        call = alarm.chance.choice(world.calls)
        again = alarm.chance.choice((0.0, 0.0, 0.0003))
        # A call that waited for one that was broken off may be told its error.
        with contextlib.suppress(error, PhononError, ExceptionGroup):
            alarm.around(call, strike, again)
        held[call.__name__] += world.let_go()
    # Everybody else can go on, while this process lives.
    with Process(url=url, namespace=namespace) as other:
        for lock in (
            other.lock("lock", timeout=HANG / 2),
            other.lock("another", timeout=HANG / 2),
            other.semaphore("semaphore", 2, timeout=HANG / 2),
            other.semaphore("semaphore", 2, timeout=HANG / 2),
        ):
            assert lock.acquire(), (lock, lock.holders(), process.engine.leases._all)
        modified = other.create_reference("resource").modified_by().get(process.id, 0)
    faulthandler.dump_traceback_later(HANG, exit=True)
    process.stop()
    faulthandler.cancel_dump_traceback_later()
    return told(world.tried, world.acknowledged, Tally.written, modified) | {
        "held": held,
        "came": alarm.came,
    }


def stop(url: str, namespace: str, seed: int, count: int, _: str) -> dict[str, Any]:
    """Stop so many processes in the middle of a call, a batch, an execution, another stop."""
    alarm = Alarm(seed)
    tried: Counter[str] = Counter()
    acknowledged: Counter[str] = Counter()
    for _number in range(count):
        process = Process(url=url, namespace=namespace)
        world = World(process, alarm.chance)
        calls = [*world.calls, process.stop]
        while not process.engine.stopped:
            # A lock in whose block the process is stopped is lost.
            with contextlib.suppress(ProcessStoppedError, LockLostError, ExceptionGroup):
                alarm.around(alarm.chance.choice(calls), process.stop, 0.0)
        process.stop()
        tried += world.tried
        acknowledged += world.acknowledged
    for counts in (tried, acknowledged):
        del counts["modified"]
    return told(tried, acknowledged, Tally.written) | {"came": alarm.came}


if __name__ == "__main__":
    main({"interrupt": interrupt, "stop": stop})
