"""The invariants: after every call, of every answer, and at the end."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from phonon._core.flows import REBORN
from phonon._core.leases import Grant
from phonon._protocol.answers import Reply
from phonon._protocol.lane import Call
from phonon._protocol.operations import Code, Operation, is_shared
from phonon.errors import DeclaredDeadError, PhononError, ServerStateLostError

if TYPE_CHECKING:
    from simulation.process import Instance, SimFlow, SimProcess
    from simulation.world import World

R = Reply
_STORES = (Code.APPEND, Code.LEAVE)
_INGESTS = (Code.INGEST, Code.INGEST_NEW)
_ONCE = (*_STORES, *_INGESTS, Code.COMPLETE, Code.FAIL)
_MAKES_MEMBER = (Code.JOIN, Code.APPEND, Code.MODIFY, Code.MEET, Code.RESTORE)
_TOKENS = 1024
#: Keys that may expire by themselves: parties wait for a week for those that have not come.
_EXPIRING = (b"lane:", b"mailbox:", b"parties:", b"left:", b"ids:")
#: Keys that stay.
_STAYING = (b"token", b"source:")


def stays(key: bytes) -> bool:
    """Return whether a key is one of the few that are there for ever."""
    return key.partition(b"}:")[2].startswith(_STAYING) or key.endswith((b":epoch", b":partitions"))


class Violation(AssertionError):  # noqa: N818 - of a guarantee
    """A guarantee is violated."""


class Snapshot:
    """All that is on the server, key by key."""

    def __init__(self, looked: list[Any]) -> None:
        self.members: dict[str, dict[bytes, bytes]] = defaultdict(dict)
        self.partials: dict[str, list[bytes]] = defaultdict(list)
        self.batch: dict[str, list[bytes]] = defaultdict(list)
        self.dead: dict[str, dict[int, list[bytes]]] = defaultdict(dict)
        self.running: dict[str, dict[bytes, bytes]] = {}
        self.lock: dict[str, dict[bytes, bytes]] = defaultdict(dict)
        self.queue: dict[str, list[bytes]] = defaultdict(list)
        self.parties: set[str] = set()
        self.registry: dict[tuple[bytes, bytes], set[bytes]] = defaultdict(set)
        self.lanes: dict[bytes, set[bytes]] = defaultdict(set)
        self.keys: list[tuple[bytes, Any, int]] = []
        for key, value, ttl in looked:
            self.keys.append((key, value, ttl))
            tag, _, rest = key.partition(b"}:")
            kind, _, raw = rest.partition(b":")
            name = raw.decode()
            if kind in (b"members", b"running", b"lock"):
                getattr(self, kind.decode())[name] = dict(zip(value[::2], value[1::2], strict=True))
            elif kind in (b"partials", b"batch"):
                items = [item for partial in value for item in partial.split(b",")]
                getattr(self, kind.decode())[name] = items
            elif kind == b"dead":
                token, _, resource = name.partition(":")
                items = [item for partial in value for item in partial.split(b",")]
                self.dead[resource][int(token)] = items
            elif kind == b"queue":
                self.queue[name] = value
            elif kind == b"parties":
                self.parties.add(name)
            elif kind == b"registry":
                self.registry[tag, raw] = set(value)
            elif kind == b"lanes":
                self.lanes[tag] = set(value)

    def items(self, resource: str) -> list[bytes]:
        dead = [item for some in self.dead[resource].values() for item in some]
        return self.partials[resource] + self.batch[resource] + dead

    def responsible(self, resource: str) -> set[bytes]:
        """Return the processes whose registries must name a resource."""
        need = set(self.members[resource])
        if resource in self.running:
            need.add(self.running[resource][b"owner"])
        holders = [*self.lock[resource], *self.queue[resource]]
        return need | {holder.rpartition(b"/")[0] for holder in holders}


class Saved(NamedTuple):
    """The state of the checks when the server was saved."""

    executed: Counter[int]
    truth: dict[int, tuple[Any, Operation]]
    fresh: set[Any]
    stored: set[bytes]


class Checks:
    """The checks of one world.

    Attributes:
        losses: How often the server has lost data.
        excused: Items that a loss may have lost or brought back.
    """

    def __init__(self, world: "World") -> None:
        self._world = world
        self.seen = world.seen
        self.violation: Violation | None = None
        self.losses = 0
        self.emptied = False
        self.excused: set[bytes] = set()
        self.may_be_lost: set[bytes] = set()
        self.executed: Counter[int] = Counter()
        self.truth: dict[int, tuple[Any, Operation]] = {}
        self.history: dict[int, list[Any]] = defaultdict(list)
        self._singles: dict[int, list[Operation]] = {}
        self.fresh: set[Any] = set()
        self.stored: set[bytes] = set()
        self.acked: dict[bytes, str] = {}
        self.applied: dict[str, dict[int, list[bytes]]] = defaultdict(dict)
        self.dropped: set[bytes] = set()
        self.executing: dict[str, dict[tuple[str, str], tuple[bytes, int]]] = defaultdict(dict)
        self.written: dict[str, int] = defaultdict(int)
        self.highest: dict[str, int] = defaultdict(int)
        self.granted: dict[str, set[int]] = defaultdict(set)
        self.event = 0
        self.at: dict[bytes, int] = {}
        self.ended: dict[str, list[int]] = defaultdict(list)
        self.members: dict[str, set[bytes]] = {}
        self.owners: dict[str, bytes] = {}
        self.ghost: tuple[bytes, str] | None = None
        self.expected: dict[str, int] = {}
        self.open: dict[str, set[int]] = defaultdict(set)

    def fail(self, text: str) -> None:
        """A guarantee is violated. The core may catch what is raised, so it is kept as well."""
        if self.violation is None:
            self.violation = Violation(text)
        raise self.violation

    # Actions of processes, and their answers

    def sent(self, p: "SimProcess", operation: Operation) -> None:
        self.open[p.name].add(id(operation))
        self._world.operations.append(operation)

    def acknowledged(self, p: "SimProcess", resource: str, items: list[bytes]) -> None:
        for item in items:
            self.acked[item] = p.name

    def singles(self, operation: Operation) -> list[Operation]:
        """Return an operation for each change of one, the same ones each time."""
        if operation.count == 1:
            return [operation]
        if id(operation) not in self._singles:
            self.seen["many changes in one operation"] += 1
            self._singles[id(operation)] = [
                Operation(operation.partition, words) for words in operation.changes()
            ]
        return self._singles[id(operation)]

    def told(self, p: "SimProcess", operation: Operation, answer: Any) -> None:
        for single, its in zip(self.singles(operation), operation.each(answer), strict=True):
            self._told(p, single, its)

    def _told(self, p: "SimProcess", operation: Operation, answer: Any) -> None:
        code = operation.code
        self.seen[f"told {code.name}"] += 1
        if answer is REBORN:
            self.seen["told reborn"] += 1
            if code in _ONCE:
                self.fail(f"G3: {p.name}: {operation!r} is not repeated after a rebirth")
            return
        if isinstance(answer, Exception):
            refused = "OOM" in str(answer)
            if refused and id(operation) in self.truth and code in _ONCE:
                self.fail(f"G4: {p.name}: {operation!r} is told refused, but was carried out")
            if not refused:
                self.fail(f"unexpected: {p.name}: {operation!r} is told {answer!r}")
            self.seen["told refused"] += 1
            return
        if code in _ONCE:
            known = [self.truth[id(operation)][0]] if id(operation) in self.truth else []
            if self.losses:
                # The answer was on its way when the server lost what it tells of. A late duplicate
                # may have been carried out since.
                known += self.history[id(operation)]
            if not known:
                self.fail(f"G3: {p.name}: {operation!r} is told {answer}, but never carried out")
            wanted = [want[:4] if isinstance(want, list) else want for want in known]
            got = answer[:4] if isinstance(answer, list) else answer
            if got not in wanted:
                self.fail(
                    f"G2/G4: {p.name}: {operation!r} came to {wanted}, its caller is told {got}"
                )

    def task_failed(self, p: "SimProcess", task: "SimFlow", error: PhononError) -> None:
        self.seen[f"{task.name.rstrip('0123456789')} raised {type(error).__name__}"] += 1

    def reported(self, p: "SimProcess", error: Exception) -> None:
        self.seen[f"reported {type(error).__name__}"] += 1
        if isinstance(error, ServerStateLostError):
            if not self.losses:
                self.fail(f"G15: {p.name} reports a loss, and nothing was lost: {error}")
            self.expected.pop(p.name, None)
        elif isinstance(error, DeclaredDeadError):
            self.expected.pop(p.name, None)
            old = p.identity.former[-1]
            # A clock that is set back, and forward again, may have this effect: docs/guarantees.md.
            excused = self._world.was_set_back or old in self._world.overdue
            if not self.losses and not excused:
                self.fail(f"G8: {p.name} was declared dead in time")

    # Locks

    def beliefs(self) -> None:
        believed: dict[str, list[Grant]] = defaultdict(list)
        for p in self._world.processes.values():
            if p.alive:
                for grant in p.granted:
                    if grant.is_ours:
                        believed[grant.request.key].append(grant)
        for resource, grants in believed.items():
            if len(grants) > 1:
                if all(is_shared(grant.holder) for grant in grants):
                    self.seen["shared together"] += 1
                elif self.losses:
                    self.seen["two believe, after a loss"] += 1
                elif self._world.was_set and any(g.request.lease is not None for g in grants):
                    self.seen["two believe, after the server's clock jumped"] += 1
                else:
                    self.fail(f"G13: {[g.holder for g in grants]} believe to hold {resource}")

    def write(self, p: "SimProcess", grant: Grant) -> None:
        resource = grant.request.key
        if is_shared(grant.holder):
            return
        if grant.token < self.written[resource] and not (self.losses or self._world.was_set):
            self.fail(f"G13: {p.name} writes {resource} under {grant.token}, and believes")
        self.written[resource] = max(self.written[resource], grant.token)

    def lock_gone(self, p: "SimProcess", grant: Grant) -> None:
        jumped = self._world.was_set and grant.request.lease is not None
        if not self.losses and not jumped:
            self.fail(
                f"G13: {p.name} believes in {grant.holder} of {grant.request.key}: it is gone"
            )
        self.seen["lock gone by a loss"] += 1

    # Execution

    def begin(self, p: "SimProcess", task: "SimFlow") -> None:
        for job in task.effect.jobs:
            for instance in instances_of(job):
                record = instance.record
                others = [
                    place
                    for place, (pid, _) in self.executing[record.resource].items()
                    if place[0] == p.name and place[1] != task.name and pid == p.identity.id
                ]
                if others and not self.losses:
                    self.fail(
                        f"G5: {p.name} executes {record.resource} in {others} and {task.name}"
                    )
                place = p.name, task.name
                self.executing[record.resource].setdefault(
                    place, (p.identity.id, instance.token // _TOKENS)
                )

    def end(self, p: "SimProcess", task: "SimFlow", job: Any) -> None:
        for instance in instances_of(job):
            self.executing[instance.record.resource].pop((p.name, task.name), None)

    def drop(self, p: "SimProcess") -> None:
        for executing in self.executing.values():
            for key in [key for key in executing if key[0] == p.name]:
                del executing[key]
        self.expected.pop(p.name, None)

    def apply(self, p: "SimProcess", instance: "Instance") -> None:
        """The user's code writes a batch to a database that checks the token."""
        record = instance.record
        resource, token, items = record.resource, instance.token, record.items
        processes = self._world.processes
        mine = [v for k, v in self.executing[resource].items() if k[0] == p.name]
        live = p.identity.surely_lives and any(pid == p.identity.id for pid, _ in mine)
        others = [
            name
            for (name, _), (pid, _) in self.executing[resource].items()
            if name != p.name
            and processes[name].alive
            and processes[name].identity.id == pid
            and processes[name].identity.surely_lives
        ]
        if others and live and not self.losses:
            self.fail(f"G5: {p.name} executes {resource} {token} beside {others}")
        done = self.applied[resource]
        if token in done:
            if sorted(items) != sorted(done[token]) and not self.losses:
                self.fail(f"G6: batch {token} of {resource} was {done[token]}, is {items}")
            self.seen["sink skips"] += 1
            return
        if done and token < max(done):
            self.seen["sink refuses an old token"] += 1
            if self.losses:
                self.may_be_lost.update(items)
                self.dropped.update(items)
            elif live:
                self.fail(f"G6: {p.name} lives and executes {resource} {token} after {max(done)}")
            return
        twice = [item for item in items if any(item in some for some in done.values())]
        if set(twice) - self.excused or len(set(items)) < len(items):
            self.fail(f"G4: batch {token} of {resource} applies {twice or items} twice")
        self.seen["applied twice, after a loss"] += len(twice)
        done[token] = list(items)
        self.seen["sink applies"] += 1

    def discarded(self, resource: str, token: int) -> None:
        self.seen["discarded"] += 1

    # Actions of the server

    def carried_out(self, call: Call, answers: list[Any]) -> None:
        """The server has carried out a call for the first time."""
        self.seen["calls carried out"] += 1
        members = {r: set(m) for r, m in self.members.items()}
        reaps = any(operation.code is Code.REAP for operation in call.operations)
        last_on = {}
        carried = [single for operation in call.operations for single in self.singles(operation)]
        for place, operation in enumerate(carried):
            if operation.code in _INGESTS:
                last_on.update(dict.fromkeys(operation.words[-1][::2], place))
            elif len(operation.words) > 1:
                last_on[operation.words[1]] = place
        for place, (operation, answer) in enumerate(zip(carried, answers, strict=True)):
            code = operation.code
            self.event += 1
            kind = (
                R(answer[0] if isinstance(answer, list) else answer)
                if code not in (Code.APPEND, Code.TRACK, Code.UNTRACK)
                else R.STORED
            )
            self.seen[f"{code.name} {kind.name}"] += 1
            self.executed[id(operation)] += 1
            if kind is R.FAILED:
                self.fail(f"unexpected: {operation!r} came to {answer}")
            if code in _ONCE and self.executed[id(operation)] > 1:
                self.fail(f"G4: {operation!r} is carried out twice")
            self.truth.setdefault(id(operation), (answer, operation))
            self.history[id(operation)].append(answer)
            if code is Code.REAP:
                for resource in self._world.resources:
                    if self._world.place(resource) == operation.partition:
                        self.ended[resource].append(self.event)
                continue
            if code is Code.CLOSE:
                continue
            if code in (*_INGESTS, Code.CLAIM):
                for resource, partial in self._world.broker.carried_out(operation, answer):
                    members.setdefault(resource, set()).add(call.process)
                    self._store(partial)
                continue
            if code in (Code.COMPLETE, Code.FAIL) and kind is not R.LOST and not reaps:
                owner = self.owners.get(operation.resource.decode(), call.process)
                if owner != call.process:
                    self.fail(f"G9: {call.process!r} does {operation!r}: it is {owner!r}'s")
            resource = operation.resource.decode()
            pids = members.setdefault(resource, set())
            was = call.process in pids
            if code in _MAKES_MEMBER:
                pids.add(call.process)
            if code in _STORES and operation.words[-1]:
                self._store(operation.words[-1])
            if code is Code.LEAVE:
                pids.discard(call.process)
                self._left(operation, answer, pids, was=was, reaps=reaps)
                if answer[0] != R.HELD:
                    self.ended[resource].append(self.event)
                elif last_on[operation.words[1]] == place:
                    self.ghost = call.process, resource
            self._token(call, code, operation, answer)

    def _store(self, partial: bytes) -> None:
        for item in partial.split(b","):
            if item in self.stored:
                self.fail(f"G4: {item!r} is stored twice")
            self.stored.add(item)
            self.at[item] = self.event

    def _left(
        self, operation: Operation, answer: Any, pids: set[bytes], *, was: bool, reaps: bool
    ) -> None:
        if reaps or operation.resource.decode() in self._world.parties:
            return
        if answer[1] != len(pids):
            self.fail(f"G1: {operation!r} came to {answer}, and {pids} are left")
        data = bool(operation.words[-1])
        last = answer[0] != R.HELD and answer[2] == 1
        if last != (not pids and (was or data)):
            self.fail(f"G2: {operation!r} came to {answer}, and {pids} are left")

    def _token(self, call: Call, code: Code, operation: Operation, answer: Any) -> None:
        if not isinstance(answer, list):
            return
        resource = operation.resource.decode()
        if answer[0] == R.AGAIN and not self.losses and code is not Code.REPLAY:
            last = max(self.ended[resource], default=0)
            late = [
                item
                for partial in answer[8] or ()
                for item in partial.split(b",")
                if self.at.get(item, 0) > last
            ]
            if late:
                self.fail(f"G7: the batch {answer} has {late} of the session after")
        if answer[0] == R.GRANTED:
            token, holder = answer[1], operation.words[2]
            if token in self.granted[holder]:
                return
            self.granted[holder].add(token)
        elif answer[0] in (R.RUN, R.AGAIN) and code is not Code.RESUME:
            token = answer[3]
        else:
            return
        if token <= self.highest[resource]:
            self.fail(f"G6: token {token} of {resource} after {self.highest[resource]}")
        self.highest[resource] = token

    # Invariants after every call

    def state(self) -> Snapshot:
        return Snapshot(self._world.server.look())

    def check(self) -> Snapshot:
        state = self.state()
        resources = self._world.resources
        copies: Counter[bytes] = Counter()
        for resource in resources:
            copies.update(state.items(resource))
            running = state.running.get(resource)
            if bool(running) != bool(state.batch[resource]):
                self.fail(f"G3: running {running} of {resource}: batch {state.batch[resource]}")
            tag = self._world.partitions.prefixes[self._world.place(resource)][:-2]
            for pid in state.responsible(resource):
                if resource.encode() not in state.registry.get((tag, pid), ()):
                    self.fail(f"G8: the registry of {pid!r} does not name {resource}")
                if not pid.startswith(b"class:") and pid not in state.lanes[tag]:
                    self.fail(f"G8: {pid!r} is responsible for {resource} and not among the lanes")
            self._applied_once(state, resource, copies)
        for item, times in copies.items():
            if times > 1:
                self.fail(f"G4: {item!r} is there {times} times")
        applied = {i for done in self.applied.values() for items in done.values() for i in items}
        for item in self.stored - applied - self.may_be_lost - self.dropped:
            if item not in copies:
                self.fail(f"G3: {item!r} was stored and is nowhere")
        self._no_ghost(state)
        self.members = {r: set(state.members[r]) for r in resources}
        self.owners = {r: run[b"owner"] for r, run in state.running.items()}
        return state

    def _applied_once(self, state: Snapshot, resource: str, copies: Counter[bytes]) -> None:
        running = state.running.get(resource)
        for token, items in self.applied[resource].items():
            for item in items:
                if not copies[item] or item in self.excused:
                    continue
                runs = running and int(running[b"token"]) * _TOKENS == token
                if not (runs and item in state.batch[resource]) and not any(
                    item in some for some in state.dead[resource].values()
                ):
                    self.fail(f"G4: {item!r} was applied under {token}, and is still to come")

    def _no_ghost(self, state: Snapshot) -> None:
        if self.ghost is None:
            return
        (pid, resource), self.ghost = self.ghost, None
        members = state.members[resource]
        owner = self._world.owner_of.get(pid)
        if (
            members
            and owner is not None
            and owner.alive
            and all(self._world.owner_of.get(member) is owner for member in members)
            and resource not in owner.held
        ):
            self.fail(f"G2: {pid!r} leaves {resource} and is told held, by itself: {list(members)}")

    # Losses

    def save(self) -> Saved:
        return Saved(Counter(self.executed), dict(self.truth), set(self.fresh), set(self.stored))

    def lose(self, saved: Saved | None, partitions: set[int]) -> None:
        """Forget the events in some partitions since a moment, after a rollback."""
        self.losses += 1
        self.emptied = self.emptied or (saved is None and bool(partitions))
        old = saved or Saved(Counter(), {}, set(), set())
        here = {k for k, (_, operation) in self.truth.items() if operation.partition in partitions}
        for key in here:
            del self.truth[key]
            self.executed[key] = old.executed[key]
        self.truth.update({k: v for k, v in old.truth.items() if v[1].partition in partitions})
        self.fresh = {k for k in self.fresh if k[1] not in partitions}
        self.fresh |= {k for k in old.fresh if k[1] in partitions}
        place = self._world.place
        was = {i for i in self.stored if place(i.split(b"-")[0].decode()) in partitions}
        kept = {i for i in old.stored if place(i.split(b"-")[0].decode()) in partitions}
        self.excused |= was
        self.may_be_lost |= was - kept
        self.stored = self.stored - was | kept
        state = self.state()
        self._world.broker.data_lost(state.keys)
        self.members = {r: set(m) for r, m in state.members.items()}
        self.owners = {r: run[b"owner"] for r, run in state.running.items()}

    # The end

    def ended_well(self) -> None:
        state = self.check()
        done = Counter(i for r in self.applied.values() for items in r.values() for i in items)
        for item in [*self.acked, *self.stored]:
            if item not in done and item not in self.may_be_lost and item not in self.dropped:
                self.fail(f"G3: {item!r} was acknowledged or stored, and never executed")
        # Positions and ids are lost with the data that they are about: it is delivered again.
        lost = self._world.broker.all_items() - done.keys() - self.dropped
        if lost:
            self.fail(f"Sources: {sorted(lost)} was delivered, and never executed")
        for item, times in done.items():
            if times > 1 and item not in self.excused:
                self.fail(f"G4: {item!r} was executed {times} times")
        for resource, batches in self.applied.items():
            if list(batches) != sorted(batches):
                self.fail(f"G5: the batches of {resource} were executed out of order")
        left = [
            (key, value)
            for key, value, ttl in state.keys
            if not stays(key) and not (ttl > 0 and key.partition(b"}:")[2].startswith(_EXPIRING))
        ]
        if left:
            self.fail(f"G11: {left} stays behind")
        if self.expected:
            self.fail(f"G15: {self.expected} did not notice what the server has lost")


def instances_of(job: Any) -> list["Instance"]:
    """Return what a job of the user's code executes."""
    many = getattr(job, "instances", None)
    if many is not None:
        return list(many)
    owner = getattr(job.function, "__self__", None)
    return [owner] if owner is not None and hasattr(owner, "record") else []
