"""Random and written schedules of calls: answered, lost, repeated, late or refused.

After each call the answers and all keys are compared with the model, and the guarantees are checked
from what the processes were told; at the end of a schedule nothing may be left.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack
import redis

from phonon._protocol.answers import Reply
from phonon._protocol.operations import Operation
from steps.lab import BATCH_SCORE, LEFT_SCORE, Lab, Proc, Violation
from steps.model import Model, places_of
from support import operations as ops

QUEUE = b"class:C"
PLUS = b"+"


class Digest(str):
    """A digest that remembers what it is of, for the model."""

    __slots__ = ("partials",)
    partials: list[bytes]


def digest(partials: list[bytes]) -> Digest:
    total = b"".join(b"%d:%b" % (len(p), p) for p in partials)
    made = Digest(hashlib.sha1(total, usedforsecurity=False).hexdigest())
    made.partials = partials
    return made


class Move(NamedTuple):
    """One call of one process; what it is about depends on ``what``."""

    actions: tuple[str, ...]
    who: int
    what: int = 0
    fate: str = "answered"


WEIGHTS = {
    "join": 3,
    "append": 8,
    "modify": 2,
    "leave": 9,
    "meet": 1,
    "complete": 8,
    "fail": 4,
    "resume": 2,
    "replay": 2,
    "discard": 1,
    "hand_off": 2,
    "compact": 3,
    "lock": 8,
    "unlock": 6,
    "renew": 2,
    "restore": 1,
}
#: Not calls: something happens to the world. They are done alone.
EVENTS = {"advance": 5, "take_mail": 3, "die": 3, "reap_class": 2, "repeat": 3, "stale": 3}
FATES = ("answered",) * 8 + ("reply lost", "reply lost", "duplicated", "refused", "refused late")


def expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Violation(f"{what}\n  is        {found}\n  should be {expected}")


def normal(answer: Any) -> Any:
    """An answer with modifications as a dict, so that their order does not matter."""
    if isinstance(answer, list):
        place = 3 if answer[0] in (Reply.LAST, Reply.DEFERRED) else 7
        at = answer[place] if len(answer) > place and answer[0] != Reply.REAPED else None
        if isinstance(at, list) and answer[0] in (
            Reply.LAST,
            Reply.DEFERRED,
            Reply.RUN,
            Reply.AGAIN,
        ):
            answer = list(answer)
            answer[place] = dict(zip(at[::2], at[1::2], strict=True))
        return [word if not isinstance(word, Reply) else int(word) for word in answer]
    return int(answer)


def parts(partials: list[bytes]) -> list[bytes]:
    return [part for partial in partials for part in partial.split(PLUS)]


class World:
    """Some processes, two resources, and all that has happened to them."""

    def __init__(self, lab: Lab, processes: int, *, semaphore: bool = False) -> None:
        self.lab = lab
        self.semaphore = semaphore
        self.model = Model()
        self.seen: Counter[str] = Counter()
        self.births = 0
        self.payloads = 0
        self.processes = [self.be_born() for _ in range(processes)]
        self.tokens: dict[bytes, list[tuple[int, bytes]]] = {b"x": [], b"y": []}
        self.former: list[Proc] = []
        self.stored: Counter[bytes] = Counter()
        self.executed: Counter[bytes] = Counter()
        self.discarded: Counter[bytes] = Counter()

    def be_born(self) -> Proc:
        self.births += 1
        return self.lab.process(f"p{self.births}")

    # -- moves

    def run(self, schedule: Sequence[Move]) -> Counter[str]:
        done = 0
        try:
            for done, move in enumerate(schedule, 1):  # noqa: B007 - for the message
                self.move(move)
            self.drain()
        except redis.RedisError as error:
            raise Violation(f"after {schedule[:done]}: {error}") from error
        except Violation as violation:
            moves = "\n".join(f"    {move!r}," for move in schedule[:done])
            violation.add_note(f"run(lab, {len(self.processes)}, [\n{moves}\n])")
            raise
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise Violation(f"after {schedule[:done]}: nonsense was answered: {error!r}") from error
        return self.seen

    def move(self, move: Move) -> None:
        process = self.processes[move.who % len(self.processes)]
        if move.actions[0] in EVENTS:
            getattr(self, move.actions[0])(process, move.what)
            self.check()
            return
        # Some of the operations of one call are about the same resource, some about the other.
        made = [
            self.make(process, action, move.what + 7 * j) for j, action in enumerate(move.actions)
        ]
        self.call(process, [operation for operation in made if operation is not None], move.fate)

    def make(self, process: Proc, action: str, what: int) -> Operation | None:
        name = b"xxy"[what % 3 : what % 3 + 1]
        r = self.model.at(name)
        holder = self.holder(process, what)
        # Half of the time it is the owner's batch, otherwise one of before or somebody else's.
        token = r.batch.token if r.batch else 5
        if what % 7 == 3 and self.tokens[name]:
            token = self.tokens[name][0][0]
        match action:
            case "join":
                return ops.join(0, name)
            case "append":
                return ops.append(0, name, self.payload())
            case "modify":
                return ops.modify(0, name, 1 + what % 3)
            case "restore":
                return ops.restore(0, name, {process.id: 2, b"q": 1})
            case "leave":
                return ops.leave(0, name, self.payload() if what % 2 else b"", what // 3 % 4)
            case "meet":
                first = process.id if what % 5 else b"p1"
                return ops.meet(0, name, 1 + what % 3, first)
            case "complete":
                return ops.complete(0, name, token)
            case "fail":
                return ops.fail(0, name, token, b"error %d" % what, 500, 1 + what % 3)
            case "resume":
                return ops.resume(0, name, token)
            case "hand_off":
                return ops.hand_off(0, name, token, QUEUE)
            case "replay" | "discard":
                token = min(r.parked, default=token) if what % 5 else token
                return (ops.replay if action == "replay" else ops.discard)(0, name, token)
            case "lock":
                lease = 700 * (what % 3 == 0)
                return ops.lock(0, name, holder, queue=what % 5 != 0, lease_ms=lease, thread="main")
            case "unlock":
                return ops.unlock(0, name, holder)
            case "renew":
                return ops.renew(0, name, holder, (0, 900, 300)[what // 4 % 3])
            case "compact":
                return self.compaction(name, what)
        raise AssertionError(action)

    def payload(self) -> bytes:
        self.payloads += 1
        return b"d%d" % self.payloads

    def holder(self, process: Proc, what: int) -> str:
        suffix = "s2" if self.semaphore else "s" * (what // 2 % 2)
        return f"{process.id.decode()}/{what % 2}{suffix}"

    def compaction(self, name: bytes, what: int) -> Operation | None:
        partials = self.model.at(name).partials
        first = what % 3 * len(partials) // 3
        chosen = partials[first : first + 2 + what % 3]
        if len(chosen) < 2:
            return None
        if what % 5 == 0:
            chosen = [chosen[0], chosen[0]]  # not what is there
            if partials[first : first + 2] == chosen:
                return None
        merged = [PLUS.join(chosen)]
        return ops.compact(0, name, first, len(chosen), digest(chosen), merged)

    def advance(self, _process: Proc, what: int) -> None:
        self.lab.advance((1, 150, 300, 800, 2500)[what % 5])

    def take_mail(self, process: Proc, _what: int) -> None:
        process.take_mail()
        self.model.mail.pop(process.id, None)

    def repeat(self, process: Proc, _what: int) -> None:
        """The network delivers a process's last call once more."""
        if process.sent:
            self.deliver_again(process, process.sent[-1])

    def stale(self, process: Proc, what: int) -> None:
        """The network delivers an earlier call of a process, living or dead, once more."""
        former = self.former[what % len(self.former)] if self.former and what % 2 else process
        if former.sent and (former is not process or len(former.sent) > 1):
            self.late(former, former.sent[what % (len(former.sent) - (former is process))])

    def late(self, process: Proc, call: Any) -> None:
        before = self.lab.dump()
        try:
            process.send_raw(call)
            error = ""
        except redis.ResponseError as refusal:
            error = str(refusal)
        # A call is kept by the client until it is answered: its number is never the last one here,
        # except when it was refused, and its number used up by an empty call.
        kinds: tuple[str, ...] = ("PHONONSTALE", "PHONONLOST", "PHONONFENCED")
        if process.id in self.model.fenced:
            kinds = ("PHONONFENCED", "PHONONLOST")
        if call.sequence == process.lane.answered and not error:
            kinds = ("",)
        if not error.startswith(kinds) or (not error and kinds != ("",)):
            raise Violation(f"G4: a late call was answered {error or 'as if it were new'}")
        expect("G4: the keys after a late call", self.lab.dump(), before)

    def die(self, dead: Proc, what: int) -> None:
        """A process dies or is a zombie; others take over, or it does so after its rebirth."""
        if len(self.processes) < 2:
            return
        self.former.append(dead)
        survivors = [process for process in self.processes if process is not dead]
        place = self.processes.index(dead)
        self.processes[place] = self.be_born()
        if what % 4 == 0:
            self.call(survivors[0], [ops.reap(0, dead.id, 100, recovers=False)], "answered")
            if what % 3 == 0:
                self.call(survivors[0], [ops.append(0, b"x", self.payload())], "answered")
        heir = self.processes[place] if what % 3 == 0 else survivors[what % len(survivors)]
        fate = "reply lost" if what % 5 == 0 else "answered"
        self.call(heir, [ops.reap(0, dead.id, 100, recovers=True)], fate)
        self.zombie(dead)

    def zombie(self, dead: Proc) -> None:
        """Check that the server refuses the call of a zombie."""
        dead.lane.enqueue(ops.append(0, b"x", b"zombie"))
        call = dead.lane.next_call()
        assert call is not None
        before = self.lab.dump()
        try:
            dead.send(call)
        except redis.ResponseError as refusal:
            if not str(refusal).startswith(("PHONONFENCED", "PHONONLOST")):
                raise Violation(f"G9: a zombie was told {refusal}") from refusal
        else:
            raise Violation("G9: a zombie's call was carried out")
        expect("G9: the keys after a zombie's call", self.lab.dump(), before)

    def reap_class(self, process: Proc, _what: int) -> None:
        self.call(process, [ops.reap(0, QUEUE, 100, recovers=True)], "answered")

    # -- calls

    def call(self, process: Proc, operations: list[Operation], fate: str) -> None:
        if not operations:
            return
        lane = process.lane
        for operation in operations:
            lane.enqueue(operation)
        self.exchange(process, fate)

    def exchange(self, process: Proc, fate: str) -> None:
        lane = process.lane
        call = lane.next_call()
        assert call is not None
        if fate == "refused":
            # Never arrived: an empty call under its number says so; a late copy changes nothing.
            lane.refuse(MemoryError("full"))
            self.after_refusal(process, call, carried_out=False)
            return
        reply = process.send(call)
        self.carry_out(process, call, reply)
        if fate == "reply lost":
            lane.no_answer()
            repeated = lane.next_call()
            if repeated is not call:
                raise Violation("G4: a call that was not answered is not repeated as it was")
            again = self.deliver_again(process, call)
            self.receive(process, again)
        elif fate == "refused late":
            lane.refuse(MemoryError("full"))
            self.after_refusal(process, call, carried_out=True)
        else:
            self.receive(process, reply)
            if fate == "duplicated":
                self.deliver_again(process, call)
        self.check()

    def receive(self, process: Proc, reply: Any) -> None:
        call = process.lane.call
        assert call is not None
        told = process.lane.receive(reply)
        expect("who is told", [each for each, _ in told], list(call.operations))
        decoded = process.decode(reply)
        expect("what they are told", [normal(a) for _, a in told], [normal(a) for a in decoded])

    def after_refusal(self, process: Proc, call: Any, *, carried_out: bool) -> None:
        lane = process.lane
        empty = lane.next_call()
        assert empty is not None
        if empty.sequence != call.sequence or empty.operations is not call.operations:
            raise Violation("a refused call's number is not used up")
        reply = process.send_raw(empty)
        told = lane.receive(reply)
        if carried_out:
            codes = [ops.code_of(a) for _, a in told if not isinstance(a, Exception)]
            if len(codes) != len(call.operations):
                raise Violation("G4: a call that was carried out is said to be refused")
        else:
            failed = [o for o, a in told if isinstance(a, MemoryError)]
            mixed = any(not o.frees for o in call.operations)
            refused = [o for o in call.operations if not (mixed and o.frees)]
            expect("those that are told of a refusal", failed, refused)
            expect("told besides", len(told), len(failed))
            self.late(process, call)
            rest = [o for o in call.operations if o not in failed]
            expect("whether something is sent again", lane.has_work, bool(rest))
            if rest:
                again = lane.next_call()
                expect("what is sent again", again and list(again.operations), rest)
                self.exchange(process, "answered")
        self.check()

    def carry_out(self, process: Proc, call: Any, reply: Any) -> None:
        answers = process.decode(reply)
        if len(answers) != len(call.operations):
            raise Violation(f"{len(answers)} answers to {call.operations}")
        self.model.now = self.lab.now
        contents = []
        for operation, answer in zip(call.operations, answers, strict=True):
            if isinstance(answer, list) and answer[0] == Reply.FAILED:
                raise Violation(f"{operation}: {answer[1]}")
            before = (
                self.model.at(operation.resource).batch if operation.resource in b"xy" else None
            )
            expected = self.model.apply(process.id, operation.words, answer)
            self.seen[f"{operation.code.name} {Reply(ops.code_of(answer)).name}"] += 1
            self.note(operation, expected, before)
            contents.append((operation, expected))
        # Contents are read after each operation; a later one of the call may have ended the batch.
        for (operation, expected), answer in zip(contents, answers, strict=True):
            if isinstance(answer, list) and answer[-1] is True:
                answer[-1] = [operation.words[3]]  # nothing but the partial that was sent
            expect(f"{operation} of {process.id!r}", normal(answer), normal(expected))

    def note(self, operation: Operation, answer: Any, before: Any) -> None:
        code, name = operation.code, operation.resource
        if code in (ops.Code.APPEND, ops.Code.LEAVE) and operation.words[-1]:
            self.stored[operation.words[-1]] += 1
        ended = ops.code_of(answer) in (Reply.DONE, Reply.AGAIN, Reply.PARKED)
        if code == ops.Code.COMPLETE and ended:
            self.executed.update(parts(before.partials))
        if code == ops.Code.DISCARD and answer == Reply.DISCARDED:
            self.discarded_one(name)
        if ops.code_of(answer) in (Reply.RUN, Reply.AGAIN):
            self.tokens[name].append((answer[3], b""))

    def discarded_one(self, _name: bytes) -> None:
        there = self.everywhere()
        self.discarded += self.stored - there - self.executed - self.discarded

    def everywhere(self) -> Counter[bytes]:
        there: Counter[bytes] = Counter()
        for r in self.model.resources.values():
            lists = [r.partials, *([r.batch.partials] if r.batch else [])]
            for partials in (*lists, *(parked[0] for parked in r.parked.values())):
                there.update(parts(partials))
        return there

    def deliver_again(self, process: Proc, call: Any) -> Any:
        """A repeat: the same answers, contents afresh, and nothing changes."""
        before = self.lab.dump()
        if process.id in self.model.fenced:
            self.late(process, call)
            return None
        try:
            reply = process.send_raw(call)
        except redis.ResponseError as refusal:
            if call.sequence < process.lane.sequence:
                return None  # its number was used up by a later call
            raise Violation(f"G4: a repeat was refused: {refusal}") from refusal
        if call.sequence < process.lane.answered:
            raise Violation("G4: an older call was answered")
        expect("G4: the keys after a repeat", self.lab.dump(), before)
        for operation, answer in zip(call.operations, process.decode(reply), strict=True):
            if isinstance(answer, list) and answer[0] in (Reply.RUN, Reply.AGAIN):
                batch = self.model.at(operation.resource).batch
                own = batch and (batch.owner, batch.token) == (process.id, answer[3])
                fresh = batch.partials if own and batch else False
                expect(f"the content with a repeat of {operation}", answer[-1], fresh)
        return reply

    # -- what must be true after each call

    def check(self) -> None:
        keys = self.lab.dump()
        state: dict[str, Any] = {}
        for name, content in keys.items():
            if name.startswith("parked:"):
                resource = self.model.at(name.partition(":")[2].encode())
                for token, packed in content.items():
                    entry = msgpack.unpackb(packed, raw=True)
                    _, error, attempts, owner, since = resource.parked[int(token)]
                    found = [entry[k] for k in (b"error", b"attempts", b"owner", b"since")]
                    expect("a parked batch's entry", found, [error, attempts, owner, since])
                state[name] = set(content)
            elif name.startswith("mailbox:"):
                state[name] = sorted(content)  # a reap takes resources in an order of its own
            elif not name.startswith(("lane", "registry:", "token")):
                state[name] = content
        expect("the keys", state, self.model.state())
        self.check_lanes(keys)
        self.check_registries(keys)
        self.check_guarantees()

    def check_lanes(self, keys: dict[str, Any]) -> None:
        living = {process.id for process in self.processes} - self.model.fenced
        expected = living | {dead for dead, left in self.model.remains.items() if left}
        expected -= {QUEUE}
        expect("the lanes", keys.get("lanes", set()), expected)
        for process in self.processes:
            if process.id in self.model.fenced:
                continue
            lane = keys.get(f"lane:{process.id.decode()}", {})
            if b"fenced" in lane:
                raise Violation(f"{process.id!r} is fenced and lives")
            known = process.lane.stamp or process.lane.number
            expect("the state of the lane", lane.get(b"state"), known)
        expect("the last token", int(keys["token"]) >= self.model.token, True)

    def check_registries(self, keys: dict[str, Any]) -> None:
        for process in self.processes:
            registry = keys.get(f"registry:{process.id.decode()}", {})
            for name, r in self.model.resources.items():
                member, locks, owns = r.responsible(process.id)
                loose = (process.id, name) in self.model.loose
                score = registry.get(name)
                if score is None:
                    if member or locks or owns:
                        raise Violation(f"G8: {process.id!r} is responsible for {name!r}")
                    continue
                if loose:
                    continue
                if not (member or locks or owns):
                    raise Violation(f"G11: the registry of {process.id!r} names {name!r}")
                classes = []
                if locks:
                    classes.append(score < 0)
                if owns:
                    classes.append(BATCH_SCORE <= score < LEFT_SCORE)
                if not locks and not owns:
                    classes.append(0 < score < BATCH_SCORE)
                if not any(classes):
                    raise Violation(f"the score of {name!r} for {process.id!r} is {score}")

    def check_guarantees(self) -> None:
        there = self.everywhere()
        if there + self.executed + self.discarded != self.stored:
            raise Violation("G3, G4: what is there and was executed is not what was stored")
        for r in self.model.resources.values():
            if r.lock and r.shared:
                raise Violation("G13: a lock is exclusive and shared")
            if any(len(r.shared) > places_of(holder) for holder in r.shared):
                raise Violation("G13: more than there are places")

    # -- the end

    def drain(self) -> None:
        """All leave and unlock, all batches are executed; then nothing may be left."""
        for process in self.processes:
            for name in (b"x", b"y"):
                holders = {self.holder(process, what) for what in range(4)}
                self.call(process, [ops.unlock(0, name, h) for h in sorted(holders)], "answered")
                self.call(process, [ops.leave(0, name)], "answered")
                r = self.model.at(name)
                if r.parties and process is self.processes[-1]:
                    # Those that have not come come now.
                    for other in range(r.parties):
                        self.call(process, [ops.meet(0, name, 1, b"z%d" % other)], "answered")
                    self.call(process, [ops.leave(0, name)], "answered")
        self.call(self.processes[0], [ops.reap(0, QUEUE, 100, recovers=True)], "answered")
        for process in self.processes * 3:
            for name, r in self.model.resources.items():
                if r.batch and r.batch.owner == process.id:
                    self.call(process, [ops.complete(0, name, r.batch.token)], "answered")
                elif r.parked and not r.batch:
                    token = min(r.parked)
                    self.call(process, [ops.discard(0, name, token)], "answered")
        for _ in range(40):
            self.finish_batches()
        for process in self.processes:
            for name in (b"x", b"y"):
                self.call(process, [ops.leave(0, name)], "answered")  # clears what the clock freed
                holders = {self.holder(process, what) for what in range(4)}
                self.call(process, [ops.unlock(0, name, h) for h in sorted(holders)], "answered")
        for process in self.processes:
            answer = process.close()
            expect("the last call", answer, int(Reply.CLOSED))
        left = {name for name in self.lab.dump() if not name.startswith("mailbox:")}
        markers = {f"lane:{process.id.decode()}" for process in self.former}
        if left - markers - {"token"}:
            raise Violation(f"G11: {left - markers - {'token'}} stays behind")
        if self.executed + self.discarded != self.stored:
            raise Violation("G3: not all was executed")

    def finish_batches(self) -> None:
        for process in self.processes:
            for name, r in self.model.resources.items():
                if r.batch and r.batch.owner == process.id:
                    self.call(process, [ops.complete(0, name, r.batch.token)], "answered")
                elif r.parked and not r.batch:
                    self.call(process, [ops.discard(0, name, min(r.parked))], "answered")


def run(
    lab: Lab, processes: int, schedule: Sequence[Move], *, semaphore: bool = False
) -> Counter[str]:
    """Run a schedule in a world of its own; the result is what was answered how often."""
    # The namespace is used anew: what the last world left are markers and the token.
    world = World(lab, processes, semaphore=semaphore)
    return world.run(schedule)


def random_schedule(rng: random.Random, length: int) -> list[Move]:
    actions, weights = [*WEIGHTS, *EVENTS], [*WEIGHTS.values(), *EVENTS.values()]
    schedule = []
    for _ in range(length):
        (action,) = rng.choices(actions, weights)
        chosen: tuple[str, ...] = (action,)
        if action in WEIGHTS and rng.random() < 0.35:
            more = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=rng.randint(1, 3))
            chosen = (action, *more)
        schedule.append(Move(chosen, rng.randrange(4), rng.randrange(420), rng.choice(FATES)))
    return schedule


def fresh(lab: Lab) -> None:
    keys: Any = lab.client.keys(lab.prefix + b"*")
    if keys:
        lab.client.delete(*keys)


def run_random(lab: Lab, seed: int, schedules: int, length: int) -> Counter[str]:
    """Run random schedules, which depend on nothing but the seed."""
    seen: Counter[str] = Counter()
    for number in range(schedules):
        rng = random.Random(f"{seed} {number}")
        schedule = random_schedule(rng, length)
        fresh(lab)
        try:
            seen += run(lab, rng.randint(2, 3), schedule, semaphore=number % 4 == 3)
        except Violation as violation:
            violation.add_note(f"schedule {number} of seed {seed}")
            raise
    return seen
