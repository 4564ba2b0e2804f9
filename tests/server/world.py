"""Random schedules: processes that use one resource on a real server, with calls that arrive late,
twice, or not at all. Every answer is compared with the model's; a `Witness` checks the rest.

A schedule is plain data, a list of moves, so that one that fails can be shrunk, printed and
repeated. A move that makes no sense where it stands (a repeat before the first call) does nothing.
"""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import redis
from model import DeadError, Model, StaleError, Violation
from steps import Answer, Command, Lab, Process, settled
from witness import MEMORY_MS, PLUS, Witness, expect

from phonon.protocol.compaction import digest
from phonon.protocol.keys import Keys

LEASES = (30_000, 5_000)
# Milliseconds that pass at once: within a lease, past a waiter's patience, past each lease, and
# a clock that is set back.
JUMPS = (1, 201, 400, 2_001, 5_000, 11_000, 31_000, -3_000)

#: What becomes of a call. Every call whose reply is lost is repeated before the next one.
FATES = ("answered", "reply lost", "request lost", "given up")


class Move(NamedTuple):
    """One move of a schedule.

    Attributes:
        action: The name of a method of `World`.
        who: Which process.
        what: Which variant; each action makes of it what it needs.
        fate: What becomes of the call.
    """

    action: str
    who: int
    what: int = 0
    fate: str = "answered"


#: The actions, and how often each is chosen.
WEIGHTS = {
    "pause": 1,
    "append": 8,
    "compact": 3,
    "leave": 8,
    "join": 4,
    "complete": 5,
    "fail": 4,
    "resume": 2,
    "modify": 1,
    "meet": 1,
    "lock": 6,
    "unlock": 4,
    "notice": 3,
    "renew": 1,
    "advance": 2,
    "repeat": 3,
    "stale": 2,
    "late": 2,
    "take_over": 4,
    "entrust": 2,
    "replay": 2,
    "discard": 1,
    "forget": 1,
}
#: How many variants of a move there are.
VARIANTS = 12


@dataclass
class Actor:
    """A process of a schedule.

    Attributes:
        process: Its end of the resource.
        token: The batch that it believes to be its own, the last one if it has none.
        pending: A call whose answer it still wants.
        delivered: Its calls that have arrived, oldest first.
        given_up: Calls that were lost on their way, and may arrive after all.
        read: Partials that it has read to merge them, and where they begin.
    """

    process: Process
    token: int = 0
    pending: Command | None = None
    delivered: list[Command] = field(default_factory=list)
    given_up: list[Command] = field(default_factory=list)
    read: tuple[int, list[bytes]] = 0, []


class World:
    """Some processes and one resource.

    Args:
        lab: The library to try.
        processes: How many.
        colocated: Whether steps write the registries, or the processes themselves.
    """

    _numbers = itertools.count()

    def __init__(self, lab: Lab, processes: int, *, colocated: bool) -> None:
        self.lab = lab
        self.colocated = colocated
        namespace = f"{lab.namespace}.{next(self._numbers)}"
        keys = self.keys = Keys(namespace)
        self.names = itertools.count(2)
        #: Registries of those that went on under another id.
        self.former: list[bytes] = []
        #: Stands for a class that none of them has.
        self.heir = Process(lab, "class:C", "x", keys, colocated=colocated)
        self.actors = [
            Actor(Process(lab, name, "x", keys, colocated=colocated)) for name in "abcd"[:processes]
        ]
        lab.move_to(0)
        self.latest = 0
        self.base = keys.base("x")
        self.model = Model(lab.now)
        self.witness = Witness(lab, namespace, self.base)
        self.payloads = itertools.count()
        #: How often which step was answered how: shows what the schedules have reached.
        self.seen: Counter[str] = Counter()

    def run(self, schedule: Sequence[Move]) -> Counter[str]:
        """Do what the schedule says, then end everything.

        Raises:
            Violation: With the moves that led to it.
        """
        done = 0
        try:
            for move in schedule:
                done += 1
                actor = self.actors[move.who % len(self.actors)]
                getattr(self, move.action)(actor, move)
            self.drain()
        except Violation as violation:
            moves = "\n".join(f"    {move!r}," for move in schedule[:done])
            violation.add_note(
                f"run(lab, {len(self.actors)}, [\n{moves}\n], colocated={self.colocated})"
            )
            raise
        finally:
            self.lab.client.delete(self.base + b":memory")
        return self.seen

    def drain(self) -> None:
        """Everybody gets the answers that are missing and leaves; every batch is executed."""
        for who, actor in enumerate(self.actors):
            self.settle(actor)
            for what in range(4):
                self.unlock(actor, Move("unlock", who, what))
            self.leave(actor, Move("leave", who, 2))
        while self.witness.executing:
            if self.heir.id in self.witness.executing:
                self.recover(self.actors[0], self.heir, "answered")
            self.complete(self.actors[0], Move("complete", 0, 1))
        # What names too much: those that nobody comes back to in this world.
        self.lab.client.delete(self.heir.registry, *self.former)
        if self.model.parties:
            # Those who never came are not waited for.
            self.lab.client.delete(self.base + b":parties", self.base + b":modified")
            self.model.parties = 0
            self.model.came.clear()
            self.model.modified.clear()
        self.model.registries.pop(self.heir.id, None)
        for who, actor in enumerate(self.actors):
            # Clears what a batch that was lost has left in its registry.
            self.leave(actor, Move("leave", who, 2))
        self.witness.check_end()

    # -- moves

    def pause(self, _actor: Actor, _move: Move) -> None:
        """Nothing: the move that others shrink to."""

    def join(self, actor: Actor, move: Move) -> None:
        self.settle(actor)  # it may have to take another name
        put_back = (actor.process.id, 2) if move.what % 4 == 0 else ()
        self.call(actor, move.fate, "join", LEASES[move.what % 2], *put_back)

    def modify(self, actor: Actor, move: Move) -> None:
        self.call(actor, move.fate, "modify", LEASES[move.what % 2], 1 + move.what % 3)

    def append(self, actor: Actor, move: Move) -> None:
        partial = b"p%d" % next(self.payloads)
        self.call(actor, move.fate, "append", LEASES[move.what % 2], partial)

    def compact(self, actor: Actor, move: Move) -> None:
        """Merge some neighbours: as they are, or as they were when it looked before."""
        first = move.what % 4 * len(self.model.partials) // 4
        last = first + 1 + move.what % 5
        if move.what % 3 == 1:
            answer = list(actor.process.ask("candidates", first, last))
            expect("the candidates", answer, self.model.candidates(first, last))
            actor.read = answer[0], answer[2:]
        elif move.what % 3 == 2:
            actor.read = first, list(actor.process.ask("session", first, last))
            expect("the session", actor.read[1], self.model.partials[first : last + 1])
        first, partials = actor.read
        groups = 1 + (move.what % 2 and len(partials) > 2)
        size = max(1, -(-len(partials) // groups))
        merged = [PLUS.join(partials[i : i + size]) for i in range(0, len(partials), size)]
        args = (first, len(partials), digest(partials), *merged)
        if partials:
            self.call(actor, move.fate, "compact", *args)

    def leave(self, actor: Actor, move: Move) -> None:
        partial = b"p%d" % next(self.payloads) if move.what % 2 else b""
        self.call(actor, move.fate, "leave", int(move.what % 6 == 0), LEASES[0], partial)

    def complete(self, actor: Actor, move: Move) -> None:
        actor, token = self.executor(actor, move)
        self.call(actor, move.fate, "complete", token)

    def fail(self, actor: Actor, move: Move) -> None:
        actor, token = self.executor(actor, move)
        self.call(actor, move.fate, "fail", token, f"error {move.what}", 500, 1 + move.what % 3)

    def resume(self, actor: Actor, move: Move) -> None:
        actor, token = self.executor(actor, move)
        self.call(actor, move.fate, "resume", token)

    def executor(self, actor: Actor, move: Move) -> tuple[Actor, int]:
        """Who is to end which batch: mostly the one that has one, sometimes another process, or
        one that believes to have one; sometimes an earlier batch."""
        owners = [each for each in self.actors if each.process.id in self.witness.executing]
        if owners and move.what % 4:
            actor = owners[0]
        self.settle(actor)  # it may be about to learn that it has one
        earlier = [token for token, _ in self.witness.started if token < actor.token]
        return actor, earlier[-1] if earlier and move.what == VARIANTS - 1 else actor.token

    def lock(self, actor: Actor, move: Move) -> None:
        self.settle(actor)  # it may have to take another name
        holder = self.holder(actor, move.what)
        lease, queue = LEASES[move.what % 3 == 0], int(move.what % 5 != 0)
        self.call(actor, move.fate, "lock", holder, lease, queue, b"main")

    def holder(self, actor: Actor, what: int) -> bytes:
        """Two exclusive and two shared ones of each process; three processes use a semaphore."""
        if len(self.actors) == 3:
            return actor.process.holder(f"{what % 4}s2")
        return actor.process.holder(f"{what % 2}{'s' * (what // 2 % 2)}")

    def meet(self, actor: Actor, move: Move) -> None:
        self.settle(actor)  # it may have to take another name
        self.call(actor, move.fate, "meet", LEASES[move.what % 2], 1 + move.what % 3)

    def unlock(self, actor: Actor, move: Move) -> None:
        self.settle(actor)  # it may have to take another name
        self.call(actor, move.fate, "unlock", self.holder(actor, move.what))

    def notice(self, actor: Actor, move: Move) -> None:
        """A waiter takes its wake-up."""
        holder = self.holder(actor, move.what)
        taken = self.lab.client.lpop((self.base + b":wake:" + holder).decode())
        times = self.model.woken.get(holder, [])
        assert taken == (b"%d" % times.pop(0) if times else None)
        if not times:
            self.model.woken.pop(holder, None)

    def renew(self, actor: Actor, move: Move) -> None:
        self.tick(1)
        pid = actor.process.id
        holders = [self.holder(actor, what) for what in range(move.what % 5)]
        words = [word for holder in holders for word in (holder, LEASES[1])]
        answer = list(actor.process.ask("renew", LEASES[0], *words))
        expect(f"renew by {pid!r}", answer, self.model.renew(pid, LEASES[0], *words))
        self.check()

    def advance(self, _actor: Actor, move: Move) -> None:
        self.tick(JUMPS[move.what % len(JUMPS)])
        self.check()

    def repeat(self, actor: Actor, _move: Move) -> None:
        """The network delivers a process's last call once more."""
        if actor.delivered and not actor.pending:
            self.deliver(actor, actor.delivered[-1])

    def stale(self, actor: Actor, move: Move) -> None:
        """The network delivers an earlier call once more."""
        if len(actor.delivered) > 1:
            self.deliver(actor, actor.delivered[move.what % (len(actor.delivered) - 1)])

    def late(self, actor: Actor, move: Move) -> None:
        """A call arrives that its process has given up, before or after its next one."""
        if actor.given_up:
            self.deliver(actor, actor.given_up.pop(move.what % len(actor.given_up)))

    def take_over(self, actor: Actor, move: Move) -> None:
        """Another process was declared dead; mostly the one that has the batch, or its heir."""
        others = [each.process for each in self.actors if each is not actor]
        dead = others[move.what % len(others)]
        batch = self.model.batch
        if batch and move.what % 4:
            owners = [other for other in (*others, self.heir) if other.id == batch.owner]
            dead = owners[0] if owners else dead
        self.recover(actor, dead, move.fate)

    def recover(self, actor: Actor, dead: Process, fate: str) -> None:
        died = int(dead is not self.heir)
        registry = (dead.registry,) if self.colocated else ()
        self.call(actor, fate, "recover", dead.id, died, LEASES[0], *registry)

    def entrust(self, actor: Actor, move: Move) -> None:
        actor, token = self.executor(actor, move)
        self.heir.enter()
        self.model.registries.setdefault(self.heir.id, self.lab.now)
        self.call(actor, move.fate, "entrust", token, self.heir.id)

    def replay(self, actor: Actor, move: Move) -> None:
        self.call(actor, move.fate, "replay", self.parked(actor, move))

    def discard(self, actor: Actor, move: Move) -> None:
        self.call(actor, move.fate, "discard", self.parked(actor, move))

    def parked(self, actor: Actor, move: Move) -> int:
        """A parked batch, if there is one; now and then one that is not."""
        tokens = sorted(self.model.parked)
        return tokens[move.what % len(tokens)] if tokens and move.what % 5 else actor.token

    def forget(self, _actor: Actor, _move: Move) -> None:
        """Nothing happens for so long that the memory expires, and no call is under way."""
        for actor in self.actors:
            self.settle(actor)
            actor.delivered.clear()
            actor.given_up.clear()
        self.tick(self.latest + MEMORY_MS - self.lab.offset)
        self.lab.client.delete(self.base + b":memory")
        self.model.memory.clear()
        self.check()

    def be_reborn(self, actor: Actor) -> None:
        """Go on under another id, as a process does that was declared dead.

        Its threads give back what they have locked under the old one, and wait no more.
        """
        for what in range(4):
            process = actor.process
            command = process.command("unlock", self.holder(actor, what))
            process.let_go(self.deliver(actor, command))
        self.former.append(actor.process.registry)
        name = f"{actor.process.id.decode()[0]}{next(self.names)}"
        actor.process = Process(self.lab, name, "x", self.keys, colocated=self.colocated)
        actor.pending = None
        actor.delivered.clear()
        actor.given_up.clear()

    # -- calls

    def tick(self, ms: int) -> None:
        self.lab.advance(ms)
        self.latest = max(self.latest, self.lab.offset)
        self.model.now = self.lab.now

    def call(self, actor: Actor, fate: str, step: str, *args: Any) -> None:
        """A process makes a call, after it has got the answer of its last one."""
        self.settle(actor)
        command = actor.process.command(step, *args)
        if step not in ("compact", "complete", "fail", "resume", "unlock", "entrust", "discard"):
            actor.process.hold(lock=step == "lock")
        if fate == "given up" and step not in ("join", "append", "modify", "compact"):
            fate = "request lost"  # only these are ever given up
        if fate == "answered":
            self.receive(actor, self.deliver(actor, command))
        elif fate == "given up":
            actor.given_up.append(command)
        else:
            actor.pending = command
            if fate == "reply lost":
                self.deliver(actor, command)

    def settle(self, actor: Actor) -> None:
        """Repeat the call whose answer is missing."""
        command, actor.pending = actor.pending, None
        if command:
            self.receive(actor, self.deliver(actor, command))

    def receive(self, actor: Actor, answer: Answer) -> None:
        if answer[0] == b"dead":
            self.be_reborn(actor)
            return
        actor.process.let_go(answer)
        if answer[0] in (b"run", b"again", b"later"):
            actor.token = answer[2]

    def deliver(self, actor: Actor, command: Command) -> Answer:
        """A call reaches the server, for the first time, again, or too late."""
        self.tick(1)
        pid = actor.process.id
        first_time = command.number > self.model.memory.get(pid, (0, []))[0]
        if not first_time:
            self.witness.look()  # the process may have written its registry since
        before = self.witness.keys
        answer = self.send(actor.process, command)
        token = answer[2] if answer[0] in (b"run", b"again", b"granted") else None
        try:
            expected = self.model.apply(pid, command, token)
        except StaleError:
            expected = [b"stale"]
        except DeadError:
            expected = [b"dead"]
        expect(f"{command} of {pid!r}", answer, expected)
        self.seen[f"{command.step} {answer[0].decode()}"] += 1
        if first_time and answer != [b"dead"]:
            actor.delivered.append(command)
            self.witness.note(pid, command, answer)
        self.check()
        if not first_time and settled(self.witness.keys) != settled(before):
            raise Violation(f"G4: {command} of {pid!r} came again and changed something")
        return answer

    def send(self, process: Process, command: Command) -> Answer:
        try:
            answer = process.send(command)
        except redis.ResponseError as error:
            if "PHONONDEAD" in str(error):
                return [b"dead"]
            if "PHONONSTALE" not in str(error):
                raise Violation(f"{command} of {process.id!r}: {error}") from error
            return [b"stale"]
        if command.step == "leave" and answer[0] != b"held" and len(answer) > 5:
            answer[5] = dict(zip(answer[5][::2], answer[5][1::2], strict=True))
        return answer

    def check(self) -> None:
        count = self.actors[0].process.count()
        self.witness.check(self.model, count, colocated=self.colocated)


def run(
    lab: Lab, processes: int, schedule: Sequence[Move], *, colocated: bool = True
) -> Counter[str]:
    """Run a schedule in a world of its own; the result is what was answered how often."""
    return World(lab, processes, colocated=colocated).run(schedule)


def random_schedule(rng: random.Random, length: int) -> list[Move]:
    actions = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=length)
    fates = rng.choices(FATES, (12, 3, 2, 1), k=length)
    return [
        Move(action, rng.randrange(4), rng.randrange(VARIANTS), fate)
        for action, fate in zip(actions, fates, strict=True)
    ]


def run_random(lab: Lab, seed: int, schedules: int, length: int) -> Counter[str]:
    """Run random schedules, which depend on nothing but the seed."""
    seen: Counter[str] = Counter()
    for number in range(schedules):
        rng = random.Random(f"{seed} {number}")  # noqa: S311 - repeatable, no secret
        processes, colocated = rng.randint(2, 4), rng.random() < 0.7
        seen += run(lab, processes, random_schedule(rng, length), colocated=colocated)
    return seen
