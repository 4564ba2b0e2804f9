"""Watches a resource on the server while a schedule runs, and checks what users may rely on.

The guarantees G1 to G8 are checked against what the processes were told and what the keys hold;
only at the end of a check are the keys compared with the model, one by one.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgpack
from model import Model, Violation, places_of
from steps import Answer, Command, Key, Lab

MEMORY_MS = 70_000
# The longest that anything stays which expires by itself.
LONGEST_MS = 100_000
DAY_MS = 24 * 3600 * 1000
# Fields that are no numbers.
TEXTS = (b"owner", b"error", b"holder", b"pid", b"thread")


def expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Violation(f"{what}\n  is        {found}\n  should be {expected}")


#: Between the contributions in a partial that was merged from several.
PLUS = b"+"


def parts(partials: Iterable[bytes]) -> list[bytes]:
    """The contributions that partials consist of."""
    return [part for partial in partials for part in partial.split(PLUS)]


class Witness:
    """What has happened to one resource.

    Args:
        lab: Where it is.
        namespace: Nothing else is in it.
        base: The resource, whose name is "x".
    """

    def __init__(self, lab: Lab, namespace: str, base: bytes) -> None:
        self.lab = lab
        self.namespace = namespace
        self.base = base
        self.keys: dict[str, Key] = {}
        self.event = 0
        #: Each partial, and when it was stored.
        self.stored: dict[bytes, int] = {}
        self.session_ended = 0
        #: Tokens of batches and their partials, in the order in which they started.
        self.started: list[tuple[int, list[bytes]]] = []
        self.completed: list[tuple[int, list[bytes]]] = []
        #: The process that was given a batch which it has not ended, and the batch's token.
        self.executing: dict[bytes, int] = {}
        #: Partials of parked batches that were deleted.
        self.discarded: list[list[bytes]] = []

    def look(self) -> None:
        """Read everything there is."""
        self.keys = self.lab.dump(self.namespace)

    def dict_at(self, suffix: str) -> dict[bytes, Any]:
        key = self.keys.get("{=x}:" + suffix)
        return dict(key.content) if key else {}

    def list_at(self, suffix: str) -> list[bytes]:
        key = self.keys.get("{=x}:" + suffix)
        return list(key.content) if key else []

    def parked(self) -> list[list[bytes]]:
        return [key.content for name, key in self.keys.items() if ":parked:" in name]

    def registered(self, pid: bytes) -> int:
        """Since when a registry names the resource, negative if locked; 0 if it does not."""
        holds = self.keys.get("{@" + pid.decode() + "}:holds")
        return holds.content.get(self.base, 0) if holds else 0

    # -- what the processes are told

    def note(self, pid: bytes, command: Command, answer: Answer) -> None:
        """Note what a call has come to that has reached the server for the first time."""
        self.event += 1
        step, kind = command.step, answer[0]
        members, batch = self.dict_at("members"), self.list_at("batch")
        if step == "discard" and kind == b"discarded":
            self.discarded.append(self.list_at(f"parked:{command.args[0]}"))
        self.look()
        if step in ("append", "leave") and command.args[-1]:
            self.stored[command.args[-1]] = self.event
        if step == "leave":
            self.note_leave(pid, command, answer, members)
        if step in ("complete", "fail") and kind in (b"done", b"parked", b"again"):
            self.note_end(pid, command, batch)
        if step == "entrust" and kind == b"entrusted":
            self.executing = {command.args[1]: self.executing.pop(pid)}
        if step == "recover" and not self.dict_at("members"):
            self.session_ended = self.event
        if step == "recover" and command.args[0] in self.executing:
            self.note_takeover(pid, command, answer)
        elif kind in (b"run", b"again") and step != "resume":
            self.note_start(pid, answer[2])

    def note_end(self, pid: bytes, command: Command, batch: list[bytes]) -> None:
        if self.executing.pop(pid, None) != command.args[0]:
            raise Violation(f"G5: {pid!r} ended a batch that was not its own: {command}")
        if command.step == "complete":
            self.completed.append((command.args[0], batch))

    def note_takeover(self, pid: bytes, command: Command, answer: Answer) -> None:
        token = self.executing.pop(command.args[0])
        if answer[0] not in (b"run", b"later") or answer[2] != token:
            raise Violation(f"G8: {pid!r} did not take over {token}, but was told {answer}")
        self.executing = {pid: token}

    def note_leave(
        self, pid: bytes, command: Command, answer: Answer, members: dict[bytes, int]
    ) -> None:
        was_member = pid in members or bool(command.args[-1])
        last = was_member and not self.dict_at("members") and not self.dict_at("parties")
        told = answer[3] == 0 and answer[4] == 1
        if told != last:
            raise Violation(f"G2: {pid!r} was told {answer}; the members were {members}")
        if answer[0] != b"held":
            self.session_ended = self.event

    def note_start(self, pid: bytes, token: int) -> None:
        partials = self.list_at("batch")
        if self.executing:
            raise Violation(f"G5: {pid!r} was given {token} beside {self.executing}")
        if self.started and token <= self.started[-1][0]:
            raise Violation(f"G6: batch {token} started after {self.started[-1][0]}")
        newcomers = [p for p in parts(partials) if self.stored[p] > self.session_ended]
        if newcomers:
            raise Violation(f"G7: batch {token} has partials of the next session: {newcomers}")
        self.executing[pid] = token
        self.started.append((token, partials))

    # -- what must be true after every step

    def check(self, model: Model, count: int, *, colocated: bool) -> None:
        """Check everything.

        Args:
            model: What should be there.
            count: What the server counts.
            colocated: Whether the steps keep the registries.
        """
        self.look()
        self.check_count(model, count)
        self.check_partials()
        self.check_executor()
        self.check_locks()
        self.check_registries(model, colocated=colocated)
        self.check_expiry()
        expect("the keys", self.state(), model.state())

    def check_count(self, model: Model, count: int) -> None:
        live = [pid for pid, until in self.dict_at("members").items() if until > self.lab.now]
        if not count == len(live) == len(model.live()):
            raise Violation(f"G1: {count} are counted, of {live}, {model.live()}")

    def check_partials(self) -> None:
        places = [self.list_at("partials"), self.list_at("batch"), *self.parked()]
        places += [partials for _, partials in self.completed]
        places += self.discarded
        everywhere = Counter(parts(itertools.chain.from_iterable(places)))
        if everywhere != Counter(list(self.stored)):
            raise Violation(f"G3, G4: {dict(everywhere)} is there of {sorted(self.stored)}")
        for partials in map(parts, places):
            if partials != sorted(partials, key=self.stored.__getitem__):
                raise Violation(f"the partials are out of order: {partials}")

    def check_executor(self) -> None:
        running = self.dict_at("running")
        owned = {running[b"owner"]: int(running[b"token"])} if running else {}
        if owned != self.executing or bool(running) != ("{=x}:batch" in self.keys):
            raise Violation(f"G5: running is {owned}, executing {self.executing}")

    def check_locks(self) -> None:
        shared, sharers = self.dict_at("shared"), self.dict_at("sharers")
        live = [holder for holder, until in shared.items() if until > self.lab.now]
        lock = self.dict_at("lock")
        if live and lock and int(lock[b"until"]) > self.lab.now:
            raise Violation(f"{lock[b'holder']!r} holds the lock beside {live}")
        if any(len(live) > places_of(holder) for holder in live):
            raise Violation(f"more than there are places: {live}")
        counts = Counter(b"@" + holder.rpartition(b"/")[0] for holder in shared)
        told = {name: int(n) for name, n in sharers.items() if name.startswith(b"@")}
        expect("the counts of sharers", told, dict(counts))

    def check_registries(self, model: Model, *, colocated: bool) -> None:
        responsible = {*self.dict_at("members"), *self.executing, *model.registries}
        named = {pid: since for pid in responsible if (since := self.registered(pid))}
        if colocated:
            expect("the registries", named, model.registries)
        for pid in (*self.dict_at("members"), *self.executing):
            if pid not in named:
                raise Violation(f"G8: {pid!r} is responsible, and its registry does not say so")

    def check_expiry(self) -> None:
        """Data never expires by itself; what is no data does."""
        now, micros = self.lab.client.time()
        for name, key in self.keys.items():
            suffix = name.partition("}:")[2].partition(":")[0]
            left = key.expires - now * 1_000 - micros // 1_000
            if suffix in ("lock", "shared", "sharers", "queue", "waiting", "wake", "memory"):
                if not 0 < left <= LONGEST_MS:
                    raise Violation(f"{name} expires in {left} ms")
            elif suffix == "fence":
                if not LONGEST_MS < left <= DAY_MS:
                    raise Violation(f"{name} expires in {left} ms")
            elif (
                suffix in ("modified", "parties")
                and self.dict_at("parties")
                and not self.dict_at("members")
            ):
                continue  # it waits for those who are to come, but not for ever
            elif key.expires != -1:
                raise Violation(f"G3: {name} expires by itself, in {left} ms")

    def state(self) -> dict[str, Any]:
        """The resource's keys in the model's terms."""
        state: dict[str, Any] = {}
        for name, (content, _) in self.keys.items():
            base, _, suffix = name.partition("}:")
            if base != "{=x" or suffix == "memory":
                continue
            if suffix == "parked":
                state[suffix] = {int(t): msgpack.unpackb(entry) for t, entry in content.items()}
            elif suffix == "sharers":
                state[suffix] = content
            elif suffix == "queue":
                state[suffix] = {holder: micros // 1_000 for holder, micros in content.items()}
            elif isinstance(content, dict):
                state[suffix] = {f: v if f in TEXTS else int(v) for f, v in content.items()}
            else:
                state[suffix] = content
        return state

    # -- what must be true at the end

    def check_end(self) -> None:
        """Check what is left when everybody has left and every batch is executed."""
        self.look()
        executed = [partials for _, partials in self.completed]
        done = parts(itertools.chain(*executed, *self.parked(), *self.discarded))
        if Counter(done) != Counter(list(self.stored)):
            raise Violation(f"G3: {sorted(self.stored)} was stored, {sorted(done)} executed")
        tokens = [token for token, _ in self.completed]
        if tokens != sorted(tokens):
            raise Violation(f"G5: batches were completed in the order {tokens}")
        left = {name for name in self.keys if ":parked" not in name}
        if left - {"{=x}:fence"} != {"{=x}:memory"}:
            raise Violation(f"G11: {left} stays behind")
