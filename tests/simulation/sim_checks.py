"""What users may rely on, checked while a simulation runs.

The `Witness` sees every call that reaches the server with its answer, and what the sink applies.
From these it knows who must be a member, who owns which batch and where each piece of data is; the
server's keys are compared with that after every step. It is no model of the server: of what a step
answers it checks only what a guarantee speaks of.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sim_link import Link

from phonon.errors import StaleOperationError
from phonon.protocol.effects import Call
from phonon.protocol.messages import Batch

#: Answers that give the caller a batch of a session that has just ended.
NEW_BATCH = {("leave", b"run"), ("complete", b"again"), ("fail", b"again"), ("replay", b"run")}


class Violation(AssertionError):  # noqa: N818 - that is what it is
    """A guarantee does not hold; the message begins with its number."""


class Grant(NamedTuple):
    """A lock that somebody has."""

    holder: str
    pid: bytes
    until: int
    token: int


@dataclass
class Place:
    """What has happened to one resource.

    Attributes:
        members: By id, until when.
        owner: Who has the running batch.
        token: The running batch's; 0 if nothing is running.
        highest: The highest token that was handed out.
        ended: When the last session ended; events are counted.
        lock: Who has the lock.
        applied: The batches in the sink, by token, in that order.
        executing: Ids that have begun to execute a batch, and not ended it.
        written: The highest token under which a holder of the lock has written.
        base: The resource.
    """

    members: dict[bytes, int] = field(default_factory=dict)
    owner: bytes = b""
    token: int = 0
    highest: int = 0
    ended: int = 0
    lock: Grant | None = None
    applied: dict[int, list[bytes]] = field(default_factory=dict)
    executing: dict[bytes, int] = field(default_factory=dict)
    written: int = 0
    base: bytes = b""

    def left(self, now: int) -> int:
        """Drop the expired members; how many are left?"""
        for pid in [pid for pid, until in self.members.items() if until <= now]:
            del self.members[pid]
        return len(self.members)


def items_of(partials: Iterable[bytes]) -> list[bytes]:
    """The pieces of data in partials: ``class|item,item``."""
    return [item for partial in partials for item in partial.partition(b"|")[2].split(b",")]


class Witness:
    """Watches a simulation.

    Args:
        link: The server.
        prefix: What the namespace's keys begin with.
    """

    def __init__(self, link: Link, prefix: bytes) -> None:
        self.link = link
        self.prefix = prefix
        self.event = 0
        self.places: defaultdict[bytes, Place] = defaultdict(Place)
        #: When each piece of data reached the server.
        self.stored: dict[bytes, int] = {}
        #: Data whose storing has returned.
        self.acknowledged: set[bytes] = set()
        #: Ids that count as dead, from the moment their deadline has passed.
        self.dead: set[bytes] = set()
        #: The last operation of an id on a resource, and its answer.
        self.last: dict[tuple[bytes, bytes], tuple[int, Any]] = {}
        #: Whether a leave was the last one out, by id, resource and number.
        self.told: dict[tuple[bytes, bytes, int], bool] = {}
        self.seen: Counter[str] = Counter()

    # -- what reaches the server

    def note(self, call: Call, answer: Any) -> bool:
        """A call has been delivered, maybe not for the first time. Did it change anything?"""
        kind = self.kind(call, answer)
        self.seen[f"{call.step or call.args[0].decode()} {kind}"] += 1
        if call.step == "renew":
            self.renewed(call, answer)
        if not call.numbered:
            return False
        self.event += 1
        pid, base = call.args[0], call.base
        number, before = self.last.get((pid, base), (0, None))
        if call.number < number:
            if not isinstance(answer, StaleOperationError):
                raise Violation(f"G4: {self.say(call)} came late and was answered {answer}")
            return False
        if isinstance(answer, Exception):
            if kind != "DeclaredDeadError":
                raise Violation(f"unexpected: {self.say(call)} was answered {answer}")
            return False
        if call.number == number:
            self.repeated(call, answer, before)
            return True
        self.last[pid, base] = call.number, answer
        place = self.places[base]
        place.base = base
        getattr(self, call.step)(place, pid, call.args, answer)
        if (call.step, answer[0]) in NEW_BATCH:
            self.new_token(place, call, answer[2])
            place.owner, place.token = pid, answer[2]
        return True

    @staticmethod
    def kind(call: Call, answer: Any) -> str:
        if isinstance(answer, Exception):
            return type(answer).__name__
        if isinstance(answer, list) and answer and isinstance(answer[0], bytes):
            return answer[0].decode() if call.numbered or call.step == "beat" else ""
        return ""

    @staticmethod
    def say(call: Call) -> str:
        return f"{call.step}{call.args!r} number {call.number}"

    def repeated(self, call: Call, answer: Any, before: Any) -> None:
        self.seen[f"{call.step} repeated"] += 1
        place = self.places[call.base]
        if answer[0] in {b"run", b"again"} and (place.owner, place.token) != (
            call.args[0],
            answer[2],
        ):
            raise Violation(f"G9: {self.say(call)}: the batch was taken over, and comes again")
        if answer[0] == b"lost" and before[0] in {b"run", b"again"}:
            if (place.owner, place.token) == (call.args[0], before[2]):
                raise Violation(f"G9: {self.say(call)}: the batch is not lost: {before}")
        elif answer[0] != before[0] or answer[2:6] != before[2:6]:
            raise Violation(f"G4: {self.say(call)} was answered {before}, repeated {answer}")

    def new_token(self, place: Place, call: Call, token: int) -> None:
        if token <= place.highest:
            raise Violation(f"G6: {self.say(call)}: {token} comes after {place.highest}")
        place.highest = token

    def store(self, partial: bytes) -> None:
        for item in items_of([partial]):
            if item in self.stored:
                raise Violation(f"G4: {item!r} was stored twice")
            self.stored[item] = self.event

    def join(self, place: Place, pid: bytes, args: Any, _: Any) -> None:
        place.members[pid] = self.link.now + args[1]

    def modify(self, place: Place, pid: bytes, args: Any, _: Any) -> None:
        place.members[pid] = self.link.now + args[1]

    def append(self, place: Place, pid: bytes, args: Any, _: Any) -> None:
        place.members[pid] = self.link.now + args[1]
        self.store(args[2])

    def leave(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        if args[3]:
            self.store(args[3])
            place.members[pid] = self.link.now + args[2]
        was_member = place.members.pop(pid, None) is not None
        left = place.left(self.link.now)
        last = was_member and not left
        if (bool(answer[4]) and not answer[3]) != last or answer[3] != left:
            raise Violation(f"G2: {pid!r} was told {answer}, members are {place.members}")
        self.told[pid, place.base, self.last[pid, place.base][0]] = last
        if (answer[0] == b"held") != (left > 0 and not args[1]):
            raise Violation(f"G2: {pid!r} was told {answer}, members are {place.members}")
        if answer[0] != b"held":
            place.ended = self.event
        if answer[0] == b"run" and place.token:
            raise Violation(f"G5: {pid!r} was given {answer} beside {place.token}")

    def complete(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        token = args[1]
        if self.ended(place, pid, token, answer) and token not in place.applied:
            raise Violation(f"G3: batch {token} was completed, but never applied")

    def fail(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        if answer[0] == b"retry":
            self.ended(place, pid, args[1], answer)
            place.owner, place.token = pid, args[1]
        else:
            self.ended(place, pid, args[1], answer)

    def entrust(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        if self.ended(place, pid, args[1], answer):
            place.owner, place.token = args[2], args[1]

    def resume(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        mine = (place.owner, place.token) == (pid, args[1])
        if mine != (answer[0] == b"run"):
            raise Violation(f"G9: {pid!r} resumes {args[1]}: {answer}; {place.owner!r} owns it")

    def ended(self, place: Place, pid: bytes, token: int, answer: Any) -> bool:
        """A process ends its work on a batch. Does that count?"""
        if place.executing.get(pid) == token:
            del place.executing[pid]
        mine = (place.owner, place.token) == (pid, token)
        if mine == (answer[0] == b"lost"):
            raise Violation(
                f"G9: {pid!r} ends batch {token}: {answer}; {place.owner!r} owns {place.token}"
            )
        if mine:
            place.owner, place.token = b"", 0
        return mine

    def replay(self, place: Place, pid: bytes, _: Any, answer: Any) -> None:
        if answer[0] == b"run" and place.token:
            raise Violation(f"G5: {pid!r} was given {answer} beside {place.token}")

    def discard(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        pass

    def recover(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        dead = args[1]
        dead = dead.encode() if isinstance(dead, str) else dead
        place.members.pop(dead, None)
        if not place.left(self.link.now):
            place.ended = self.event
        if place.lock is not None and place.lock.pid == dead:
            place.lock = None
        kind = answer[0]
        if place.token and place.owner == dead:
            if kind not in {b"run", b"later"}:
                raise Violation(f"G3: {pid!r} does not take over {place.token}: {answer}")
            if answer[2] != place.token:
                raise Violation(f"G6: batch {place.token} becomes {answer[2]} when taken over")
            place.owner = pid
        elif kind in {b"run", b"later"}:
            if place.token:
                raise Violation(f"G5: {pid!r} was given {answer} beside {place.token}")
            if answer[2] <= place.highest:
                raise Violation(f"G6: {answer[2]} comes after {place.highest}")
            place.owner, place.token, place.highest = pid, answer[2], answer[2]

    def lock(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        if answer[0] != b"granted":
            return
        holder, token, until = args[1], answer[2], self.link.now + args[2]
        held = place.lock
        if held is not None and held.until > self.link.now:
            if held.holder != holder or held.token != token:
                raise Violation(f"G13: {holder} is granted {token} beside {held}")
            return
        if token <= place.highest:
            raise Violation(f"G6: lock token {token} comes after {place.highest}")
        place.highest = token
        place.lock = Grant(holder, pid, until, token)

    def unlock(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        held = place.lock
        mine = held is not None and held.holder == args[1] and held.until > self.link.now
        if mine != (answer[0] == b"released"):
            raise Violation(f"G13: {pid!r} releases {args[1]}: {answer}; held: {held}")
        if mine:
            place.lock = None

    def renewed(self, call: Call, answer: Any) -> None:
        pid, lease, lock_lease, *holders = call.args
        place = self.places[call.base]
        if answer[0]:
            place.members[pid] = self.link.now + lease
        held = place.lock
        for holder, mine in zip(holders, answer[1:], strict=True):
            has = held is not None and held.holder == holder and held.until > self.link.now
            if has != bool(mine):
                raise Violation(f"G13: {holder} renews {held} and is told {answer}")
            if has and held is not None:
                place.lock = held._replace(until=self.link.now + lock_lease)

    # -- what reaches the sink

    def execute(self, pid: bytes, base: bytes, batch: Batch) -> bool:
        """Apply a batch in a transaction, if its token is new. Was it?"""
        place = self.places[base]
        token = batch.token
        others = place.executing.keys() - {pid} - self.dead
        if others and pid not in self.dead:
            raise Violation(f"G5: {pid!r} executes {token} beside {others}")
        place.executing[pid] = token
        items = items_of(batch.partials)
        last = max(place.applied, default=0)
        if pid not in self.dead and (
            token < last or (token == last and items != place.applied[last])
        ):
            raise Violation(f"G6: {pid!r} executes {token}: {items}, but the sink has {last}")
        early = [item for item in items if self.stored[item] > place.ended]
        if early:
            raise Violation(f"G7: batch {token} has data of the next session: {early}")
        if token <= last:
            self.seen["sink skips"] += 1
            return False
        twice = [i for i in items if any(i in applied for applied in place.applied.values())]
        if twice or len(set(items)) < len(items):
            raise Violation(f"G4: batch {token} of {items} applies {twice or items} twice")
        place.applied[token] = items
        self.seen["sink applies"] += 1
        return True

    def write(self, pid: bytes, base: bytes, token: int) -> None:
        """The holder of a lock writes under its token."""
        place = self.places[base]
        if token < place.written:
            held = place.lock
            if held is not None and held.token == token and held.until > self.link.now:
                raise Violation(f"G13: {pid!r} holds {held}, but {place.written} has written")
            self.seen["zombie's write refused"] += 1
            return
        place.written = token
        self.seen["written under a lock"] += 1

    # -- what must be true after every step

    def check(self, base: bytes) -> None:
        """Compare a resource's keys with what must be there."""
        members, partials, batch, owner, token, parked, unnamed = self.link.look(base, self.prefix)
        place = self.places[base]
        now = self.link.now
        live = {
            pid for pid, until in zip(members[::2], members[1::2], strict=True) if int(until) > now
        }
        must = {pid for pid, until in place.members.items() if until > now}
        if live != must:
            raise Violation(f"G1: the members are {live}, should be {must}")
        if (owner, int(token or 0)) != (place.owner, place.token):
            raise Violation(f"G5: {owner!r} owns {token!r}, not {place.owner!r} {place.token}")
        if unnamed:
            raise Violation(f"G8: the registries of {unnamed} do not name {base!r}")
        there = Counter(items_of([*partials, *batch, *parked]))
        twice = [item for item, times in there.items() if times > 1]
        if twice:
            raise Violation(f"G4: {twice} is stored twice")
        self.check_kept(base, there)

    def check_kept(self, base: bytes, there: Iterable[bytes]) -> None:
        applied = self.places[base].applied.values()
        tag = base[len(self.prefix) + 2 : -1] + b"-"
        kept = {*there, *(item for items in applied for item in items)}
        lost = [item for item in self.stored if item.startswith(tag) and item not in kept]
        if lost:
            raise Violation(f"G3: {lost} was stored and is nowhere")

    # -- what must be true at the end

    def check_end(self) -> None:
        """Everything has been finished: all data is in the sink, and nothing is left."""
        for base, place in self.places.items():
            if place.members or place.token:
                raise Violation(f"G8: {base!r} still has {place.members}, batch {place.token}")
            if list(place.applied) != sorted(place.applied):
                raise Violation(f"G5: batches of {base!r} came in order {list(place.applied)}")
        done = Counter(
            item
            for place in self.places.values()
            for items in place.applied.values()
            for item in items
        )
        lost = sorted(self.acknowledged - done.keys())
        lost += sorted(self.stored.keys() - done.keys())
        if lost:
            raise Violation(f"G3: {lost} was stored, but never executed")
        if any(times > 1 for times in done.values()):
            raise Violation(f"G4: executed twice: {done}")
        left = [
            key
            for key in self.link.expect("KEYS", self.prefix + b"*")
            if not self.may_stay(key, key[len(self.prefix) :])
        ]
        if left:
            raise Violation(f"G11: {left} stays behind")

    def may_stay(self, key: bytes, name: bytes) -> bool:
        if name.endswith((b"}:memory", b"}:fence")):
            return True
        # The place in line of a waiter that died, and a wake-up that nobody took, expire.
        if b"}:wake:" in name or name.endswith((b"}:queue", b"}:waiting")):
            return bool(self.link.expect("PTTL", key) > 0)
        # Like every registry that of an heir may name too many: whoever was about to leave it a
        # batch has died.
        if name.startswith(b"{@class:"):
            return True
        return name.endswith(b"}:holds") and self.link.send("GET", key) == b"dead"
