"""Simulated processes that run the protocol's flows over a real server, one step at a time.

A process has *tasks*: its user's threads, its heartbeat, its recovery. Each is a generator that
waits for one thing at a time: an answer, the user's code, a wake-up, its turn with a resource. A
scheduler chooses which `Move` comes next, from `World.moves` or of its own making. What a process
does between two moves touches nothing but its own memory.
"""

import itertools
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from sim_checks import Violation, Witness, places_of
from sim_link import Link

from phonon.errors import (
    ConnectionLostError,
    DeclaredDeadError,
    PhononError,
    ServerError,
    StaleOperationError,
    UnknownClassError,
)
from phonon.protocol import (
    compaction,
    heirs,
    locks,
    parking,
    processes,
    recovery,
    references,
    updates,
)
from phonon.protocol.effects import Call, Execute, Flow, Outcome, Participant, Wait
from phonon.protocol.keys import Keys
from phonon.protocol.locks import Wish
from phonon.protocol.messages import Batch
from phonon.protocol.updates import Ended, Failure, RetryPolicy

T = TypeVar("T")
Steps = Generator[Any, Any, T]

#: How long a process lives without a beat, a membership, and a lock; milliseconds.
TTL = 40_000
#: Time for all to beat, one after the other, before the first of them would be taken for dead.
BEATS = 50
LEASE = 900_000
LOCK_LEASE = 600_000
POLICY = RetryPolicy(attempts=2, first_delay=1.0, jitter=0.0)
NAMESPACE = "sim"
CARD: dict[str, str | int] = {"host": "h", "pid": 1, "start": "0", "version": "0"}
#: A simulation that goes on for longer does not end.
MOST_STEPS = 20_000

#: What becomes of a call: it is answered; its reply or itself is lost, and it is repeated; it
#: arrives twice; its caller gives up, whether it has arrived or not. What becomes of user code.
OK, DEAF, LOST, TWICE, GIVEN_UP, GIVEN_UP_UNSENT = (
    "ok",
    "deaf",
    "lost",
    "twice",
    "gave up",
    "unsent",
)
RAISES = "raises"
#: Its caller is cancelled, after or before a call has arrived. What is kept goes on without him.
CANCELLED, CANCELLED_UNSENT = "cancelled", "cancelled unsent"
#: What a task waits for while it does not.
RUNNING = "running"


@dataclass(slots=True)
class Turn:
    """A task wants to talk about a resource; one task of a process at a time does."""

    base: bytes


@dataclass(slots=True)
class Point:
    """Something happens outside of the server, in one step."""

    name: str
    base: bytes
    function: Callable[[], Any]


class Move(NamedTuple):
    """What happens next.

    Attributes:
        who: The process.
        task: The number of its task; -1 if it is about the process.
        fate: What becomes of what the task waits for; or kill, pause, beat.
    """

    who: str
    task: int
    fate: str = OK


class Parcel:
    """The local data of a process about a resource: unsent, or on its way."""

    def __init__(self, label: str) -> None:
        self.label = label.encode()
        self.unsent: list[bytes] = []
        self.sent: list[bytes] = []

    def take(self) -> bytes | None:
        if not self.unsent:
            return None
        taken, self.unsent = self.unsent, []
        self.sent += taken
        return self.label + b"|" + b",".join(taken)

    def put_back(self, partial: bytes) -> None:
        items = partial.partition(b"|")[2].split(b",")
        self.sent = [item for item in self.sent if item not in items]
        self.unsent = items + self.unsent


def watched(flow: Flow[T], calls: list[Call]) -> Flow[T]:
    """A flow, of which the calls are noted."""
    try:
        effect = next(flow)
        while True:
            if isinstance(effect, Call):
                calls.append(effect)
            try:
                reply = yield effect
            except PhononError as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


class SimRunner(NamedTuple):
    """As `phonon.execution.Execution`."""

    process: "SimProcess"
    me: Participant
    base: bytes

    def __call__(self, batch: Batch) -> None:
        for partial in batch.partials:
            label = partial.partition(b"|")[0].decode()
            if label not in self.process.knows:
                raise UnknownClassError(f"{label} is not imported", label)
        world = self.process.world
        if world.raising:
            raise RuntimeError("no database")
        world.witness.execute(self.me.id, self.base, batch)

    def merge(self, partials: list[bytes]) -> list[bytes]:
        return self.process.merge(partials)


@dataclass(eq=False)
class Task:
    """A generator of a process, and what it waits for."""

    number: int
    name: str
    steps: Steps[Any]
    turn: bytes = b""
    effect: Any = None
    outcome: Outcome | None = None
    stuck: bool = False
    delivered: bool = False
    #: Has its caller do something else, while it goes on.
    leave_alone: Callable[[], None] | None = None

    def advance(self, reply: Any = None) -> None:
        self.outcome, self.stuck, self.delivered = None, False, False
        self.effect = RUNNING
        try:
            if isinstance(reply, BaseException):
                self.effect = self.steps.throw(reply)
            else:
                self.effect = self.steps.send(reply)
        except (StopIteration, CancelledError):
            self.effect = None
        except PhononError as error:
            raise Violation(f"unexpected: {self.name} raised {error!r}") from error


class SimProcess:
    """A simulated process; what it does is what `phonon.engine.Engine` does.

    Args:
        world: Where it lives.
        name: Its name. Its ids are that, and with every rebirth another one.
        label: The class of its data.
        knows: The classes whose batches it can execute.
    """

    def __init__(self, world: "World", name: str, label: str, knows: frozenset[str]) -> None:
        self.world = world
        self.name = name
        self.label = label
        self.knows = knows
        self.me = world.identity(name)
        self.epoch = b""
        self.numbers = itertools.count(1)
        self.names = itertools.count(2)
        self.holders = itertools.count(1)
        self.busy: set[bytes] = set()
        self.tasks: list[Task] = []
        self.task_numbers = itertools.count()
        self.parcels: dict[bytes, Parcel] = {}
        self.held: dict[bytes, None] = {}
        #: What this process believes to hold, and until when by its own clock.
        self.locks: dict[str, tuple[bytes, int]] = {}
        #: Until when it is sure that nobody has declared it dead.
        self.lives_until = world.link.offset + TTL
        self.former: list[str] = []
        self.dying: dict[str, None] = {}
        self.recovering = False
        self.retries: list[tuple[bytes, int]] = []
        self.sent: deque[Call] = deque(maxlen=6)
        self.killed = False
        self.gone = False

    @property
    def doomed(self) -> bool:
        """Whether it counts as dead under its present id."""
        return self.me.id in self.world.witness.dead

    # -- tasks

    def spawn(self, name: str, steps: Steps[Any]) -> Task:
        task = Task(next(self.task_numbers), name, steps)
        self.tasks.append(task)
        task.advance()
        self.settle()
        return task

    def settle(self) -> None:
        """Whoever waits for a turn that is free takes it; who has ended is forgotten."""
        again = True
        while again:
            again = False
            for task in self.tasks:
                effect = task.effect
                if isinstance(effect, Turn) and effect.base not in self.busy:
                    self.busy.add(effect.base)
                    task.turn = effect.base
                    task.advance()
                    again = True
                elif task.outcome is not None and task.turn not in self.busy:
                    # Execution is over: the flow is told when it has its resource back.
                    if self.world.fine:
                        continue
                    self.end_execution(task)
                    again = True
        self.tasks = [task for task in self.tasks if task.effect is not None]

    def end_execution(self, task: Task) -> None:
        self.busy.add(task.turn)
        task.advance(task.outcome)

    def turn(self, base: bytes, flow: Steps[T]) -> Steps[T]:
        yield Turn(base)
        try:
            return (yield from flow)
        finally:
            self.busy.discard(base)

    # -- identity, as in the engine

    def living(self, flow: Callable[[Participant], Flow[T]]) -> Steps[T]:
        while True:
            me = self.me
            try:
                return (yield from flow(me))
            except DeclaredDeadError:
                self.world.witness.seen["refused as dead"] += 1
                yield from self.be_reborn(me)

    def be_reborn(self, old: Participant) -> Steps[None]:
        if self.me is not old:
            return
        new = self.world.identity(f"{self.name}{next(self.names)}")
        begun = self.world.link.offset
        beat = yield from processes.enrol(new, CARD, TTL)
        if self.world.link.offset - begun > TTL - BEATS:  # it may be too late already
            self.world.witness.dead.add(new.id)
        if self.me is not old:
            yield from processes.resign(new)
            return
        self.world.witness.seen["reborn"] += 1
        self.me = new
        self.lives_until = begun + TTL
        self.former.append(old.id.decode())
        self.epoch = beat.epoch
        self.locks.clear()
        for base in self.held:
            self.spawn("rejoin", self.rejoining(base))
        self.recover([old.id.decode(), *beat.dead])

    def rejoining(self, base: bytes) -> Steps[None]:
        if base in self.held:
            try:
                yield from self.join(base)
            except ConnectionLostError:
                self.held[base] = None

    def beat(self) -> Steps[None]:
        me, begun = self.me, self.world.link.offset
        beat = yield from processes.beat(me, TTL, self.epoch)
        if beat.kind == "forgotten":
            raise Violation("G8: a process was forgotten")
        if beat.kind == "dead":
            self.world.witness.seen["beat found it dead"] += 1
            yield from self.be_reborn(me)
        else:
            self.lives_until = max(begun + TTL, self.lives_until)
        for base in {**self.held, **{base: None for base, _ in self.locks.values()}}:
            mine = [holder for holder, (each, _) in self.locks.items() if each == base]
            now = self.world.link.offset
            wanted = [(holder, LOCK_LEASE) for holder in mine]
            _, *renewed = yield from references.renew(self.me, base, wanted)
            for holder, ours in zip(mine, renewed, strict=True):
                if holder in self.locks and ours:
                    self.locks[holder] = base, max(now + LOCK_LEASE, self.locks[holder][1])
                elif not ours:
                    self.locks.pop(holder, None)
        self.recover(beat.dead)

    # -- operations, as the public objects do them

    def parcel(self, base: bytes) -> Parcel:
        if base not in self.parcels:
            self.parcels[base] = Parcel(self.label)
        return self.parcels[base]

    def join(self, base: bytes) -> Steps[None]:
        yield from self.turn(base, self.living(lambda me: references.join(me, base)))
        self.held.setdefault(base)

    def meet(self, base: bytes, parties: int) -> Steps[None]:
        yield from self.turn(base, self.living(lambda me: references.meet(me, base, parties)))
        self.held.setdefault(base)

    def modify(self, base: bytes) -> Steps[None]:
        yield from self.turn(base, self.living(lambda me: references.modify(me, base)))
        self.held.setdefault(base)

    def add(self, base: bytes) -> None:
        """Local data, that nobody else has yet."""
        self.parcel(base).unsent.append(self.world.item(self, base))

    def append(self, base: bytes, *, keep: bool = True) -> Steps[None]:
        """Store local data; there is some more."""
        self.add(base)
        parcel = self.parcel(base)
        flow = self.living(lambda me: updates.append(me, base, parcel, keep=keep))
        try:
            yield from self.turn(base, flow)
        except (ConnectionLostError, CancelledError):
            if not keep:
                # Its caller knows no more than that it may be stored, and must not send it again.
                parcel.unsent.clear()
                parcel.sent.clear()
            raise
        self.held.setdefault(base)
        self.acknowledge(base)

    def leave(self, base: bytes, *, force: bool = False) -> Steps[Ended]:
        """Leave, with the local data."""
        opened = base in self.held
        self.held.pop(base, None)
        parcel = self.parcel(base)

        def left(me: Participant) -> Flow[Ended]:
            run = self.runner(me, base)
            calls: list[Call] = []
            flow = updates.leave(me, base, run, POLICY, parcel, force=force)
            ended = yield from watched(flow, calls)
            number = next(call.number for call in calls if call.step == "leave")
            told = self.world.witness.told[me.id, base, number]
            if ended.last != told:
                raise Violation(f"G2: {me.id!r} is told last={ended.last}, should be {told}")
            return ended

        try:
            ended = yield from self.turn(base, self.living(left))
        except PhononError:
            if opened:
                self.held.setdefault(base)
            raise
        self.acknowledge(base)
        self.after(base, ended.failures, ended.lost)
        return ended

    def acknowledge(self, base: bytes) -> None:
        parcel = self.parcel(base)
        self.world.witness.acknowledged.update(parcel.sent)
        parcel.sent.clear()

    def after(self, base: bytes, failures: Iterable[Failure], lost: Iterable[int]) -> None:
        for failure in failures:
            self.world.witness.seen[f"failure {failure.fate}"] += 1
            if failure.retry_in is not None:
                self.retries.append((base, failure.token))
        self.world.witness.seen["executed in vain"] += len(list(lost))

    def retry(self, base: bytes, token: int) -> Steps[None]:
        me = self.me
        flow = updates.retry(me, base, token, self.runner(me, base), POLICY)
        _, failures, lost = yield from self.turn(base, flow)
        self.after(base, failures, lost)

    def runner(self, me: Participant, base: bytes) -> "SimRunner":
        return SimRunner(self, me, base)

    def wish(self, base: bytes, *, shared: bool, places: int) -> Wish:
        number = next(self.holders)
        name = locks.name_of(self.me.id.decode(), number, shared=shared, places=places)
        return Wish(base, name, LOCK_LEASE)

    def lock(
        self,
        base: bytes,
        *,
        queue: bool = True,
        patient: bool = True,
        shared: bool = False,
        places: int = 0,
        extend: bool = False,
    ) -> Steps[None]:
        """Take the lock, do two things under it, release it. Who is not patient gives up."""
        me, wish = self.me, self.wish(base, shared=shared, places=places)
        try:
            while True:
                asked = self.world.link.offset
                try:
                    answer = yield from self.turn(base, locks.acquire(me, wish, queue=queue))
                except DeclaredDeadError:
                    yield from self.turn(base, self.be_reborn(me))
                    me, wish = self.me, self.wish(base, shared=shared, places=places)
                    continue
                except ConnectionLostError:
                    # We may have the lock, or a place in line.
                    yield from self.turn(base, locks.release(me, base, wish.holder))
                    return
                if answer.kind == "granted":
                    break
                if answer.kind == "wait" and not patient:
                    yield from self.turn(base, locks.release(me, base, wish.holder))
                if answer.kind == "busy" or not patient:
                    return
                yield from locks.wait(base, wish.holder, answer.number / 1000)
            yield from self.inside(me, wish, answer.number, asked, extend=extend)
        except CancelledError:
            # As above. Somebody else sees to it: who was cancelled is gone.
            self.locks.pop(wish.holder, None)
            self.spawn("clean up", self.turn(base, locks.release(me, base, wish.holder)))
            raise

    def inside(
        self, me: Participant, wish: Wish, token: int, asked: int, *, extend: bool
    ) -> Steps[None]:
        """Do two things under a lock that was granted."""
        if me is self.me:
            self.locks[wish.holder] = wish.base, asked + LOCK_LEASE
            self.world.check_beliefs(wish.base)
        for name in ("first", "last"):
            yield Point(name, wish.base, self.use(me, wish, token))
            if extend and wish.holder in self.locks:
                yield from self.turn(wish.base, self.extending(wish.base, wish.holder))
        self.locks.pop(wish.holder, None)
        yield from self.turn(wish.base, locks.release(me, wish.base, wish.holder))

    def extending(self, base: bytes, holder: str) -> Steps[None]:
        """As `Lock.extend`."""
        now = self.world.link.offset
        renewed = yield from references.renew(self.me, base, [(holder, 2 * LOCK_LEASE)])
        if holder in self.locks and renewed[1]:
            self.locks[holder] = base, now + 2 * LOCK_LEASE

    def use(self, me: Participant, wish: Wish, token: int) -> Callable[[], Any]:
        """What somebody does who has a lock."""
        witness, shared = self.world.witness, locks.is_shared(wish.holder)
        return lambda: None if shared else witness.write(me.id, wish.base, token)

    def believes(self, until: int) -> bool:
        """What `Lock.owned` says."""
        return self.world.link.offset < min(until, self.lives_until)

    def compact(self, base: bytes) -> Steps[None]:
        """Merge what there is, as a process does that has just stored the last of many."""
        flow = compaction.compact(self.me, base, compaction.COMPACT_AT, self.merge)
        if (yield from self.turn(base, flow)):
            self.world.witness.seen["merged"] += 1

    def merge(self, partials: list[bytes]) -> list[bytes]:
        """As `phonon.partials.merge_stored`."""
        if self.world.raising:
            raise RuntimeError("they do not add up")
        merged: dict[bytes, list[bytes]] = {}
        for i, partial in enumerate(partials):
            label, _, items = partial.partition(b"|")
            known = label.decode() in self.knows
            merged.setdefault(label if known else b"%d" % i, [label]).append(items)
        return [label + b"|" + b",".join(items) for label, *items in merged.values()]

    # -- taking over, as in `phonon.takeover`

    def recover(self, dead: Iterable[str]) -> None:
        """Take over from dead processes, beside whatever else is done."""
        self.dying.update(dict.fromkeys(dead))
        if self.dying and not self.recovering:
            self.recovering = True
            self.spawn("recovery", self.take_over())

    def take_over(self) -> Steps[None]:
        while self.dying:
            dead, self.dying = self.dying, {}
            for process_id in dead:
                if process_id == self.me.id.decode():
                    continue
                class_name = heirs.inherits(process_id)
                if class_name is None or class_name in self.knows:
                    yield from self.take_over_one(process_id)
        self.recovering = False

    def take_over_one(self, dead: str) -> Steps[None]:
        while True:
            claim = yield from self.turn(b"recovery", recovery.claim(self.me, dead))
            if not claim.bases:
                if not claim.left:
                    yield from self.turn(b"recovery", recovery.bury(self.me, dead))
                return
            for base in claim.bases:
                yield from self.turn(base, self.recover_one(base, dead))

    def recover_one(self, base: bytes, dead: str) -> Steps[None]:
        recovered = yield from self.living(
            lambda me: recovery.recover(me, base, dead, self.runner(me, base), POLICY)
        )
        if recovered.retry_in is not None and recovered.token is not None:
            self.retries.append((base, recovered.token))
        self.after(base, recovered.failures, recovered.lost)

    # -- the end, as in `Engine.stop`

    def stop(self) -> Steps[None]:
        """End everything and disappear. Nothing fails any more."""
        for process_id in self.former:
            yield from self.take_over_one(process_id)
        held = {*(yield from processes.registry(self.me)), *self.held}
        held.update(base for base, parcel in self.parcels.items() if parcel.unsent)
        for base in sorted(held):
            yield from self.leave(base)
        while self.retries:
            yield from self.retry(*self.retries.pop())
        if (yield from processes.registry(self.me)):
            yield from processes.beat(self.me, 0, self.epoch)
            self.world.witness.dead.add(self.me.id)
            self.world.witness.seen["stopped with batches left"] += 1
        else:
            yield from processes.resign(self.me)
        self.gone = True


@dataclass
class World:
    """Processes, and the server between them.

    Args:
        link: The server.
        colocated: Whether steps keep the registries, as on one server, or flows, as in a cluster.
        fine: Whether the end of user code is a move of its own. It touches nothing of others, so
            that who looks at all interleavings does without.
    """

    link: Link
    colocated: bool = True
    fine: bool = False
    keys: Keys = field(default_factory=lambda: Keys(NAMESPACE))
    processes: dict[str, SimProcess] = field(default_factory=dict)
    trace: list[tuple[Any, ...]] = field(default_factory=list)
    raising: bool = False
    ending: bool = False
    checking: bool = True
    disturbed: bool = False
    steps: int = 0

    def __post_init__(self) -> None:
        self.link.reset()
        self.witness = Witness(self.link, self.keys.base("")[: -len(b"{=}")])
        self.items = itertools.count(1)

    def identity(self, name: str) -> Participant:
        return Participant(name, self.keys, LEASE, colocated=self.colocated)

    def item(self, process: SimProcess, base: bytes) -> bytes:
        return f"{self.keys.resource(base)}-{process.name}{next(self.items)}".encode()

    def base(self, resource: str) -> bytes:
        return self.keys.base(resource)

    def check_beliefs(self, base: bytes) -> None:
        """Of those who are sure that they hold a lock, none is in another's way."""
        inside = [
            holder
            for process in self.processes.values()
            if not process.killed
            for holder, (each, until) in process.locks.items()
            if each == base and process.believes(until)
        ]
        limit = min(map(places_of, inside), default=1)
        if len(inside) > limit:
            raise Violation(f"G13: {inside} believe to hold {base!r} together")

    def start(self, name: str, label: str = "K", knows: Iterable[str] = ("K",)) -> SimProcess:
        process = SimProcess(self, name, label, frozenset(knows))
        self.processes[name] = process
        process.epoch = self.direct(processes.enrol(process.me, CARD, TTL)).epoch
        return process

    def direct(self, flow: Flow[T]) -> T:
        """Run a flow of plain calls at once."""
        try:
            effect = next(flow)
            while True:
                assert isinstance(effect, Call)
                effect = flow.send(self.link.call(effect))
        except StopIteration as stop:
            result: T = stop.value
            return result

    @property
    def living(self) -> list[SimProcess]:
        """Those that run, and do not count as dead."""
        return [p for p in self.processes.values() if not (p.killed or p.gone or p.doomed)]

    # -- moves

    def moves(self) -> list[Move]:
        """Every task that can go on, without faults."""
        return [
            Move(process.name, task.number)
            for process in self.processes.values()
            if not process.killed
            for task in process.tasks
            if self.can_go_on(process, task)
        ]

    @staticmethod
    def can_go_on(process: SimProcess, task: Task) -> bool:
        if task.outcome is not None:
            return task.turn not in process.busy
        return not task.stuck and not isinstance(task.effect, Turn)

    def task(self, move: Move) -> tuple[SimProcess, Task]:
        process = self.processes[move.who]
        return process, next(task for task in process.tasks if task.number == move.task)

    def footprint(self, move: Move) -> frozenset[bytes] | None:
        """What a move reads or writes; None is everything."""
        if move.task < 0:
            return None
        _, task = self.task(move)
        effect = task.effect
        if isinstance(effect, Call):
            keys = {effect.base}
            if effect.registry is not None:
                keys.add(effect.registry)
            return frozenset(keys)
        if isinstance(effect, Execute):
            return frozenset({b"sink " + task.turn})
        if isinstance(effect, Point):
            return frozenset({b"sink " + effect.base})
        return frozenset({effect.key.partition(b":wake:")[0]})

    def do(self, move: Move) -> None:
        """Make a move.

        Raises:
            Violation: With the trace.
        """
        self.steps += 1
        try:
            self.check_steps()
            if move.task < 0:
                getattr(self, move.fate)(self.processes[move.who])
            else:
                self.step(*self.task(move), move.fate)
        except Violation as violation:
            violation.add_note(self.story())
            raise

    def check_steps(self) -> None:
        if self.steps > MOST_STEPS:
            raise Violation("G8: it does not come to an end")

    def step(self, process: SimProcess, task: Task, fate: str) -> None:
        effect = task.effect
        if fate in {CANCELLED, CANCELLED_UNSENT}:
            self.cancel(process, task, fate)
        elif task.outcome is not None:
            process.end_execution(task)
        elif isinstance(effect, Call):
            self.call(process, task, effect, fate)
        elif isinstance(effect, Execute):
            self.execute(process, task, effect, fate)
        elif isinstance(effect, Point):
            self.note(process, task, effect.name, fate)
            task.advance(effect.function())
        elif isinstance(effect, Wait):
            self.wait(process, task, effect, fate)
        process.settle()

    def call(self, process: SimProcess, task: Task, call: Call, fate: str) -> None:
        if call.numbered and not call.number:
            call.number = next(process.numbers)
        if fate not in {OK, TWICE, DEAF, GIVEN_UP}:
            self.note(process, task, call, fate)
            self.witness.seen[f"fate {fate}"] += 1
            if fate == GIVEN_UP_UNSENT:
                task.advance(ConnectionLostError("no answer"))
            return
        for _ in range(2 if fate == TWICE else 1):
            answer = self.deliver(process, task, call, fate)
        task.delivered = True
        if fate != OK:
            self.witness.seen[f"fate {fate}"] += 1
        if fate == DEAF:
            return
        if fate == GIVEN_UP:
            task.advance(ConnectionLostError("no answer"))
        else:
            task.advance(answer)

    def cancel(self, process: SimProcess, task: Task, fate: str) -> None:
        """As the drivers do."""
        effect = task.effect
        self.witness.seen[f"fate {fate}"] += 1
        self.witness.seen[f"cancelled at {self.where(task)}"] += 1
        if isinstance(effect, Execute) or (isinstance(effect, Call) and effect.keep):
            self.note(process, task, "is left alone", fate)
            if task.leave_alone is not None:
                task.leave_alone()
            return
        self.note(process, task, "is cancelled", fate)
        if isinstance(effect, Call) and fate == CANCELLED and not task.delivered:
            if effect.numbered and not effect.number:
                effect.number = next(process.numbers)
            self.deliver(process, task, effect, fate)
        task.advance(CancelledError())

    def deliver(self, process: SimProcess, task: Task | None, call: Call, fate: str) -> Any:
        answer = self.link.call(call)
        self.note(process, task, call, fate, answer)
        expected = isinstance(answer, (DeclaredDeadError, StaleOperationError))
        # What becomes of a plain command that meets a tombstone is the flow's business.
        if call.step and isinstance(answer, ServerError) and not expected:
            raise Violation(f"unexpected: {Witness.say(call)}: {answer}")
        if (call.numbered or call.step == "renew") and task is not None:
            process.sent.append(call)
        if self.witness.note(call, answer) and self.checking:
            self.witness.check(call.base)
        if call.step or fate != OK:
            self.unstick()
        return answer

    def unstick(self) -> None:
        """Something has changed: whoever waits may look again."""
        for process in self.processes.values():
            for task in process.tasks:
                task.stuck = False

    def execute(self, process: SimProcess, task: Task, effect: Execute, fate: str) -> None:
        self.raising = fate == RAISES
        process.busy.discard(task.turn)
        try:
            task.outcome = Outcome(value=effect.function())
        except Violation:
            raise
        except Exception as error:  # noqa: BLE001 - the flow is told
            task.outcome = Outcome(error=error)
            self.witness.seen[f"user code raises {type(error).__name__}"] += 1
        self.note(process, task, "execute", fate, task.outcome.error)

    def wait(self, process: SimProcess, task: Task, effect: Wait, fate: str) -> None:
        if fate == "timeout":
            self.note(process, task, "waits in vain", fate)
            place = self.witness.places[effect.key.partition(b":wake:")[0]]
            if not self.disturbed:
                place.check_woken(self.link.now)
            self.witness.seen["waited in vain"] += 1
            self.advance(int(effect.timeout * 1000) + 1)
            task.advance(False)
            return
        woken = self.link.expect("LPOP", effect.key) is not None
        self.note(process, task, "waits", fate, woken)
        if woken:
            self.witness.seen["woken"] += 1
            task.advance(True)
        else:
            task.stuck = True

    def late(self, process: SimProcess, call: Call) -> None:
        """The network delivers one of a process's last calls once more."""
        try:
            self.deliver(process, None, call, "late")
        except Violation as violation:
            violation.add_note(self.story())
            raise

    # -- time and death

    def advance(self, ms: int, silent: SimProcess | None = None) -> None:
        """Time passes; whoever lives beats."""
        self.disturbed = True
        beating = [process for process in self.living if process is not silent]
        while ms > 0:
            # In time for all, also for one whose rebirth took a while; and each beat takes some.
            beating.sort(key=lambda process: process.lives_until)
            left = [process.lives_until - self.link.offset - BEATS for process in beating]
            some = max(1, min([ms, TTL // 2 + 1, *left]))
            ms -= some
            self.link.advance(some)
            for process in beating:
                beat = self.direct(processes.beat(process.me, TTL, process.epoch))
                if beat.kind != "alive":
                    raise Violation(f"G8: {process.name} beats in time and is told {beat}")
                process.lives_until = self.link.offset + TTL

    def silence(self, process: SimProcess) -> None:
        """A process does not beat until its deadline has passed."""
        doing = {self.where(task) for task in process.tasks if task.effect is not None}
        self.witness.seen.update(f"silent at {what}" for what in doing)
        if not process.doomed:
            self.advance(TTL + 1, silent=process)
            self.witness.dead.add(process.me.id)
        self.disturbed = True

    @staticmethod
    def where(task: Task) -> str:
        effect = task.effect
        if isinstance(effect, Call):
            return effect.step or str(effect.args[0].decode())
        if isinstance(effect, Execute):
            return "executed" if task.outcome is not None else "execute"
        return type(effect).__name__

    def kill(self, process: SimProcess) -> None:
        self.note(process, None, "is killed", "")
        self.witness.seen["kills"] += 1
        process.killed = True
        self.silence(process)
        process.tasks.clear()

    def pause(self, process: SimProcess) -> None:
        self.note(process, None, "is paused past its deadline", "")
        self.witness.seen["zombies"] += 1
        self.silence(process)

    def beat(self, process: SimProcess) -> None:
        self.note(process, None, "beats", "")
        process.spawn("beat", process.beat())

    def retry(self, process: SimProcess) -> None:
        base, token = process.retries.pop(0)
        self.note(process, None, f"retries {token}", "")
        process.spawn("retry", process.retry(base, token))

    def survive(self, process: SimProcess) -> None:
        """Whoever lives learns at once that another one is dead."""
        for other in self.living:
            if other is not process:
                other.recover([process.me.id.decode()])

    # -- the end

    def run_out(self) -> None:
        """Let everything that is under way come to its end, one move after the other."""
        while True:
            moves = self.moves()
            for move in moves:
                process = self.processes[move.who]
                tasks = [task for task in process.tasks if task.number == move.task]
                # The one before may have ended it, or have taken its turn.
                if tasks and self.can_go_on(process, tasks[0]):
                    self.do(move)
            if not moves and not self.time_out():
                return

    def time_out(self) -> bool:
        """Nothing moves: whoever waits has waited long enough."""
        for process in self.processes.values():
            for task in process.tasks:
                if isinstance(task.effect, Wait) and not process.killed:
                    self.do(Move(process.name, task.number, "timeout"))
                    return True
        return False

    def finish(self) -> None:
        """Everybody stops, and somebody takes over whatever is left. Then check.

        Raises:
            Violation: With the trace.
        """
        self.ending = True
        self.run_out()
        for process in self.processes.values():
            if process.doomed and not process.killed:
                self.do(Move(process.name, -1, "beat"))
                self.run_out()
        for process in self.processes.values():
            if not process.killed:
                process.spawn("stop", process.stop())
                self.run_out()
        try:
            self.clean_up()
            self.witness.check_end()
        except Violation as violation:
            violation.add_note(self.story())
            raise

    def clean_up(self) -> None:
        """The next process that starts takes over from all that are dead."""
        last = self.start("z", knows=("K", "L"))
        for _ in range(30):
            beat = self.direct(processes.beat(last.me, TTL, last.epoch))
            if not beat.dead and beat.next_death is None:
                break
            last.recover(beat.dead)
            self.run_out()
            while last.retries:
                self.retry(last)
                self.run_out()
            # What is in the hands of the dead is free then, and whose rebirth failed is dead.
            self.advance(recovery.CLAIM_MS if beat.next_death is None else TTL)
        else:
            raise Violation(f"G8: {beat.dead} cannot be taken over")
        last.spawn("replay", self.replay_parked(last))
        self.run_out()
        last.spawn("stop", last.stop())
        self.run_out()

    def replay_parked(self, process: SimProcess) -> Steps[None]:
        """Somebody sees to the parked batches: replays those that are not in the sink."""
        for base in (yield from parking.resources(process.me)):
            for entry in (yield from parking.entries(process.me, base)):
                if entry.token in self.witness.places[base].applied:
                    self.witness.seen["parked although applied"] += 1
                    yield from process.turn(base, parking.discard(process.me, base, entry.token))
                    continue
                self.witness.seen["parked and replayed"] += 1
                replayed = yield from process.turn(
                    base, parking.replay(process.me, base, entry.token)
                )
                run = process.runner(process.me, base)
                _, failures, lost = yield from process.turn(
                    base, updates.execute(process.me, base, replayed.batch, run, POLICY)
                )
                process.after(base, failures, lost)
            yield from parking.entries(process.me, base)

    # -- what happened

    def note(
        self, process: SimProcess, task: Task | None, what: Any, fate: str, answer: Any = None
    ) -> None:
        if isinstance(what, Call):
            what = (what.step, what.number, what.args)
        self.trace.append(
            (self.link.offset, process.me.id, task.name if task else "", what, fate, answer)
        )

    def story(self) -> str:
        """What happened, line by line."""
        lines = []
        for at, who, task, what, fate, answer in self.trace:
            text = what
            if isinstance(what, tuple):
                step, number, args = what
                shown = " ".join(a.decode() if isinstance(a, bytes) else str(a) for a in args)
                text = f"{step}#{number} {shown}" if number else f"{step} {shown}"
            reply = "" if answer is None else f" -> {answer}"
            mark = "" if fate in {"", OK} else f" [{fate}]"
            lines.append(f"{at:>8} {who.decode():<4} {task:<9} {text}{mark}{reply}")
        return "\n".join(line[:300] for line in lines)
