"""A partition as it should be, in plain Python. It knows nothing of Lua; tokens it is told.

Answers are as `Lane.receive` gives them: a code, or a list that begins with one; a run has the
batch's content at its end.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from phonon._protocol.answers import Reply
from phonon._protocol.operations import Code, is_shared, process_of
from steps.lab import Violation

COMPACT_AT = 64
UNTAKEN_US, COMING_US, ASK_AGAIN_MS = 200_000, 2_000_000, 5_000


def places_of(holder: str) -> float:
    return float(holder.rpartition("/")[2].partition("s")[2] or math.inf)


@dataclass
class Batch:
    token: int
    owner: bytes
    partials: list[bytes]
    since: int
    attempt: int | None = None
    crashes: int | None = None
    due: int = 0
    error: bytes | None = None
    retry_at: int | None = None


@dataclass
class Resource:
    members: dict[bytes, int] = field(default_factory=dict)
    left: dict[bytes, int] = field(default_factory=dict)
    partials: list[bytes] = field(default_factory=list)
    batch: Batch | None = None
    parked: dict[int, tuple[list[bytes], bytes, int, bytes, int]] = field(default_factory=dict)
    parties: int = 0
    came: set[bytes] = field(default_factory=set)
    lock: tuple[str, int, int] | None = None  # holder, token, since ms
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    queue: list[tuple[int, str]] = field(default_factory=list)
    woken: dict[str, int] = field(default_factory=dict)

    def responsible(self, pid: bytes) -> tuple[bool, bool, bool]:
        """Return whether a process is a member, has a lock or waits, or has the batch."""
        holders = [
            *self.shared,
            *(h for _, h in self.queue),
            *([self.lock[0]] if self.lock else []),
        ]
        return (
            pid in self.members,
            any(process_of(holder).encode() == pid for holder in holders),
            self.batch is not None and self.batch.owner == pid,
        )


class Model:
    """All resources of a partition."""

    def __init__(self) -> None:
        self.resources: dict[bytes, Resource] = {}
        self.mail: dict[bytes, list[bytes]] = {}
        self.fenced: set[bytes] = set()
        self.token = 0
        self.now = 0
        self.given: int | None = None
        self.handed: dict[bytes, set[bytes]] = {}
        #: The registry of one that lost a lock or a place to the clock may name the resource still.
        self.loose: set[tuple[bytes, bytes]] = set()
        #: What was left in the registry of one that was reaped by a process that does not execute.
        self.remains: dict[bytes, dict[bytes, bool]] = {}

    @property
    def ms(self) -> int:
        return self.now // 1000

    def at(self, name: bytes) -> Resource:
        return self.resources.setdefault(name, Resource())

    def apply(self, pid: bytes, words: Any, told: Any) -> Any:
        """Return what the server has to answer to one operation.

        Args:
            pid: Who calls.
            words: The operation.
            told: What the server has answered, for the tokens in it.
        """
        self.told = told
        name = Code(words[0]).name.lower()
        return getattr(self, "do_" + name)(pid, *words[1:])

    def fresh(self, token: Any) -> int:
        if not isinstance(token, int) or token <= self.token or token < self.now:
            raise Violation(f"G6: token {token} after {self.token} at {self.now}")
        self.token = token
        return token

    # -- membership

    def do_join(self, pid: bytes, name: bytes) -> Any:
        self.at(name).members.setdefault(pid, 0)
        return Reply.JOINED

    def do_modify(self, pid: bytes, name: bytes, times: int) -> Any:
        members = self.at(name).members
        members[pid] = members.get(pid, 0) + times
        return Reply.JOINED

    def do_restore(self, pid: bytes, name: bytes, pairs: list[Any]) -> Any:
        r = self.at(name)
        r.members.setdefault(pid, 0)
        for who, times in zip(pairs[::2], pairs[1::2], strict=True):
            where = r.members if who == pid else r.left
            where[who] = where.get(who, 0) + times
        return Reply.JOINED

    def do_meet(self, pid: bytes, name: bytes, parties: int, first_id: bytes) -> Any:
        r = self.at(name)
        r.members.setdefault(pid, 0)
        r.parties = max(r.parties, parties)
        r.came.add(first_id)
        return Reply.JOINED

    def do_append(self, pid: bytes, name: bytes, partial: bytes) -> Any:
        r = self.at(name)
        r.partials.append(partial)
        r.members[pid] = r.members.get(pid, 0) + 1
        total = len(r.partials)
        return total if total % COMPACT_AT == 0 else Reply.STORED

    def session_over(self, r: Resource) -> bool:
        """Nobody is left: is a party still to come?"""
        if r.parties and len(r.came) < r.parties:
            return False
        r.parties = 0
        r.came.clear()
        return True

    def do_leave(self, pid: bytes, name: bytes, flags: int, partial: bytes) -> Any:
        r = self.at(name)
        was = pid in r.members or partial != b""
        mine = r.members.pop(pid, 0)
        if partial:
            r.partials.append(partial)
            mine += 1
        if mine and (r.members or r.parties):
            r.left[pid] = r.left.get(pid, 0) + mine
            mine = 0
        last, times = 0, None
        if r.members:
            if not flags & 1:
                many = len(r.partials) if len(r.partials) % COMPACT_AT == 0 and partial else 0
                return [Reply.HELD, len(r.members), 0, many]
            times = dict(r.left)
        else:
            over = self.session_over(r)
            if was and over:
                last = 1
                times = dict(r.left)
                if mine:
                    times[pid] = times.get(pid, 0) + mine
                r.left.clear()
        if not flags & 2:
            times = None
        end = [times] if times is not None else []
        if not r.partials:
            return [Reply.LAST, len(r.members), last, *end]
        if r.batch:
            r.batch.due = len(r.partials)
            return [Reply.DEFERRED, len(r.members), last, *end]
        content = self.start(pid, r, len(r.partials), self.told[3])
        assert r.batch
        return [Reply.RUN, len(r.members), last, r.batch.token, len(content), 0, 0, times, content]

    # -- batches

    def start(self, pid: bytes, r: Resource, due: int, token: Any) -> list[bytes]:
        content, r.partials = r.partials[:due], r.partials[due:]
        r.batch = Batch(self.fresh(token), pid, content, self.ms)
        return content

    def owned(self, pid: bytes, r: Resource, token: int) -> bool:
        return r.batch is not None and (r.batch.owner, r.batch.token) == (pid, token)

    def go_on(self, pid: bytes, r: Resource, due: int, otherwise: Any) -> Any:
        r.batch = None
        if not due:
            return otherwise
        if not isinstance(self.told, list):
            raise Violation(f"a session that has ended was not started: {self.told}")
        content = self.start(pid, r, due, self.told[3])
        return [Reply.AGAIN, 0, 0, self.token, len(content), 0, 0, None, content]

    def do_complete(self, pid: bytes, name: bytes, token: int) -> Any:
        r = self.at(name)
        if not self.owned(pid, r, token):
            return Reply.LOST
        assert r.batch
        return self.go_on(pid, r, r.batch.due, Reply.DONE)

    def do_fail(
        self, pid: bytes, name: bytes, token: int, error: bytes, delay: int, most: int
    ) -> Any:
        r = self.at(name)
        if not self.owned(pid, r, token):
            return Reply.LOST
        b = r.batch
        assert b
        b.attempt = (b.attempt or 0) + 1
        if b.attempt < most:
            b.error, b.retry_at = error, self.ms + delay
            return [Reply.RETRY, b.attempt]
        r.parked[token] = (b.partials, error, b.attempt, pid, b.since)
        return self.go_on(pid, r, b.due, Reply.PARKED)

    def do_resume(self, pid: bytes, name: bytes, token: int) -> Any:
        r = self.at(name)
        if not self.owned(pid, r, token):
            return Reply.LOST
        b = r.batch
        assert b
        b.retry_at = None
        n = len(b.partials)
        return [Reply.RUN, 0, 0, token, n, b.attempt or 0, b.crashes or 0, None, list(b.partials)]

    def do_hand_off(self, pid: bytes, name: bytes, token: int, queue: bytes) -> Any:
        r = self.at(name)
        if not self.owned(pid, r, token):
            return Reply.LOST
        assert r.batch
        r.batch.owner, r.batch.retry_at = queue, None
        self.handed.setdefault(queue, set()).add(name)
        return Reply.HANDED

    def do_replay(self, pid: bytes, name: bytes, token: int) -> Any:
        r = self.at(name)
        if token not in r.parked:
            return Reply.MISSING
        if r.batch:
            return Reply.RUNNING
        partials = r.parked.pop(token)[0]
        r.batch = Batch(self.fresh(self.told[3]), pid, partials, self.ms)
        return [Reply.RUN, 0, 0, self.token, len(partials), 0, 0, None, list(partials)]

    def do_discard(self, _pid: bytes, name: bytes, token: int) -> Any:
        return Reply.DISCARDED if self.at(name).parked.pop(token, None) else Reply.MISSING

    def do_compact(
        self, _pid: bytes, name: bytes, first: int, n: int, same: Any, merged: list[bytes]
    ) -> Any:
        r = self.at(name)
        due = r.batch.due if r.batch else 0
        read: list[bytes] = same.partials  # the digest remembers what it is of
        if r.partials[first : first + n] != read or first < due < first + n:
            return Reply.CHANGED
        r.partials[first : first + n] = merged
        if r.batch and first + n <= due:
            r.batch.due += len(merged) - n
        return [Reply.COMPACTED, len(r.partials)]

    # -- locks

    def loosen(self, name: bytes, holder: str) -> None:
        self.loose.add((process_of(holder).encode(), name))

    def free(self, r: Resource, holder: str) -> bool:
        r.leases.pop(holder, None)
        if r.lock and r.lock[0] == holder:
            r.lock = None
            return True
        return r.shared.pop(holder, None) is not None

    def expire(self, name: bytes, r: Resource) -> None:
        for holder in [h for h, till in r.leases.items() if till <= self.ms]:
            self.free(r, holder)
            self.loosen(name, holder)

    def quit(self, r: Resource, holder: str) -> None:
        r.queue = [(at, h) for at, h in r.queue if h != holder]
        if r.woken.pop(holder, None) is not None:
            self.unmail(holder)

    def unmail(self, holder: str) -> None:
        box = self.mail.get(process_of(holder).encode(), [])
        box[:] = [letter for letter in box if letter != holder.encode()]

    def drop_sleepers(self, name: bytes, r: Resource, asking: str | None = None) -> None:
        while r.queue:
            first = r.queue[0][1]
            if first not in r.woken or first == asking:
                return
            lies = first.encode() in self.mail.get(process_of(first).encode(), [])
            if self.now - r.woken[first] <= (UNTAKEN_US if lies else COMING_US):
                return
            self.quit(r, first)
            self.loosen(name, first)

    def in_front(self, r: Resource, holder: str) -> str | None:
        together = is_shared(holder) and places_of(holder) == math.inf
        for _, waiter in r.queue:
            if waiter == holder:
                return None
            if not (together and is_shared(waiter)):
                return waiter
        return None

    def wake(self, name: bytes, r: Resource) -> None:
        self.drop_sleepers(name, r)
        inside = math.inf if r.lock else len(r.shared)
        for _, waiter in r.queue:
            if inside >= (places_of(waiter) if is_shared(waiter) else 1):
                return
            if waiter not in r.woken:
                r.woken[waiter] = self.now
                self.mail.setdefault(process_of(waiter).encode(), []).append(waiter.encode())
            inside = inside + 1 if is_shared(waiter) else math.inf

    def grant(self, r: Resource, holder: str, lease: int) -> Any:
        token = self.fresh(self.told[1])
        if is_shared(holder):
            r.shared[holder] = (token, self.ms)
        else:
            r.lock = (holder, token, self.ms)
        if lease:
            r.leases[holder] = self.ms + lease
        return [Reply.GRANTED, token]

    def do_lock(
        self, _pid: bytes, name: bytes, holder: str, queued: int, lease: int, _thread: str
    ) -> Any:
        r = self.at(name)
        self.expire(name, r)
        if r.lock and r.lock[0] == holder:
            return [Reply.GRANTED, r.lock[1]]
        if holder in r.shared:
            return [Reply.GRANTED, r.shared[holder][0]]
        if is_shared(holder):
            room = not r.lock and len(r.shared) < places_of(holder)
        else:
            room = not r.lock and not r.shared
        if room:
            self.drop_sleepers(name, r, holder)
        front = self.in_front(r, holder)
        if room and front is None:
            if not isinstance(self.told, list) or self.told[0] != Reply.GRANTED:
                raise Violation(f"a free lock was not granted: {self.told}")
            self.quit(r, holder)
            granted = self.grant(r, holder, lease)
            if is_shared(holder):
                self.wake(name, r)
            return granted
        if room and front not in r.woken:
            self.wake(name, r)
        # The step tests check the named holder, and the time of the next question.
        if not queued:
            return [Reply.BUSY, *self.told[1:]]
        if holder not in [h for _, h in r.queue]:
            r.queue.append((self.now, holder))
            r.queue.sort()
        if r.woken.pop(holder, None) is not None:
            self.unmail(holder)
        if not 0 < self.told[1] <= ASK_AGAIN_MS:
            raise Violation(f"a waiter is to ask again in {self.told[1]} ms")
        return [Reply.WAIT, *self.told[1:]]

    def do_unlock(self, _pid: bytes, name: bytes, holder: str) -> Any:
        r = self.at(name)
        self.expire(name, r)
        self.quit(r, holder)
        mine = self.free(r, holder)
        self.wake(name, r)
        return Reply.RELEASED if mine else Reply.NOT_HELD

    def do_renew(self, _pid: bytes, name: bytes, holder: str, lease: int) -> Any:
        r = self.at(name)
        self.expire(name, r)
        if holder not in r.shared and (not r.lock or r.lock[0] != holder):
            return Reply.NOT_HELD
        if lease and holder in r.leases:
            r.leases[holder] = max(r.leases[holder], self.ms + lease)
        return Reply.RENEWED

    # -- takeover

    def do_reap(self, pid: bytes, dead: bytes, _most: int, recovers: int) -> Any:
        queue = dead.startswith(b"class:")
        told = {
            self.told[3][j]: self.told[3][j + 1 : j + 3] for j in range(0, len(self.told[3]), 3)
        }
        if not queue:
            self.fenced.add(dead)
        out: dict[bytes, list[Any]] = {}
        remains = self.remains.setdefault(dead, {})
        names = [
            name
            for name, r in self.resources.items()
            if any(r.responsible(dead)) or (dead, name) in self.loose or name in remains
        ]
        if not recovers:
            names = [name for name in names if name not in remains]
        # In the server's order, which tokens show; those without one in any.
        taken = 0
        for name in sorted(names, key=lambda n: told.get(n, [0])[0]):
            if queue and name not in self.handed.get(dead, ()):
                continue
            taken += 1
            self.reap_one(pid, name, dead, told, out, recovers=bool(recovers), died=not queue)
        stay = len(self.remains[dead])
        if not stay:
            del self.remains[dead]
            if queue:
                self.handed.pop(dead, None)
            else:
                self.mail.pop(dead, None)
        batches = [word for name in out for word in (name, *out[name])]
        if out != told:
            raise Violation(f"G8: reaped {told}, should be {out}")
        if not len(out) <= self.told[5] <= taken:
            raise Violation(f"reaped {self.told[5]} resources, should be {taken} at the most")
        return [Reply.REAPED, 0, stay, self.told[3] if batches else [], [], self.told[5]]

    def reap_one(
        self,
        pid: bytes,
        name: bytes,
        dead: bytes,
        told: dict[bytes, list[Any]],
        out: dict[bytes, list[Any]],
        *,
        recovers: bool,
        died: bool,
    ) -> None:
        r = self.at(name)
        self.loose.discard((dead, name))
        times = r.members.pop(dead, 0)
        if times and (r.members or r.parties):
            r.left[dead] = r.left.get(dead, 0) + times
        holders = [*r.shared, *([r.lock[0]] if r.lock else []), *(h for _, h in r.queue)]
        freed = [holder for holder in holders if process_of(holder).encode() == dead]
        for holder in freed:
            self.free(r, holder)
            self.quit(r, holder)
        if freed:
            self.wake(name, r)
        if not r.members:
            if self.session_over(r):
                r.left.clear()
            if r.batch and r.partials:
                r.batch.due = len(r.partials)
        stays = False
        if r.batch and r.batch.owner == dead:
            if recovers:
                r.batch.owner = pid
                if died:
                    r.batch.crashes = (r.batch.crashes or 0) + 1
                wait = max(0, (r.batch.retry_at or 0) - self.ms)
                out[name] = [r.batch.token, wait]
            else:
                stays = True
        elif not r.members and r.partials and not r.batch:
            if recovers:
                if name not in told:
                    raise Violation(f"G8: the session of {name!r} is not executed")
                self.start(pid, r, len(r.partials), told[name][0])
                out[name] = [self.token, 0]
            else:
                stays = True
        if stays:
            self.remains[dead][name] = True
        else:
            self.remains[dead].pop(name, None)

    # -- what the keys must be

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, r in self.resources.items():
            x = name.decode()
            self.state_of_lock(state, x, r)
            state[f"members:{x}"] = {p: b"%d" % n for p, n in r.members.items()}
            state[f"left:{x}"] = {p: b"%d" % n for p, n in r.left.items()}
            state[f"partials:{x}"] = r.partials
            if r.batch:
                b = r.batch
                state[f"batch:{x}"] = b.partials
                fields: dict[bytes, Any] = {b"owner": b.owner, b"error": b.error}
                numbers = (b"token", b"since", b"attempt", b"crashes", b"retry_at")
                values = (b.token, b.since, b.attempt, b.crashes, b.retry_at)
                for key, value in zip(numbers, values, strict=True):
                    fields[key] = None if value is None else b"%d" % value
                fields[b"due"] = b"%d" % b.due if b.due else None
                state[f"running:{x}"] = {k: v for k, v in fields.items() if v is not None}
            for token, (partials, *_) in r.parked.items():
                state[f"dead:{token}:{x}"] = partials
            state[f"parked:{x}"] = {b"%d" % token for token in r.parked}
            if r.parties:
                came = {b"@" + first: b"1" for first in r.came}
                state[f"parties:{x}"] = {b"n": b"%d" % r.parties, **came}
        state["parked"] = {name for name, r in self.resources.items() if r.parked}
        state["handed"] = set(self.handed)
        for pid, letters in self.mail.items():
            state[f"mailbox:{pid.decode()}"] = sorted(letters)
        return {key: value for key, value in state.items() if value}

    def state_of_lock(self, state: dict[str, Any], x: str, r: Resource) -> None:
        holders = [(h, *grant) for h, grant in r.shared.items()]
        if r.lock:
            holders.append(r.lock)
        state[f"lock:{x}"] = {
            h.encode(): b"%d %d main" % (token, since) for h, token, since in holders
        }
        state[f"leases:{x}"] = {h.encode(): float(till) for h, till in r.leases.items()}
        state[f"queue:{x}"] = {h.encode(): float(at) for at, h in r.queue}
        state[f"woken:{x}"] = {h.encode(): b"%d" % at for h, at in r.woken.items()}
