"""One resource as it should be: a model in plain Python of what the server's steps do.

It knows nothing of keys, and it does not make tokens: it is told which one the server gave, and
insists that it is greater than all before.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from steps import Answer, Command

from phonon.protocol.compaction import digest

FIRST_PARTIALS = 128
SPARE_TOKENS = 1023
COMPACT_AT = 64
WAITER_MS = 10_000
WOKEN_MS = 2_000
UNTAKEN_MS = 200


def is_shared(holder: bytes) -> bool:
    return b"s" in holder.rpartition(b"/")[2]


def places_of(holder: bytes) -> float:
    return float(holder.rpartition(b"/")[2].partition(b"s")[2] or math.inf)


class Violation(AssertionError):  # noqa: N818 - of a guarantee
    """The server did what it must not do."""


class StaleError(Exception):
    """An operation came after a later one of the same process."""


class DeadError(Exception):
    """A process that was declared dead was about to become responsible for something."""


@dataclass
class Batch:
    token: int
    owner: bytes
    partials: list[bytes]
    since: int
    attempt: int = 0
    due: int | None = None
    error: bytes | None = None
    retry_at: int | None = None
    crashes: int | None = None


@dataclass
class Grant:
    holder: bytes
    pid: bytes
    token: int
    until: int
    since: int
    thread: bytes


@dataclass
class Model:
    """The state of one resource, and a method for each step."""

    now: int = 0
    token: int = 0
    members: dict[bytes, int] = field(default_factory=dict)  # process id -> end of its lease
    modified: Counter[bytes] = field(default_factory=Counter)
    partials: list[bytes] = field(default_factory=list)
    batch: Batch | None = None
    parked: dict[int, tuple[list[bytes], dict[str, Any]]] = field(default_factory=dict)
    grant: Grant | None = None
    shared: dict[bytes, Grant] = field(default_factory=dict)
    #: When each waiter was woken, and has not taken notice yet.
    woken: dict[bytes, list[int]] = field(default_factory=dict)
    parties: int = 0
    came: set[bytes] = field(default_factory=set)
    arrived: dict[bytes, int] = field(default_factory=dict)  # waiter -> when it came
    awaited: dict[bytes, int] = field(default_factory=dict)  # waiter -> until when it counts
    registries: dict[bytes, int] = field(
        default_factory=dict
    )  # process id -> holds it since; negative: a lock
    fence: set[bytes] = field(default_factory=set)  # the dead, where registries are elsewhere
    memory: dict[bytes, tuple[int, Answer]] = field(default_factory=dict)
    given: int | None = None  # the token in the server's answer

    # -- every step

    def apply(self, pid: bytes, command: Command, token: int | None) -> Answer:
        """What the server has to answer.

        Args:
            pid: Who calls.
            command: The step.
            token: The one that is in the server's answer, if there is one.
        """
        last, answer = self.memory.get(pid, (0, []))
        if command.number < last:
            raise StaleError
        if command.number > last:
            self.given = token
            answer = getattr(self, command.step)(pid, *command.args)
            self.memory[pid] = (command.number, answer)
        return self.deliver(pid, answer)

    def deliver(self, pid: bytes, answer: Answer) -> Answer:
        if answer[0] not in (b"run", b"again"):
            return answer
        batch = self.batch
        if batch is None or not self.owns(pid, answer[2]):
            return [b"lost", self.clear(pid), *answer[2:]]
        return [*answer, batch.attempt, len(batch.partials), batch.partials[:FIRST_PARTIALS]]

    def fresh(self, spare: int = SPARE_TOKENS) -> int:
        if self.given is None:
            raise Violation("neither a batch nor a lock was given where one is due")
        if self.given <= self.token:
            raise Violation(f"G6: token {self.given} came after {self.token}")
        self.token = self.given + spare
        return self.given

    def owns(self, pid: bytes, token: int) -> bool:
        return self.batch is not None and (self.batch.owner, self.batch.token) == (pid, token)

    def clear(self, pid: bytes) -> int:
        """1 if the process has nothing more to do with the resource."""
        owner = self.batch.owner if self.batch else None
        holder = self.grant.pid if self.grant else None
        shares = any(grant.pid == pid for grant in self.shared.values())
        if pid in self.members or pid in (owner, holder) or shares:
            return 0
        self.registries.pop(pid, None)
        return 1

    def hold(self, pid: bytes) -> None:
        if pid in self.fence:
            raise DeadError
        self.registries.setdefault(pid, self.now)

    # -- membership

    def enter(self, pid: bytes, lease: int) -> None:
        self.hold(pid)
        self.members[pid] = self.now + lease

    def live(self) -> list[bytes]:
        return [pid for pid, until in self.members.items() if until > self.now]

    def join(self, pid: bytes, lease: int, *put_back: Any) -> Answer:
        self.enter(pid, lease)
        for who, times in zip(put_back[::2], put_back[1::2], strict=True):
            self.modified[who] += times
        return [b"joined", 0]

    def meet(self, pid: bytes, lease: int, parties: int) -> Answer:
        self.enter(pid, lease)
        self.parties = max(self.parties, parties)
        self.came.add(pid)
        return [b"met", 0]

    def is_incomplete(self) -> bool:
        """Whether parties are still to come, now that nobody is left."""
        if len(self.came) < self.parties:
            return True
        self.parties = 0
        self.came.clear()
        return False

    def modify(self, pid: bytes, lease: int, times: int) -> Answer:
        self.enter(pid, lease)
        self.modified[pid] += times
        return [b"counted", 0]

    def candidates(self, first: int, last: int) -> Answer:
        last = min(last, len(self.partials) - 1)
        due = (self.batch and self.batch.due) or 0
        if first < due <= last:
            first, last = (first, due - 1) if due - first > last + 1 - due else (due, last)
        session = self.partials[: last + 1]
        sizes = [len(partial) for partial in session]
        for begin in range(first, last):
            if sizes[begin] <= 2 * sum(sizes[begin + 1 :]):
                return [begin, last + 1 - begin, *session[begin:]]
        return [last + 1, 0]

    def leave(self, pid: bytes, force: int, lease: int, partial: bytes) -> Answer:
        many = self.append(pid, lease, partial)[2:] if partial else []
        if self.partials and not self.batch:
            self.hold(pid)
        was_member = int(pid in self.members)
        self.members = {who: self.members[who] for who in self.live() if who != pid}
        left = len(self.members)
        if left and not force:
            return [b"held", self.clear(pid), 0, left, was_member, *many]
        modified = dict(self.modified)
        if not left and self.is_incomplete():
            was_member = 0
        elif not left:
            self.modified.clear()
        if not self.partials:
            return [b"last", self.clear(pid), 0, left, was_member, modified]
        if self.batch:
            self.batch.due = len(self.partials)
            return [b"deferred", self.clear(pid), 0, left, was_member, modified, *many]
        return [b"run", 0, self.start(pid, len(self.partials)), left, was_member, modified]

    # -- partials and batches

    def append(self, pid: bytes, lease: int, partial: bytes) -> Answer:
        self.enter(pid, lease)
        self.partials.append(partial)
        self.modified[pid] += 1
        count = len(self.partials)
        return [b"stored", 0] if count % COMPACT_AT else [b"stored", 0, count]

    def compact(self, _: bytes, first: int, n: int, read: str, *merged: bytes) -> Answer:
        there = self.partials[first : first + n]
        due = (self.batch and self.batch.due) or 0
        if first < due < first + n or digest(there) != read:
            return [b"changed", 0]
        self.partials[first : first + n] = merged
        if self.batch and first + n <= due:
            self.batch.due = due - n + len(merged)
        return [b"compacted", 0, len(self.partials)]

    def start(self, pid: bytes, count: int) -> int:
        taken, self.partials = self.partials[:count], self.partials[count:]
        self.batch = Batch(self.fresh(), pid, taken, self.now)
        return self.batch.token

    def next_batch(self, pid: bytes, otherwise: bytes) -> Answer:
        due = self.batch.due if self.batch else None
        self.batch = None
        if due:
            return [b"again", 0, self.start(pid, due)]
        return [otherwise, self.clear(pid)]

    def complete(self, pid: bytes, token: int) -> Answer:
        if not self.owns(pid, token):
            return [b"lost", self.clear(pid)]
        return self.next_batch(pid, b"done")

    def fail(self, pid: bytes, token: int, error: str, delay: int, most: int) -> Answer:
        batch = self.batch
        if batch is None or not self.owns(pid, token):
            return [b"lost", self.clear(pid)]
        batch.attempt += 1
        if batch.attempt < most:
            batch.error, batch.retry_at = error.encode(), self.now + delay
            return [b"retry", 0, token, batch.attempt]
        self.parked[token] = (
            batch.partials,
            {
                "error": error,
                "attempts": batch.attempt,
                "owner": pid.decode(),
                "since": batch.since,
                "at": self.now,
            },
        )
        return self.next_batch(pid, b"parked")

    def resume(self, pid: bytes, token: int) -> Answer:
        batch = self.batch
        if batch is None or not self.owns(pid, token):
            return [b"lost", self.clear(pid)]
        batch.retry_at = None
        return [b"run", 0, token]

    def entrust(self, pid: bytes, token: int, heir: bytes) -> Answer:
        batch = self.batch
        if batch is None or not self.owns(pid, token):
            return [b"lost", self.clear(pid)]
        batch.owner, batch.retry_at = heir, None
        return [b"entrusted", self.clear(pid)]

    def replay(self, pid: bytes, token: int) -> Answer:
        if token not in self.parked:
            return [b"missing", self.clear(pid)]
        if self.batch:
            return [b"busy", self.clear(pid)]
        self.hold(pid)
        partials, _ = self.parked.pop(token)
        self.batch = Batch(self.fresh(), pid, partials, self.now)
        return [b"run", 0, self.batch.token]

    def discard(self, pid: bytes, token: int) -> Answer:
        found = self.parked.pop(token, None)
        return [b"discarded" if found else b"missing", self.clear(pid)]

    # -- taking over

    def free_lock_of(self, dead: bytes) -> None:
        was_held = self.grant is not None
        in_the_way = self.grant is not None and self.grant.pid == dead
        if in_the_way:
            self.grant = None
        for holder in [name for name, grant in self.shared.items() if grant.pid == dead]:
            del self.shared[holder]
            in_the_way = True
        for holder in [holder for holder in self.arrived if holder.startswith(dead + b"/")]:
            self.quit_queue(holder)
            in_the_way = in_the_way or not was_held
        if in_the_way:
            self.wake_next()

    def take_over(self, pid: bytes, batch: Batch, died: int) -> Answer:
        batch.owner = pid
        due_in = (batch.retry_at or 0) - self.now
        if due_in > 0:
            return [b"later", 0, batch.token, due_in]
        batch.crashes = (batch.crashes or 0) + died
        return [b"run", 0, batch.token, batch.crashes]

    def recover(self, pid: bytes, dead: bytes, died: int, _lease: int, *registry: bytes) -> Answer:
        self.expire_grants()
        batch = self.batch
        owned = batch is not None and batch.owner == dead
        if owned or (batch is None and self.partials):
            self.hold(pid)
        if not registry:
            self.fence.add(dead)
        elif owned or batch is None or not batch.owner.startswith(b"class:"):
            self.registries.pop(dead, None)
        self.members.pop(dead, None)
        self.free_lock_of(dead)
        self.members = {who: self.members[who] for who in self.live()}
        ended = not self.members
        if ended:
            if not self.is_incomplete():
                self.modified.clear()
            if batch and self.partials:
                batch.due = len(self.partials)
        if batch is not None and owned:
            return self.take_over(pid, batch, died)
        if ended and self.partials and batch is None:
            return [b"run", 0, self.start(pid, len(self.partials)), 0]
        return [b"free", self.clear(pid), batch.owner if batch else b""]

    # -- the lock

    def expire_grants(self) -> None:
        if self.grant and self.grant.until <= self.now:
            self.grant = None
        self.shared = {name: grant for name, grant in self.shared.items() if grant.until > self.now}

    def quit_queue(self, holder: bytes) -> None:
        self.arrived.pop(holder, None)
        self.awaited.pop(holder, None)
        self.woken.pop(holder, None)

    def waiters(self, asking: bytes = b"") -> list[bytes]:
        """Those who still wait, in the order they came."""
        for holder in [holder for holder, until in self.awaited.items() if until <= self.now]:
            self.quit_queue(holder)
        waiters = sorted(self.arrived, key=lambda holder: (self.arrived[holder], holder))
        while waiters and waiters[0] != asking and waiters[0] in self.woken:
            if self.now - self.woken[waiters[0]][0] <= UNTAKEN_MS:
                break
            self.quit_queue(waiters.pop(0))
        return waiters

    def wake_next(self) -> None:
        taken = len(self.shared)
        for waiter in self.waiters():
            if not is_shared(waiter):
                if taken == 0:
                    self.wake(waiter)
                return
            if taken >= places_of(waiter):
                return
            self.wake(waiter)
            taken += 1

    def wake(self, waiter: bytes) -> None:
        self.woken.setdefault(waiter, []).append(self.now)
        self.awaited[waiter] = min(self.awaited[waiter], self.now + WOKEN_MS)

    def in_front_of(self, holder: bytes) -> bytes | None:
        """The first waiter in front of a holder that it cannot go in with."""
        for waiter in self.waiters(asking=holder):
            if waiter == holder:
                return None
            if not (is_shared(waiter) and is_shared(holder)) or places_of(holder) < math.inf:
                return waiter
        return None

    def lock(self, pid: bytes, holder: bytes, lease: int, queue: int, thread: bytes) -> Answer:
        self.expire_grants()
        holders = dict(self.shared)
        if self.grant:
            holders[self.grant.holder] = self.grant
        if holder in holders:
            return [b"granted", 0, holders[holder].token]
        if is_shared(holder):
            free = self.grant is None and len(self.shared) < places_of(holder)
        else:
            free = not holders
        first = self.in_front_of(holder)
        if free and not first:
            self.hold(pid)
            self.quit_queue(holder)
            # Whoever has a lock comes first, and in the order of the last one.
            self.registries[pid] = min(self.registries.get(pid, 0), -self.now)
            grant = Grant(holder, pid, self.fresh(spare=0), self.now + lease, self.now, thread)
            if is_shared(holder):
                self.shared[holder] = grant
            else:
                self.grant = grant
            if places_of(holder) < math.inf:
                self.wake_next()
            return [b"granted", 0, grant.token]
        if free and first:
            free_at, owner, since, by = self.promised(first), first, self.now, b""
        else:
            other = min(holders.values(), key=lambda grant: (grant.until, grant.holder))
            free_at, owner, since, by = other.until, other.holder, other.since, other.thread
        free_in = free_at - self.now
        if not queue:
            return [b"busy", self.clear(pid), free_in, owner, since, by]
        self.arrived.setdefault(holder, self.now)
        self.awaited[holder] = self.now + WAITER_MS
        self.woken.pop(holder, None)
        return [b"wait", self.clear(pid), min(free_in, WAITER_MS // 2), owner, since, by]

    def promised(self, first: bytes) -> int:
        """Until when a free lock is promised to the first waiter."""
        until = self.awaited[first]
        if until > self.now + WOKEN_MS:
            self.wake_next()  # whoever was woken in its place has not come
        return self.woken[first][0] + UNTAKEN_MS + 1 if first in self.woken else until

    def unlock(self, pid: bytes, holder: bytes) -> Answer:
        self.expire_grants()
        self.quit_queue(holder)
        was_exclusive = self.grant is not None
        mine = self.grant is not None and self.grant.holder == holder
        if mine:
            self.grant = None
        elif holder in self.shared:
            mine = self.shared.pop(holder) is not None
        if mine or not was_exclusive:
            self.wake_next()
        return [b"released" if mine else b"lost", self.clear(pid)]

    def renew(self, pid: bytes, lease: int, *locks: Any) -> Answer:
        if pid in self.members:
            self.members[pid] = self.now + lease
        answer = [int(pid in self.members)]
        for holder, lock_lease in zip(locks[::2], locks[1::2], strict=True):
            self.expire_exclusive_or_shared(holder)
            grant = self.shared.get(holder)
            if self.grant and self.grant.holder == holder:
                grant = self.grant
            if grant:
                grant.until = max(grant.until, self.now + lock_lease)
            answer.append(int(grant is not None))
        return answer

    def expire_exclusive_or_shared(self, holder: bytes) -> None:
        """Drop what has expired of the kind that the holder is of."""
        if is_shared(holder):
            self.shared = {n: grant for n, grant in self.shared.items() if grant.until > self.now}
        elif self.grant and self.grant.until <= self.now:
            self.grant = None

    # -- what the server has to keep

    def state(self) -> dict[str, Any]:
        """The content of the resource's keys, except for the memory, by suffix."""
        batch, grant = self.batch, self.grant
        keys: dict[str, Any] = {
            "members": self.members,
            "modified": dict(self.modified),
            "partials": self.partials,
            "queue": self.arrived,
            "waiting": self.awaited,
            "fence": self.fence,
            "parked": {token: entry for token, (_, entry) in self.parked.items()},
        }
        keys |= {f"parked:{token}": partials for token, (partials, _) in self.parked.items()}
        if batch:
            running = {
                b"owner": batch.owner,
                b"token": batch.token,
                b"attempt": batch.attempt,
                b"since": batch.since,
            }
            if batch.due is not None:
                running[b"due"] = batch.due
            facts = {b"error": batch.error, b"retry_at": batch.retry_at, b"crashes": batch.crashes}
            running |= {name: fact for name, fact in facts.items() if fact is not None}
            keys |= {"running": running, "batch": batch.partials}
        if grant:
            keys["lock"] = {
                b"holder": grant.holder,
                b"pid": grant.pid,
                b"token": grant.token,
                b"until": grant.until,
                b"since": grant.since,
                b"thread": grant.thread,
            }
        if self.shared:
            keys["shared"] = {name: each.until for name, each in self.shared.items()}
            held = Counter(b"@" + each.pid for each in self.shared.values())
            keys["sharers"] = {process: b"%d" % count for process, count in held.items()} | {
                name: b"%d %d %s" % (each.token, each.since, each.thread)
                for name, each in self.shared.items()
            }
        if self.parties:
            keys["parties"] = {b"n": self.parties} | {b"@" + pid: 1 for pid in self.came}
        keys |= {
            f"wake:{name.decode()}": [b"%d" % at for at in times]
            for name, times in self.woken.items()
        }
        return {name: content for name, content in keys.items() if content}
