"""All interleavings of a small scenario, and all places for its faults.

Depth first over the choices, each run from the start: a run cannot be copied. Two moves of
different processes that touch different keys have the same effect in either order, and only one of
the two orders is run ("sleep sets", Godefroid 1996). A fault does not commute with any other fault.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sim_link import Link
from sim_world import (
    CANCELLED,
    CANCELLED_UNSENT,
    DEAF,
    RAISES,
    Move,
    Point,
    SimProcess,
    World,
)

from phonon.protocol.effects import Call, Execute, Wait

Footprint = frozenset[bytes] | None
#: What the user of a process does.
Script = Callable[[SimProcess], Generator[Any, Any, None]]


@dataclass(frozen=True)
class Scenario:
    """What is to be explored.

    Attributes:
        scripts: What the processes do, by name.
        before: What they have done before, in this order, without faults.
        dead: Who is killed then; everybody else takes over.
        labels: The class of a process's data, and the classes it knows, if not "K".
        faults: How many there are at the most, in any run.
        kinds: Which: kill, pause, deaf, raises, cancelled.
        victims: Who is killed or paused.
        beats: Whether a paused process soon beats.
    """

    scripts: Mapping[str, Script]
    before: tuple[tuple[str, Script], ...] = ()
    dead: str = ""
    labels: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    faults: int = 1
    kinds: tuple[str, ...] = ("kill", "pause", DEAF)
    victims: tuple[str, ...] = ()
    beats: bool = False


@dataclass
class Node:
    """A place where there is a choice.

    Attributes:
        options: The moves that are to be tried, with what they touch.
        asleep: Moves that have been tried from an equivalent place.
        at: The one that is being tried.
    """

    options: list[tuple[Move, Footprint]]
    asleep: dict[Move, Footprint]
    at: int = 0

    def asleep_below(self) -> dict[Move, Footprint]:
        move, touched = self.options[self.at]
        tried = dict(self.options[: self.at])
        return {
            other: keys
            for other, keys in {**self.asleep, **tried}.items()
            if commute(move, touched, other, keys)
        }


def commute(a: Move, a_keys: Footprint, b: Move, b_keys: Footprint) -> bool:
    if a.who == b.who or a_keys is None or b_keys is None:
        return False
    if a.fate != "ok" and b.fate != "ok":
        return False
    return a_keys.isdisjoint(b_keys)


@dataclass
class Explored:
    """What exploring a scenario came to."""

    interleavings: int = 0
    cut: int = 0
    moves: int = 0
    calls: int = 0
    complete: bool = False


class Explorer:
    """Explores a scenario.

    Args:
        link: The server.
        scenario: The scenario.
        colocated: Whether steps keep the registries, or flows.
    """

    def __init__(self, link: Link, scenario: Scenario, *, colocated: bool = True) -> None:
        self.link = link
        self.scenario = scenario
        self.colocated = colocated
        self.result = Explored()
        self.seen: World | None = None

    def world(self) -> World:
        world = World(self.link, colocated=self.colocated, checking=False)
        names = dict.fromkeys(
            [name for name, _ in self.scenario.before] + list(self.scenario.scripts)
        )
        for name in sorted(names):
            label, knows = self.scenario.labels.get(name, ("K", ("K",)))
            world.start(name, label, knows)
        for name, script in self.scenario.before:
            process = world.processes[name]
            process.spawn("before", script(process))
            while (moves := world.moves()) and not self.is_ready(process):
                world.do(moves[0])
        for name, script in self.scenario.scripts.items():
            process = world.processes[name]
            process.spawn("user", script(process))
        if self.scenario.dead:
            world.kill(world.processes[self.scenario.dead])
            world.survive(world.processes[self.scenario.dead])
        world.steps = 0
        world.disturbed = bool(self.scenario.dead)
        return world

    @staticmethod
    def is_ready(process: SimProcess) -> bool:
        """What comes before the scenario goes up to where a batch is executed, or a lock held."""
        return any(isinstance(task.effect, (Execute, Point)) for task in process.tasks)

    def options(self, world: World, faults: int) -> list[tuple[Move, Footprint]]:
        scenario = self.scenario
        moves = world.moves()
        found = [(move, world.footprint(move)) for move in moves]
        if not moves:
            for process in world.processes.values():
                if process.retries and not process.killed:
                    return [(Move(process.name, -1, "retry"), None)]
        if not moves or faults >= scenario.faults:
            return self.own_first(world, found)
        found += self.faulty(world, found)
        if not scenario.victims:
            return self.own_first(world, found)
        for name in scenario.victims:
            process = world.processes[name]
            if not process.killed and not process.doomed:
                found += [
                    (Move(name, -1, kind), None)
                    for kind in ("kill", "pause")
                    if kind in scenario.kinds
                ]
        return found

    def faulty(
        self, world: World, found: list[tuple[Move, Footprint]]
    ) -> list[tuple[Move, Footprint]]:
        """The moves once more, with what can go wrong in each."""
        kinds, faulty = self.scenario.kinds, []
        for move, keys in found:
            _, task = world.task(move)
            if DEAF in kinds and isinstance(task.effect, Call) and not task.delivered:
                faulty.append((move._replace(fate=DEAF), keys))
            if RAISES in kinds and isinstance(task.effect, Execute):
                faulty.append((move._replace(fate=RAISES), keys))
            if CANCELLED in kinds and task.name == "user":
                if isinstance(task.effect, Call) and not task.effect.keep:
                    faulty.append((move._replace(fate=CANCELLED_UNSENT), keys))
                if isinstance(task.effect, Call | Wait):
                    faulty.append((move._replace(fate=CANCELLED), keys))
        return faulty

    @staticmethod
    def own_first(
        world: World, found: list[tuple[Move, Footprint]]
    ) -> list[tuple[Move, Footprint]]:
        """Of moves that touch nothing but the registry of a process that nobody will declare dead
        it does not matter when they come: let them come first."""
        for move, keys in found:
            process = world.processes[move.who]
            if keys == frozenset({process.me.registry}) and not process.doomed:
                return [option for option in found if option[0][:2] == move[:2]]
        return found

    def do(self, world: World, move: Move) -> int:
        """Make a move; the result is how many faults it counts for."""
        world.do(move)
        if move.fate in {"kill", "pause"}:
            process = world.processes[move.who]
            world.survive(process)
            if move.fate == "pause" and self.scenario.beats:
                world.beat(process)
        return int(move.fate in {"kill", "pause", DEAF, RAISES, CANCELLED, CANCELLED_UNSENT})

    def run(self, most: int = 10**9) -> Explored:
        """Explore everything, or so many interleavings.

        Raises:
            Violation: With the trace.
        """
        result, calls = self.result, self.link.calls
        stack: list[Node] = []
        while result.interleavings < most:
            if self.run_once(stack):
                result.interleavings += 1
            else:
                result.cut += 1
            while stack:
                stack[-1].at += 1
                if stack[-1].at < len(stack[-1].options):
                    break
                stack.pop()
            else:
                result.complete = True
                break
        result.calls = self.link.calls - calls
        return result

    def run_once(self, stack: list[Node]) -> bool:
        """One run: what the stack says, then the first choice each time. Is it a new one?"""
        world = self.world()
        faults = 0
        for node in stack[:-1]:
            faults += self.do(world, node.options[node.at][0])
        # What is before was checked when it was new.
        world.checking = True
        if stack:
            faults += self.do(world, stack[-1].options[stack[-1].at][0])
        while options := self.options(world, faults):
            asleep = stack[-1].asleep_below() if stack else {}
            awake = [option for option in options if option[0] not in asleep]
            if not awake:
                return False
            stack.append(Node(awake, asleep))
            faults += self.do(world, awake[0][0])
        self.result.moves += len(stack)
        world.finish()
        if self.seen is None:
            self.seen = world
        else:
            self.seen.witness.seen.update(world.witness.seen)
        return True
