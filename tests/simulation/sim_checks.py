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


#: Within so many milliseconds a waiter that has asked is known to be in line.
CERTAIN_MS = 200


class Grant(NamedTuple):
    """A lock that somebody has, alone or with others."""

    pid: bytes
    until: int
    token: int


class Waiter(NamedTuple):
    """Somebody in line.

    Attributes:
        pid: Of which process.
        first: When it came, counted in events.
        arrived: When it came at the latest: if it has not asked for a while it may have lost its
            place, and come anew.
        asked: When it asked last, by the clock.
    """

    pid: bytes
    first: int
    arrived: int
    asked: int


def places_of(holder: str) -> float:
    """How many may hold a lock together with this one."""
    _, shared, places = holder.rpartition("/")[2].partition("s")
    return float(places or "inf") if shared else 1


def can_overtake(holder: str, waiter: str) -> bool:
    """Whether it is nothing to the one if the other goes in before it."""
    return places_of(holder) == places_of(waiter) == float("inf")


@dataclass
class Place:
    """What has happened to one resource.

    Attributes:
        members: By id, until when.
        owner: Who has the running batch.
        token: The running batch's; 0 if nothing is running.
        highest: The highest token that was handed out.
        ended: When the last session ended; events are counted.
        grants: Who has the lock, by holder.
        queue: Who waits for it.
        parties: How many processes are to come; 0 if that was not said.
        came: Those of them that have.
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
    grants: dict[str, Grant] = field(default_factory=dict)
    queue: dict[str, Waiter] = field(default_factory=dict)
    parties: int = 0
    came: set[bytes] = field(default_factory=set)
    applied: dict[int, list[bytes]] = field(default_factory=dict)
    executing: dict[bytes, int] = field(default_factory=dict)
    written: int = 0
    base: bytes = b""

    def left(self, now: int) -> int:
        """Drop the expired members; how many are left?"""
        for pid in [pid for pid, until in self.members.items() if until <= now]:
            del self.members[pid]
        return len(self.members)

    def is_over(self) -> bool:
        """Nobody is left. Are all there that were to come?"""
        if len(self.came) < self.parties:
            return False
        self.parties = 0
        self.came.clear()
        return True

    def holders(self, now: int) -> dict[str, Grant]:
        """Who has the lock now."""
        return {holder: grant for holder, grant in self.grants.items() if grant.until > now}

    def in_front(self, holder: str, now: int) -> list[str]:
        """Those in line, for certain, whom a holder must not overtake."""
        mine = self.queue.get(holder)
        if mine is not None and now - mine.asked > CERTAIN_MS:
            return []
        return [
            waiter
            for waiter, (_, _, arrived, asked) in self.queue.items()
            if waiter != holder
            and now - asked <= CERTAIN_MS
            and (mine is None or arrived < mine.first)
            and not can_overtake(holder, waiter)
        ]

    def check_woken(self, now: int) -> None:
        """Nobody moves. Is there one in line who could go in?"""
        holders = self.holders(now)
        for waiter in self.queue:
            limit = min(map(places_of, [waiter, *holders]))
            if len(holders) < limit and not self.in_front(waiter, now):
                raise Violation(f"G13: {waiter} could go in beside {holders}, and nobody wakes it")


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
            self.new_token(place, self.say(call), answer[2])
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

    @staticmethod
    def new_token(place: Place, what: str, token: int) -> None:
        if token <= place.highest:
            raise Violation(f"G6: {what}: {token} comes after {place.highest}")
        place.highest = token

    def store(self, partial: bytes) -> None:
        for item in items_of([partial]):
            if item in self.stored:
                raise Violation(f"G4: {item!r} was stored twice")
            self.stored[item] = self.event

    def join(self, place: Place, pid: bytes, args: Any, _: Any) -> None:
        place.members[pid] = self.link.now + args[1]

    def meet(self, place: Place, pid: bytes, args: Any, _: Any) -> None:
        place.members[pid] = self.link.now + args[1]
        place.parties = max(place.parties, args[2])
        place.came.add(pid)

    def modify(self, place: Place, pid: bytes, args: Any, _: Any) -> None:
        place.members[pid] = self.link.now + args[1]

    def append(self, place: Place, pid: bytes, args: Any, _: Any) -> None:
        place.members[pid] = self.link.now + args[1]
        self.store(args[2])

    @staticmethod
    def compact(place: Place, pid: bytes, args: Any, answer: Any) -> None:
        """Any process may: `check` sees to it that all is there, and `execute` to the order."""

    def leave(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        if args[3]:
            self.store(args[3])
            place.members[pid] = self.link.now + args[2]
        was_member = place.members.pop(pid, None) is not None
        left = place.left(self.link.now)
        last = not left and place.is_over() and was_member
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
            place.is_over()
        place.grants = {h: grant for h, grant in place.grants.items() if grant.pid != dead}
        place.queue = {h: waiter for h, waiter in place.queue.items() if waiter.pid != dead}
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
        holder, now = args[1], self.link.now
        if answer[0] == b"wait":
            before = place.queue.get(holder)
            if before is None:
                place.queue[holder] = Waiter(pid, self.event, self.event, now)
            elif now - before.asked > CERTAIN_MS:
                place.queue[holder] = before._replace(arrived=self.event, asked=now)
            else:
                place.queue[holder] = before._replace(asked=now)
        if answer[0] != b"granted":
            return
        token, holders = answer[2], place.holders(now)
        if holder in holders:
            if holders[holder].token != token:
                raise Violation(f"G13: {holder} is granted {token} beside its {holders[holder]}")
            return
        if len(holders) >= min(map(places_of, [holder, *holders])):
            raise Violation(f"G13: {holder} is granted {token} beside {holders}")
        if early := place.in_front(holder, now):
            raise Violation(f"G13: {holder} is granted {token}, although {early} came before")
        self.new_token(place, f"lock for {holder}", token)
        self.seen["granted together"] += bool(holders)
        place.queue.pop(holder, None)
        place.grants[holder] = Grant(pid, now + args[2], token)

    def unlock(self, place: Place, pid: bytes, args: Any, answer: Any) -> None:
        mine = args[1] in place.holders(self.link.now)
        if mine != (answer[0] == b"released"):
            raise Violation(f"G13: {pid!r} releases {args[1]}: {answer}; held: {place.grants}")
        place.grants.pop(args[1], None)
        place.queue.pop(args[1], None)

    def renewed(self, call: Call, answer: Any) -> None:
        pid, lease, *wanted = call.args
        place, now = self.places[call.base], self.link.now
        if answer[0]:
            place.members[pid] = now + lease
        holders = place.holders(now)
        for holder, ms, mine in zip(wanted[::2], wanted[1::2], answer[1:], strict=True):
            if (holder in holders) != bool(mine):
                raise Violation(f"G13: {holder} renews {holders} and is told {answer}")
            if mine:
                until = max(holders[holder].until, now + ms)
                place.grants[holder] = holders[holder]._replace(until=until)

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
        self.check_order(token, batch.partials)
        if token <= last:
            self.seen["sink skips"] += 1
            return False
        twice = [i for i in items if any(i in applied for applied in place.applied.values())]
        if twice or len(set(items)) < len(items):
            raise Violation(f"G4: batch {token} of {items} applies {twice or items} twice")
        place.applied[token] = items
        self.seen["sink applies"] += 1
        return True

    def check_order(self, token: int, partials: Iterable[bytes]) -> None:
        """Each class has its data in the order in which it was stored."""
        by_label = defaultdict[bytes, list[int]](list)
        for partial in partials:
            label = partial.partition(b"|")[0]
            by_label[label] += [self.stored[item] for item in items_of([partial])]
        for label, events in by_label.items():
            if events != sorted(events):
                raise Violation(f"G4: batch {token} has data of {label!r} out of order: {events}")

    def write(self, pid: bytes, base: bytes, token: int) -> None:
        """The holder of a lock writes under its token."""
        place = self.places[base]
        if token < place.written:
            if any(token == grant.token for grant in place.holders(self.link.now).values()):
                raise Violation(f"G13: {pid!r} holds {token}, but {place.written} has written")
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
        # So does what waits for processes that were to come.
        expiring = (b"}:queue", b"}:waiting", b"}:parties", b"}:modified")
        if b"}:wake:" in name or name.endswith(expiring):
            return bool(self.link.expect("PTTL", key) > 0)
        # Like every registry that of an heir may name too many: whoever was about to leave it a
        # batch has died.
        if name.startswith(b"{@class:"):
            return True
        return name.endswith(b"}:holds") and self.link.send("GET", key) == b"dead"
