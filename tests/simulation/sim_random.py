"""Random schedules: processes that do anything, at any time, while anything happens to them.

A schedule depends on nothing but its seed.
"""

import random
from asyncio import CancelledError
from collections import Counter
from collections.abc import Generator
from typing import Any, NamedTuple

from sim_checks import Violation
from sim_link import Link
from sim_world import (
    CANCELLED,
    CANCELLED_UNSENT,
    DEAF,
    GIVEN_UP,
    GIVEN_UP_UNSENT,
    LOST,
    OK,
    RAISES,
    TWICE,
    Move,
    Point,
    SimProcess,
    Task,
    World,
)

from phonon.errors import ConnectionLostError
from phonon.protocol.effects import Call, Execute

#: Of every hundred moves so many are what is not a task's going on.
DISTURBANCES = {"beat": 6.0, "retry": 6.0, "late": 2.0, "kill": 0.8, "pause": 1.6, "time": 1.5}
#: What becomes of a call, and how often.
FATES = {OK: 84, DEAF: 6, LOST: 4, TWICE: 4, GIVEN_UP: 1, GIVEN_UP_UNSENT: 1}
#: Operations, and how often each is chosen.
OPERATIONS = {
    "append": 30,
    "append once": 6,
    "compact": 8,
    "leave": 22,
    "leave with data": 10,
    "force": 4,
    "join": 10,
    "modify": 4,
    "lock": 14,
    "try the lock": 3,
    "share the lock": 5,
    "wait in vain": 2,
    "semaphore": 4,
    "meet": 3,
}
#: Milliseconds that pass: within the deadline, past a waiter's patience, past a membership.
TIMES = (400, 3_000, 11_000, 70_000, 910_000)


#: Of every hundred moves so many cancel what a user has called, in one schedule of three.
CANCELLATIONS = 8.0


class Result(NamedTuple):
    """What random schedules came to."""

    schedules: int
    moves: int
    calls: int
    seen: Counter[str]


class Walk:
    """What a thread or task of a process's user does, one thing after the other.

    Args:
        p: The process.
        rng: What it does.
        bases: With which resources.
    """

    def __init__(self, p: SimProcess, rng: random.Random, bases: list[bytes]) -> None:
        self.p, self.rng, self.bases = p, rng, bases
        self.ended = False

    def begin(self) -> None:
        self.p.spawn("user", self.steps()).leave_alone = self.go_elsewhere

    def go_elsewhere(self) -> None:
        """Its call was cancelled, and goes on without it."""
        self.ended = True
        Walk(self.p, self.rng, self.bases).begin()

    def steps(self) -> Generator[Any, Any, None]:
        names, weights = list(OPERATIONS), list(OPERATIONS.values())
        while not (self.p.world.ending or self.ended):
            base, name = self.rng.choice(self.bases), self.rng.choices(names, weights)[0]
            try:
                yield from operate(self.p, name, base, self.rng)
            except ConnectionLostError:
                self.p.world.witness.seen["given up by its caller"] += 1
            except CancelledError:
                self.p.world.witness.seen["cancelled by its caller"] += 1


def operate(p: SimProcess, name: str, base: bytes, rng: random.Random) -> Generator[Any, Any, None]:
    if name.startswith("append"):
        yield from p.append(base, keep=name == "append")
    elif name.startswith("leave") or name == "force":
        if name == "leave with data":
            p.add(base)
        yield from p.leave(base, force=name == "force")
    elif name == "join":
        yield from p.join(base)
    elif name == "compact":
        yield from p.compact(base)
    elif name == "modify":
        yield from p.modify(base)
    elif name == "meet":
        yield from p.meet(base, rng.randint(1, 3))
    elif name == "semaphore":
        yield from p.lock(p.world.keys.semaphore("s"), shared=True, places=2)
    else:
        yield from p.lock(
            base,
            queue=name != "try the lock",
            patient=name != "wait in vain",
            shared=name == "share the lock" or rng.random() < 0.2,
            extend=rng.random() < 0.3,
        )


class Schedule:
    """One random schedule.

    Args:
        link: The server.
        seed: Decides everything.
    """

    def __init__(self, link: Link, seed: str) -> None:
        self.rng = rng = random.Random(seed)  # noqa: S311 - repeatable, no secret
        self.world = World(link, colocated=rng.random() < 0.5, fine=True)
        self.length = rng.randint(30, 80) * 2
        bases = [self.world.base(name) for name in "xyz"[: rng.randint(1, 3)]]
        self.quiet = rng.random() < 0.25
        # By a chance of their own: the other schedules stay what they were without them.
        self.cancels = random.Random(f"{seed} cancel")  # noqa: S311 - as above
        self.cancelling = self.cancels.random() < 1 / 3
        for name in "abcde"[: rng.randint(2, 5)]:
            knowing = rng.random() < 0.8
            label = rng.choice("KKKKL")
            process = self.world.start(name, label, ("K", "L") if knowing else ("K",))
            for _ in range(rng.choice((1, 1, 1, 2))):
                Walk(process, rng, bases).begin()

    def run(self) -> None:
        for _ in range(self.length):
            if not self.move():
                break
        self.world.finish()

    def move(self) -> bool:
        """Make a move. Is there anybody left?"""
        running = [p for p in self.world.processes.values() if not p.killed]
        if not running:
            return False
        disturb = not self.quiet and self.rng.random() * 100 < sum(DISTURBANCES.values())
        if disturb and self.disturb(self.rng.choice(running)):
            return True
        if self.cancelling and self.cancels.random() * 100 < CANCELLATIONS and self.cancel():
            return True
        moves = self.world.moves()
        if not moves:
            return self.world.time_out()
        move = self.rng.choice(moves)
        _, task = self.world.task(move)
        self.world.do(move._replace(fate=OK if self.quiet else self.fate(task)))
        return True

    def cancel(self) -> bool:
        """Somebody's call is cancelled. Is there one that waits?"""
        waiting = [
            (process, task)
            for process in self.world.processes.values()
            if not process.killed
            for task in process.tasks
            if task.name == "user" and not isinstance(task.effect, Point)
        ]
        if not waiting:
            return False
        process, task = self.cancels.choice(waiting)
        fate = self.cancels.choice((CANCELLED, CANCELLED_UNSENT))
        self.world.do(Move(process.name, task.number, fate))
        return True

    def fate(self, task: Task) -> str:
        effect = task.effect
        if isinstance(effect, Execute) and task.outcome is None:
            return RAISES if self.rng.random() < 0.3 else OK
        if not isinstance(effect, Call):
            return OK
        fate = self.rng.choices(list(FATES), list(FATES.values()))[0]
        # Only calls of the user's are given up, and only those that are not kept.
        if fate in {GIVEN_UP, GIVEN_UP_UNSENT} and (effect.keep or task.name != "user"):
            return DEAF
        if fate == GIVEN_UP_UNSENT and task.delivered:
            return GIVEN_UP
        return fate

    def disturb(self, process: SimProcess) -> bool:
        kinds, weights = list(DISTURBANCES), list(DISTURBANCES.values())
        kind = self.rng.choices(kinds, weights)[0]
        world = self.world
        if kind == "time":
            ms = self.rng.choice(TIMES)
            world.trace.append((world.link.offset, b"", "", f"{ms} ms pass", "", None))
            world.advance(ms)
        elif kind == "late":
            if not process.sent:
                return False
            world.late(process, self.rng.choice(process.sent))
        elif kind == "retry":
            if not process.retries:
                return False
            world.do(Move(process.name, -1, kind))
        elif kind == "beat":
            if any(task.name == "beat" for task in process.tasks):
                return False
            world.do(Move(process.name, -1, kind))
        elif not process.doomed:
            world.do(Move(process.name, -1, kind))
        return True


def run_random(link: Link, seed: str, schedules: int) -> Result:
    """Run random schedules.

    Raises:
        Violation: With the seed, and everything that happened.
    """
    seen: Counter[str] = Counter()
    moves, calls = 0, link.calls
    for number in range(schedules):
        schedule = None
        try:
            schedule = Schedule(link, f"{seed} {number}")
            schedule.run()
        except Violation as violation:
            violation.add_note(f"schedule {number} of seed {seed}")
            if schedule is not None and not any("\n" in note for note in violation.__notes__):
                violation.add_note(schedule.world.story())
            raise
        seen += schedule.world.witness.seen
        moves += schedule.world.steps
    return Result(schedules, moves, link.calls - calls, seen)
