"""Random schedules, and shrinking. A schedule depends on nothing but its seed."""

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from phonon._core.flows import AwaitMail, Execute, Read, Send, Sleep
from phonon._protocol.lane import State
from simulation.checks import Violation
from simulation.process import Idle, Point, SimFlow, SimProcess
from simulation.server import SimServer
from simulation.settle import finish
from simulation.world import Move, Setup, World

#: Of every thousand moves so many are not a task's going on.
PROFILES: dict[str, dict[str, int]] = {
    "quiet": {"beat": 10, "work": 20},
    "faults": {"dup": 40, "beat": 20, "work": 40, "gone": 8},
    "deaths": {
        "dup": 40, "beat": 40, "work": 40, "gone": 8, "kill": 9, "pause": 18, "time": 8, "back": 4,
        "start": 6, "stop": 4,
    },
    "clock": {
        "dup": 20, "beat": 60, "work": 40, "gone": 4, "kill": 3, "pause": 10, "time": 20, "jump": 20,
        "start": 4, "stop": 2,
    },
    "outage": {
        "dup": 40, "beat": 40, "work": 40, "gone": 8, "kill": 6, "pause": 10, "outage": 10,
        "time": 8, "start": 6,
    },
    "rollback": {
        "dup": 40, "beat": 50, "work": 40, "gone": 8, "kill": 5, "pause": 8, "save": 30,
        "rollback": 8, "time": 8, "start": 6,
    },
    "shards": {
        "dup": 40, "beat": 50, "work": 40, "gone": 8, "kill": 5, "pause": 8, "save": 30, "shard": 8,
        "time": 8, "start": 6,
    },
    "empty": {
        "dup": 40, "beat": 50, "work": 40, "gone": 8, "kill": 5, "pause": 8, "empty": 8, "time": 8,
        "start": 6,
    },
}  # fmt: skip
#: The same disturbances, while messages of a broker are read.
PROFILES["sources"] = {**PROFILES["deaths"], "kill": 12, "pause": 14}
PROFILES["lost sources"] = PROFILES["rollback"]
_USER = {
    "append": 28, "append two": 5, "leave": 24, "leave two": 6, "join": 10, "modify": 4, "lock": 16,
    "meet": 3, "wait": 3, "replay": 2,
}  # fmt: skip
_READER = {
    "consume": 40, "take": 26, "settle": 4, "append": 4, "leave": 20, "leave two": 4, "replay": 2,
}  # fmt: skip
_CALLS = {"ok": 70, "slow": 10, "later": 4, "deaf": 8, "lost": 5, "twice": 4}
_READS = {"ok": 60, "step": 24, "deaf": 5, "lost": 4, "twice": 4, "fail": 2, "deaf fail": 2}
_EXECUTES = {"ok": 60, "raise": 20, "raise after": 5, "some": 5, "half": 10}
_TIMES = (300_000, 3_000_000, 12_000_000, 50_000_000, 120_000_000)


def _choose(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


class Schedule:
    """One random schedule."""

    def __init__(
        self,
        server: SimServer,
        profile: str,
        seed: str,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.profile = PROFILES[profile]
        self.faulty = profile != "quiet"
        self.user = _READER if profile.endswith("sources") else _USER
        self.refuses = self.faulty and rng.random() < 0.3
        classes = ("K", "L"), ("K",)
        self.setups = [
            Setup(
                name,
                rng.random() < 0.75,
                classes[rng.random() > 0.8],
                rng.choice((1, 1, 2, 3)),
            )
            for name in "abcd"[: rng.randint(2, 4)]
        ]
        self.length = rng.choice((30, 60, 120, 200))
        self.partitions = rng.choice((2, 2, 3))
        self.wide = rng.randint(1, 4)
        self.together = rng.choice(("", "f", "dyf"))
        self.names = iter("eghijklm")
        self.world = World(
            server,
            self.setups,
            partitions=self.partitions,
            seed=seed,
            together=self.together,
            tell=tell,
        )
        self.resources = self.world.resources[: self.wide]

    def again(self, moves: Sequence[Move], tell: Callable[[str], object] | None = None) -> World:
        """Make moves in a new world like this one."""
        world = World(
            self.world.server,
            self.setups,
            partitions=self.partitions,
            seed=self.seed,
            together=self.together,
            tell=tell,
        )
        for move in moves:
            world.do(move)
        finish(world)
        return world

    def run(self) -> World:
        world, rng = self.world, self.rng
        if rng.random() < 0.8:
            world.do(("time", 42_000_000))
        for _ in range(self.length):
            move = self.pick()
            if move is not None:
                world.do(move)
        self.moves = list(world.trace)
        finish(world)
        return world

    def pick(self) -> Move | None:
        rng, world = self.rng, self.world
        live = [p for p in world.processes.values() if p.alive]
        if "dup" in self.profile and rng.random() < 0.3:
            # The moments that matter.
            if any(p.identity.suspected or p.engine.takeover.former for p in live):
                return self._disturbance("dup", live)
        roll = rng.random() * 1000
        for kind, weight in self.profile.items():
            roll -= weight
            if roll < 0:
                return self._disturbance(kind, live)
        moves: list[Callable[[], Move | None]] = []
        for p in live:
            for partition, lane in enumerate(p.identity.lanes):
                if lane.has_work and lane.state is not State.FENCED:
                    moves += [lambda p=p, n=partition: self._call(p, n)] * 3  # type: ignore[misc]
            if p.replies:
                moves.append(lambda p=p: ("reply", p.name))  # type: ignore[misc]
            for task in list(p.tasks.values()):
                moves += self._of_task(p, task)
        return rng.choice(moves)() if moves else None

    def _of_task(self, p: SimProcess, task: SimFlow) -> list[Callable[[], Move | None]]:
        effect = task.effect
        if task.detached:
            return []
        if task.is_ready:
            return [lambda: ("go", p.name, task.name, "ok")] * 3
        if isinstance(effect, Read):
            return [lambda: ("go", p.name, task.name, self._fate(_READS))] * 3
        if isinstance(effect, Point | Sleep):
            return [lambda: ("go", p.name, task.name, "ok")] * 2
        if isinstance(effect, Execute):
            return [lambda: self._execute(p, task)] * 2
        if isinstance(effect, AwaitMail):
            return [lambda: self._mail(p, task, effect.partition)]
        if isinstance(effect, Idle) and not p.stopping and self.rng.random() < 0.7:
            return [lambda: self._user(p, task)]
        return []

    def _fate(self, fates: dict[str, int]) -> str:
        return _choose(self.rng, fates) if self.faulty else "ok"

    def _call(self, p: SimProcess, partition: int) -> Move:
        fates = {**_CALLS, "refused": 4} if self.refuses else _CALLS
        return "call", p.name, partition, self._fate(fates)

    def _execute(self, p: SimProcess, task: SimFlow) -> Move:
        jobs = task.effect.jobs
        if self.rng.random() < 0.1:
            return "early", p.name, task.name
        return "exec", p.name, task.name, self.rng.randrange(len(jobs)), self._fate(_EXECUTES)

    def _mail(self, p: SimProcess, task: SimFlow, partition: int) -> Move:
        roll = self.rng.random()
        if roll < 0.2:
            return "go", p.name, task.name, "timeout"
        return "mail", p.name, partition, "lost" if roll < 0.25 and self.faulty else "ok"

    def _user(self, p: SimProcess, task: SimFlow) -> Move | None:
        rng, world = self.rng, self.world
        what = _choose(rng, self.user)
        who = "user", p.name, task.name
        some = list(self.resources)
        resource = rng.choice(some)
        if what == "append":
            return *who, "append", resource
        if what == "append two":
            return *who, "append", *rng.sample(some, min(2, len(some)))
        if what == "leave":
            held = [r for r in some if r in p.held]
            if held and rng.random() < 0.8:
                resource = rng.choice(held)
            return *who, "leave", (resource,), rng.random() < 0.4, rng.random() < 0.15
        if what == "leave two":
            return *who, "leave", tuple(rng.sample(some, len(some))), rng.random() < 0.4, False
        if what == "lock":
            seconds = rng.choice((None, 0.03, 5.0, 5.0))
            lease = rng.choice((None, None, None, 15.0))
            return *who, "lock", resource, seconds, rng.random() < 0.3, lease
        if what == "meet":
            return *who, "meet", "w", rng.choice((1, 2, 2))
        if what == "wait":
            return *who, "wait", "w"
        if what == "consume":
            again = rng.choice((0, 0, 0, 0, 2, 5, 100))
            return *who, "consume", rng.randint(1, 6), again, rng.choice((0, 0, 2))
        if what == "take":
            return *who, "take", self._delivered(), rng.choice((0, 0, 2))
        if what == "settle":
            return *who, "settle"
        if what == "replay":
            parked = [(r, token) for r, some in world.checks.state().dead.items() for token in some]
            if not parked:
                return None
            resource, token = rng.choice(parked)
            items = world.checks.state().dead[resource][token]
            done = world.checks.applied[resource].values()
            if any(item in batch for item in items for batch in done):
                return None
            return *who, "replay", resource, token, False
        return *who, what, resource

    def _delivered(self) -> tuple[int, ...]:
        """Return the next messages of the queue: mostly such as nobody has acknowledged."""
        broker, rng = self.world.broker, self.rng
        numbers = [
            n
            for n in range(broker.queued + 3)
            if n not in broker.acknowledged or rng.random() < 0.1
        ]
        return tuple(rng.choices(numbers[-8:], k=rng.randint(1, 5)))

    def _disturbance(self, kind: str, live: list[SimProcess]) -> Move | None:
        rng, world = self.rng, self.world
        if kind == "dup":
            if not world.kept:
                return None
            if rng.random() < 0.5:
                # One that was not answered so far, also of the dead and of former selves.
                unanswered = [
                    key
                    for key, kept in world.kept.items()
                    if kept.call is not None and key not in world.answered
                ]
                if unanswered:
                    return "dup", rng.choice(unanswered[-6:])
            return "dup", rng.choice(list(world.kept))
        if kind == "shard":
            some = [("rollback", str(p)) for p in range(world.count)]
            return rng.choice([*some, ("rollback", "namespace"), ("empty", "namespace")])
        if kind in ("outage", "save", "rollback", "empty"):
            return (kind,)
        if kind == "jump":
            return "jump", rng.choice((1_000, 3_000_000, 20_000_000, 35_000_000, 100_000_000))
        if kind == "back":
            return "back", rng.choice((1_000, 2_000_000, 100_000_000))
        if kind == "time":
            return "time", rng.choice(_TIMES)
        if kind == "start":
            name = next(self.names, None)
            classes = ("K", "L") if rng.random() < 0.8 else ("K",)
            return (
                ("start", name, rng.random() < 0.8, classes, rng.choice((1, 2))) if name else None
            )
        if not live:
            return None
        p = rng.choice(live)
        if kind == "gone":
            tasks = [
                t for t in p.tasks.values() if isinstance(t.effect, Send) or t.name[:4] == "user"
            ]
            return ("gone", p.name, rng.choice(tasks).name) if tasks else None
        return kind, p.name


class Result(NamedTuple):
    """The result of random schedules."""

    schedules: int
    moves: int
    calls: int
    seen: Counter[str]


class Found(NamedTuple):
    """A schedule that violates a guarantee."""

    schedule: Schedule
    violation: Violation


def try_schedule(server: SimServer, profile: str, seed: str) -> tuple[Schedule, Violation | None]:
    """Run a schedule. Return what it violates, if anything."""
    schedule = Schedule(server, profile, f"{profile} {seed}")
    try:
        schedule.run()
    except Violation as violation:
        return schedule, violation
    except Exception as error:  # noqa: BLE001 - the core raised what it must not
        text = traceback.format_exc(limit=-6)
        return schedule, Violation(f"unexpected: {type(error).__name__}: {error}\n{text}")
    return schedule, None


def run_random(
    server: SimServer, profile: str, seed: str, count: int, *, shrinks: bool = True
) -> Result:
    """Run schedules.

    Raises:
        Violation: With the seed, and a shrunk trace.
    """
    seen: Counter[str] = Counter()
    moves, calls = 0, server.calls
    for number in range(count):
        schedule, violation = try_schedule(server, profile, f"{seed} {number}")
        seen += schedule.world.seen
        moves += schedule.world.steps
        if violation is not None:
            raise Violation(report(schedule, violation) if shrinks else str(violation))
    return Result(count, moves, server.calls - calls, seen)


def report(schedule: Schedule, violation: Violation, seconds: float = 20.0) -> str:
    """Return a violation with its seed and the shortest trace found in some time."""
    moves = shrink(schedule, violation, seconds)
    lines: list[str] = []
    try:
        schedule.again(moves, lines.append)
    except Violation as shown:
        lines.append(f"{shown}")
    except Exception as error:  # noqa: BLE001 - shown
        lines.append(f"{type(error).__name__}: {error}")
    noise = (" verify ", " survey ", " processes ", " beat ", " RENEW ")
    shown_lines = [line[:400] for line in lines if not any(word in line for word in noise)]
    if len(shown_lines) > 130:
        shown_lines[90:-40] = ["..."]
    story = "\n".join(shown_lines)
    return (
        f"{violation}\nseed {schedule.seed!r}, {schedule.setups}, {schedule.partitions} partitions; "
        f"{len(schedule.world.trace)} moves, shrunk to {len(moves)}:\n{story}"
    )


def shrink(schedule: Schedule, violation: Violation, seconds: float) -> list[Move]:
    """Return fewer moves with the same kind of violation."""
    moves = list(getattr(schedule, "moves", schedule.world.trace))
    # The start of each world makes its own first moves.
    first = World(
        schedule.world.server, schedule.setups, partitions=schedule.partitions, seed=schedule.seed
    )
    moves = moves[len(first.trace) :]
    kind = str(violation)[:18]
    deadline = time.monotonic() + seconds

    def fails(some: Sequence[Move]) -> bool:
        try:
            schedule.again(some)
        except Violation as found:
            return str(found)[:18] == kind
        except Exception as error:  # noqa: BLE001 - the core raised what it must not
            return kind == f"unexpected: {type(error).__name__}: {error}"[:18]
        return False

    parts = 2
    while len(moves) > 1 and time.monotonic() < deadline:
        size = max(1, len(moves) // parts)
        for at in range(0, len(moves), size):
            if time.monotonic() > deadline:
                break
            rest = moves[:at] + moves[at + size :]
            if fails(rest):
                moves, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(len(moves), parts * 2)
    return moves


__all__ = ["PROFILES", "Found", "Result", "Schedule", "report", "run_random", "try_schedule"]
_Any = Any
