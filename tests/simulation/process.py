"""A simulated process: the shipped engine with all its parts, and a driver whose moves others make."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from phonon._core.engine import Engine, ProcessOptions
from phonon._core.flows import (
    CALLER_GONE,
    FLUSH,
    AwaitMail,
    Branch,
    Execute,
    Flow,
    Outcome,
    Read,
    Send,
    Sleep,
    Wait,
)
from phonon._core.identity import Identity
from phonon._core.leases import Grant, LockRequest
from phonon._core.parcels import Ending
from phonon._core.retry import RetryPolicy
from phonon._core.sources import OrderedProgress, Progress, SourceClaim, UnorderedProgress
from phonon._protocol.answers import Reply
from phonon._protocol.operations import Operation
from phonon.errors import (
    AlreadyStoredError,
    ConnectionLostError,
    PhononError,
    ServerError,
    UnknownClassError,
)
from simulation.broker import QUEUE, TOPIC, WINDOW
from support import operations

if TYPE_CHECKING:
    from simulation.world import World

INTERVAL = 10.0
LEASE_US = 40_000_000
#: A batch is parked after so many attempts.
ATTEMPTS = 3


class Idle(NamedTuple):
    """A user has nothing to do."""


class Point(NamedTuple):
    """A user is inside a lock."""

    name: str


class Until(NamedTuple):
    """A flow of the simulation's own waits for a condition."""

    condition: Callable[[], bool]


class Boom(Exception):  # noqa: N818 - the user's
    """The error of the user's code."""


class HalfDoneError(BaseException):
    """The user's code has committed, and has not returned yet."""


class Signal:
    """A driver's signal."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True


class SimFlow:
    """A flow that is under way.

    Attributes:
        effect: What it waits for.
        replies: What a `Send` or `Read` has been answered so far.
        missing: How many answers are missing.
        ready: Whether the effect has its result.
        gone: Whether its caller has given up.
        detached: Whether it waits for the outbox to go on with it.
        deadline: Until when it waits, microseconds.
        progress: Of the messages that it stores.
    """

    def __init__(self, process: "SimProcess", name: str, flow: Flow[Any]) -> None:
        self.process = process
        self.name = name
        self.flow = flow
        self.effect: Any = None
        self.replies: list[Any] = []
        self.missing = 0
        self.value: Any = None
        self.ready = True
        self.error: Exception | None = None
        self.gone = self.detached = self.ended = False
        self.parent: tuple[SimFlow, Any] | None = None
        self.deadline = 0
        self.progress: Progress | None = None

    def __repr__(self) -> str:
        return f"<{self.name}: {type(self.effect).__name__}{' ready' * self.ready}>"

    # Worker, as the engine sees it

    def is_alive(self) -> bool:
        return not self.ended

    def is_current(self) -> bool:
        return self.process.running is self

    # Ticket, as the lanes' operations see it

    def answer(self, index: int, answer: Any) -> None:
        if self.replies[index] is _NOTHING:
            self.replies[index] = answer
            self.missing -= 1
            if not self.missing:
                self.finish(list(self.replies))

    def finish(self, value: Any) -> None:
        self.value, self.ready = value, True
        if self.detached:
            self.process.engine.driver.on_ready(self)

    @property
    def is_ready(self) -> bool:
        effect = self.effect
        if not self.ready and isinstance(effect, Wait) and effect.signal.is_set:
            effect.signal.is_set = False
            self.finish(True)
        if not self.ready and isinstance(effect, Until) and effect.condition():
            self.finish(None)
        return self.ready and not self.detached

    @property
    def is_idle(self) -> bool:
        return isinstance(self.effect, Idle) and not self.ready

    @property
    def is_background(self) -> bool:
        """Return whether it never had a caller."""
        return not self.name.startswith(("user", "branch", "stop"))


class Ticket:
    """The owner of the operations of one `Send`. It does not answer a flow's later effects."""

    def __init__(self, task: SimFlow) -> None:
        self.task = task
        self.effect = task.effect

    def answer(self, index: int, answer: Any) -> None:
        if self.task.effect is self.effect and not self.task.ended:
            self.task.answer(index, answer)


class Driver:
    """The driver: flows are tasks, and a move of the simulation's carries out one of their effects."""

    def __init__(self, process: "SimProcess", identity: Identity) -> None:
        self._process = process
        self._world = process.world
        # From here on the identity has the simulation's clock and ids.
        identity.clock = self._world.clock
        identity.new_id = process.new_id
        identity.begin()

        self.on_detached: Callable[[SimFlow], None] = lambda _: None
        self.on_ready: Callable[[SimFlow], None] = lambda _: None

    @staticmethod
    def detached_ready(task: SimFlow) -> bool:
        return task.ready

    @staticmethod
    def resume(task: SimFlow) -> None:
        task.detached = False

    def signal(self) -> Signal:
        return Signal()

    def local(self) -> SimpleNamespace:
        return SimpleNamespace()

    def spawn(self, flow: Flow[Any], name: str) -> SimFlow:
        return self._process.spawn(name.split("-")[1] if "-" in name else name, flow)

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        function(*arguments)

    def deliver(self, operation: Operation, answer: Any) -> None:
        self._process.deliver(operation, answer)


class Parcel:
    """Local data of one user."""

    def __init__(self, resource: str, items: Sequence[bytes], *, forced: bool = False) -> None:
        self.resource_id = resource
        self.items = list(items)
        self.forced = forced

    def take(self) -> bytes | None:
        items, self.items = self.items, []
        return b",".join(items) or None

    def take_last(self) -> tuple[bytes | None, Any]:
        return self.take(), None

    def put_back(self, partial: bytes) -> None:
        self.items = partial.split(b",") + self.items


class Instance:
    """Executes a batch."""

    def __init__(self, record: "Record", token: int) -> None:
        self.record = record
        self.token = token

    def execute(self) -> None:
        self.record.process.world.user_code(self.record.process, [self])


class Many:
    """A class that executes many at once."""

    def __init__(self, process: "SimProcess") -> None:
        self._process = process

    def execute_many(self, instances: list[Instance]) -> Any:
        return self._process.world.user_code(self._process, instances)


class Record:
    """The record of a batch."""

    def __init__(self, process: "SimProcess", resource: str, items: list[bytes]) -> None:
        self.process = process
        self.resource = resource
        self.items = items
        self.group_class = process.many if resource in process.world.together else None
        self.instance: Instance | None = None

    def begin(self, token: int) -> Instance:
        self.instance = Instance(self, token)
        return self.instance

    def finish(self) -> None:
        pass


class Codec:
    """Partials are item ids, joined by commas. A resource's class is its only one."""

    def __init__(self, process: "SimProcess") -> None:
        self._process = process

    def records(self, resource: str, partials: Sequence[bytes], local: Any) -> Sequence[Record]:
        name = self._process.world.class_of(resource)
        if name not in self._process.knows:
            raise UnknownClassError(f"{name} is not known", name)
        items = [item for partial in partials for item in partial.split(b",")]
        return [Record(self._process, resource, items)]

    def kept(self, resource: str, partial: bytes, local: Any, content: Any) -> Sequence[Record]:
        return self.records(resource, (partial,), local)

    def merge(self, resource: str, partials: Sequence[bytes]) -> list[bytes]:
        return [b",".join(partials)]

    def can_execute(self, class_name: str) -> bool:
        return class_name in self._process.knows


class SimProcess:
    """One process of the world.

    Args:
        world: Where it lives.
        name: Its name in moves; its ids begin with it.
        recovers: Whether it executes the batches of the dead.
        knows: The classes that it knows.
        users: How many threads call it.
    """

    def __init__(
        self, world: "World", name: str, recovers: bool, knows: Sequence[str], users: int
    ) -> None:
        self.world = world
        self.name = name
        self.recovers = recovers
        self.knows = tuple(knows)
        self.tasks: dict[str, SimFlow] = {}
        self.running: SimFlow | None = None
        self.killed = self.stopped = self.stopping = False
        self.ids = 0
        self.items = 0
        self.known_ids: list[bytes] = []
        self.granted: list[Grant] = []
        self.claim: SourceClaim | None = None
        self.offset = 0
        self.reading = 0
        self.errors: list[Exception] = []
        self.replies: list[tuple[Any, Any, Any]] = []
        self.many = Many(self)
        options = ProcessOptions(
            namespace="s",
            partitions=world.count,
            heartbeat_interval=INTERVAL,
            recovers=recovers,
            retry=RetryPolicy(attempts=ATTEMPTS, first_delay=0.004, jitter=0.0, crashes=30),
            max_backlog=1_000_000,
            overflow="raise",
        )
        self.engine = Engine(
            options,
            lambda: self,
            world.library,
            lambda identity: Driver(self, identity),
            lambda _: Codec(self),
            on_error=self.on_error,
            address="simulated",
            client=None,
        )
        self.engine.outbox._clock = world.clock
        self.spawn("boot", self._boot(users))

    @property
    def identity(self) -> Identity:
        return self.engine.identity

    @property
    def alive(self) -> bool:
        return not (self.killed or self.stopped)

    @property
    def held(self) -> dict[str, Any]:
        return self.engine.members.held

    def new_id(self) -> str:
        self.ids += 1
        name = f"{self.name}{self.ids}"
        self.known_ids.append(name.encode())
        self.world.owner_of[name.encode()] = self
        return name

    def new_item(self, resource: str) -> bytes:
        self.items += 1
        return f"{resource}-{self.name}{self.items}".encode()

    def on_error(self, error: Exception) -> None:
        self.errors.append(error)
        self.world.checks.reported(self, error)

    # Tasks

    def spawn(self, name: str, flow: Flow[Any]) -> SimFlow:
        number = ""
        while f"{name}{number}" in self.tasks:
            number = str(int(number or 1) + 1)
        task = self.tasks[f"{name}{number}"] = SimFlow(self, f"{name}{number}", flow)
        return task

    def go(self, task: SimFlow) -> None:
        """Go on with a task that has its result, up to its next effect that has to be carried out."""
        outer, self.running = self.running, task
        value, task.value, task.ready = task.value, None, False
        error, task.error = task.error, None
        try:
            while True:
                try:
                    if error is None:
                        effect = task.flow.send(value)
                    else:
                        effect, error = task.flow.throw(error), None
                except StopIteration as stop:
                    self._ended(task, Outcome(stop.value))
                    return
                except PhononError as raised:
                    self._ended(task, Outcome(error=raised))
                    self.world.checks.task_failed(self, task, raised)
                    return
                task.effect = effect
                if isinstance(effect, Send):
                    effect.make_all()
                if effect is CALLER_GONE:
                    value = task.gone
                elif isinstance(effect, Send) and not effect.operations:
                    value = []
                elif task.gone and isinstance(effect, AwaitMail | Sleep | Wait):
                    value = False
                else:
                    self._begin(task, effect)
                    return
        finally:
            self.running = outer

    def _ended(self, task: SimFlow, outcome: Outcome) -> None:
        task.ended = True
        if task.parent is not None:
            parent, branch = task.parent
            if parent.effect is branch and not parent.ended:
                parent.finish(outcome)
        if self.tasks.get(task.name) is task:
            del self.tasks[task.name]

    def _begin(self, task: SimFlow, effect: Any) -> None:
        if isinstance(effect, Send):
            task.replies = [_NOTHING] * len(effect.operations)
            task.missing = len(effect.operations)
            ticket = Ticket(task)
            lanes = self.identity.lanes
            for index, operation in enumerate(effect.operations):
                operation.owner, operation.index = ticket, index
                self.world.checks.sent(self, operation)
                lanes[operation.partition].enqueue(operation, first=effect.first)
        elif isinstance(effect, Read):
            task.replies = []
        elif isinstance(effect, AwaitMail | Wait | Sleep):
            task.deadline = self.world.server.now + math.ceil(effect.seconds * 1_000_000) + 1
        elif isinstance(effect, Branch):
            branch = self.spawn("branch", effect.flow)
            branch.gone, branch.parent = True, (task, effect)
        elif isinstance(effect, Execute):
            self.world.checks.begin(self, task)
        elif effect is FLUSH or (isinstance(effect, Until) and effect.condition()):
            task.finish(None)

    def deliver(self, operation: Operation, answer: Any) -> None:
        """Give an operation its answer."""
        if type(answer) is list and operation.count > 1:
            answer = list(map(_explained, answer))
        else:
            answer = _explained(answer)
        self.world.checks.told(self, operation, answer)
        if operation.owner is not None:
            operation.owner.answer(operation.index, answer)

    def detach(self, task: SimFlow) -> None:
        """The caller of a task has given up."""
        task.gone = True
        if task.progress is not None:
            task.progress.failed()
        if task.name.startswith("stop"):
            # `Process.stop` raises; what it has not brought to its end is left to survivors.
            self.engine.close()
            self.stopped = True
            self.world.checks.drop(self)
            self.world.seen["stops in vain"] += 1
            return
        if isinstance(task.effect, AwaitMail | Sleep | Wait):
            task.finish(False)
        elif isinstance(task.effect, Send):
            lost = ConnectionLostError("simulated does not answer")
            if task.is_background:
                # Nothing else would go on with it, so it is told.
                task.error = lost
                task.finish(None)
                return
            if task.parent is not None:
                parent, branch = task.parent
                if parent.effect is branch and not parent.ended:
                    parent.finish(Outcome(error=lost))
            task.detached = not task.ready
            self.engine.driver.on_detached(task)

    # Its actions

    def _boot(self, users: int) -> Flow[None]:
        while not self.identity.lanes:
            try:
                yield from self.engine.starting()
            except PhononError:
                self.world.seen["start tried again"] += 1
        self.engine.start_heartbeat()
        for number in range(users):
            self.spawn(f"user{number}", self._user())

    def _user(self) -> Flow[None]:
        while True:
            act, arguments = yield Idle()  # type: ignore[misc]  # an effect of the simulation's own
            try:
                yield from act(*arguments)
            except PhononError as error:
                self.world.seen[f"user told {type(error).__name__}"] += 1
            if self.running is not None and self.running.gone:
                # A new caller takes the place of the one that gave up.
                self.running.gone = False

    def join(self, resource: str) -> Flow[None]:
        yield from self.engine.members.join(resource)

    def modify(self, resource: str) -> Flow[None]:
        yield from self.engine.members.modify(resource)

    def meet(self, resource: str, parties: int) -> Flow[None]:
        yield from self.engine.members.meet(resource, parties)

    def wait(self, resource: str) -> Flow[None]:
        met = yield from self.engine.members.wait_for_parties(resource, 0.05)
        self.world.seen[f"parties {'met' if met else 'waited for in vain'}"] += 1

    def append(self, *resources: str) -> Flow[None]:
        parcels = [Parcel(r, [self.new_item(r)]) for r in resources]
        items = {p.resource_id: list(p.items) for p in parcels}
        errors = yield from self.engine.outbox.store(parcels)
        if not errors:
            for resource, some in items.items():
                self.world.checks.acknowledged(self, resource, some)

    def leave(self, resources: Sequence[str], data: bool, force: bool) -> Flow[None]:
        endings, items = [], []
        for resource in resources:
            if resource not in self.held and not data:
                continue
            some = [self.new_item(resource)] if data else []
            items.append(some)
            parcel = Parcel(resource, some) if data else None
            endings.append(Ending(resource, parcel, force, modifications=bool(self.items % 2)))
        results = yield from self.engine.outbox.end(endings)
        for ending, some, result in zip(endings, items, results, strict=True):
            if result.sent:
                self.world.checks.acknowledged(self, ending.resource, some)
                self.world.seen["told last" if result.last else "told not last"] += 1

    def lock(
        self,
        resource: str,
        seconds: float | None,
        shared: bool,
        lease: float | None,
    ) -> Flow[None]:
        partition, name = self.engine.members.place(resource)
        request = LockRequest(resource, partition, name, shared=shared, lease=lease)
        leases, checks = self.engine.leases, self.world.checks
        owner = object()
        grant = yield from leases.acquire(request, seconds, owner, lambda _: None)
        if not isinstance(grant, Grant):
            self.world.seen["lock not granted"] += 1
            return
        self.granted.append(grant)
        checks.beliefs()
        for point in ("inside", "still inside"):
            yield Point(point)  # type: ignore[misc]  # an effect of the simulation's own
            if grant.is_ours:
                checks.write(self, grant)
        self.granted.remove(grant)
        had = grant.is_ours
        while True:
            try:
                released = yield from leases.release(grant)
                break
            except ServerError:
                if self.running is not None and self.running.gone:
                    raise  # nobody is there to release it again
                self.world.seen["release tried again"] += 1
        if had and not released and grant.is_ours:
            checks.lock_gone(self, grant)

    def replay(self, resource: str, token: int, discard: bool) -> Flow[None]:
        """Do what `Process.replay` does with a parked batch."""
        partition, name = self.engine.members.place(resource)
        if discard:
            (answer,) = yield Send((operations.discard(partition, name, token),))
            if answer == Reply.DISCARDED:
                self.world.checks.discarded(resource, token)
            return
        (answer,) = yield Send((operations.replay(partition, name, token),))
        if isinstance(answer, list) and answer[0] == Reply.RUN:
            self.world.seen["replayed"] += 1
            self.engine.outbox.take_over(partition, name, answer[3], 0.0)

    def consume(self, count: int, again: int, piece: int) -> Flow[None]:
        """Read messages of the topic, some of them again, as `Source.batch` does."""
        sources, broker = self.engine.sources, self.world.broker
        if self.claim is None or self.claim.in_doubt:
            self.claim = yield from sources.claim(TOPIC)
            self.offset = self.claim.position or 0
        # It reads on, whatever became of the messages before, as the broker's client does. Another
        # thread is given messages that are not stored yet.
        offset = (self.claim.position or 0) if self.reading else self.offset
        numbers = range(max(0, offset - again), max(0, offset - again) + count)
        self.offset = max(self.offset, numbers.stop)
        broker.produced = max(broker.produced, numbers.stop)
        self.world.seen["messages again"] += again > 0
        self.reading += 1
        try:
            yield from self._ingest(OrderedProgress(self.claim), TOPIC, numbers, piece)
        finally:
            self.reading -= 1

    def settle(self) -> Flow[None]:
        """Move the topic on in all partitions, as `Source.settle` does."""
        if self.claim is not None and not self.claim.in_doubt and self.claim.is_behind:
            yield from self.engine.sources.move_on(self.claim)

    def take(self, numbers: Sequence[int], piece: int) -> Flow[None]:
        """Store messages of the queue, as the loops of `phonon.sources` do."""
        broker, running = self.world.broker, self.running
        broker.queued = max(broker.queued, *(n + 1 for n in numbers))
        for _ in range(3):
            ids = self.engine.sources.ids(QUEUE, WINDOW)
            errors = yield from self._ingest(UnorderedProgress(ids), QUEUE, numbers, piece)
            if not any(isinstance(error, AlreadyStoredError) for error in errors):
                break
        if not errors and running is not None and not running.gone:
            broker.acknowledged.update(numbers)

    def _ingest(
        self, progress: Progress, kind: str, numbers: Sequence[int], piece: int
    ) -> Flow[list[BaseException]]:
        """Store what messages bring, a few of them at a time, as a batch of messages does."""
        running = self.running
        assert running is not None
        running.progress = progress
        try:
            parcels: dict[str, Parcel] = {}
            for place, number in enumerate(numbers):
                if piece and place and place % piece == 0:
                    errors = yield from self.engine.sources.ingest(progress, [*parcels.values()])
                    parcels.clear()
                    if errors:
                        return errors
                if not progress.begin(number if kind == TOPIC else f"{QUEUE}{number}"):
                    continue
                for resource, item in self.world.broker.brings(kind, number):
                    partition, _ = self.engine.members.place(resource)
                    if not (progress.asks and progress.skips(partition)):
                        parcels.setdefault(resource, Parcel(resource, [])).items.append(item)
            errors = yield from self.engine.sources.ingest(progress, [*parcels.values()])
        finally:
            running.progress = None
        self.world.seen[f"messages {'refused' if errors else 'stored'}"] += 1
        return errors

    def stop(self) -> Flow[None]:
        """Stop as `Process.stop` does, when its callers have come back."""
        self.stopping = True
        yield Until(lambda: all(t.is_idle for t in self.users()))  # type: ignore[misc]
        try:
            self.errors_of_stop = yield from self.engine.stopping()
        finally:
            self.engine.close()
            self.stopped = True
            self.world.seen["stops"] += 1

    def users(self) -> Iterator[SimFlow]:
        return (t for t in list(self.tasks.values()) if t.name.startswith("user"))


_NOTHING: Any = object()
log = logging.getLogger("phonon")


def _explained(answer: Any) -> Any:
    if type(answer) is list and answer[0] == Reply.FAILED:
        return ServerError(f"simulated answered: {answer[1].decode()}")
    return answer
