"""A world of processes around a real server. It changes by one move at a time, and by nothing else."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from phonon._core.flows import AwaitMail, Execute, Outcome, Read, Send, Sleep, Wait
from phonon._protocol.lane import Call, State, add_contents
from phonon._protocol.library import Request
from phonon._protocol.partitions import Partitions
from phonon.errors import ConnectionLostError, PhononError, ServerError
from simulation.broker import Broker
from simulation.checks import Checks, Saved, Violation
from simulation.process import (
    INTERVAL,
    LEASE_US,
    Boom,
    HalfDoneError,
    Instance,
    Point,
    SimFlow,
    SimProcess,
)
from simulation.server import START, SimServer
from support.world import sequence_of

#: A move: its name, and what it is about.
Move = tuple[Any, ...]

#: Functions whose calls the network may keep, and deliver again at any time.
_KEPT = frozenset({"list", "open", "beat", "fence", "unlist", "expire", "nudge"})
_REFUSED = "OOM command not allowed when used memory > 'maxmemory'"
_STEP_US = int(INTERVAL * 1_000_000)


class Setup(NamedTuple):
    """A process as it begins: name, whether it recovers, the classes that it knows, its users."""

    name: str
    recovers: bool = True
    knows: Sequence[str] = ("K", "L")
    users: int = 2


class _Kept(NamedTuple):
    """A call that the network has kept."""

    words: tuple[bytes, ...]
    partition: int
    call: Call | None


class World:
    """Processes, their server, and what is known to be true.

    Args:
        server: A server, which is emptied.
        setups: The processes.
        partitions: How many there are.
        seed: Of the core's own random choices.
        together: Resources whose batches are executed together.
    """

    def __init__(
        self,
        server: SimServer,
        setups: Sequence[Setup],
        *,
        partitions: int = 2,
        seed: str = "",
        together: str = "f",
        tell: Callable[[str], object] | None = None,
    ) -> None:
        random.seed(seed)
        self.server = server
        server.reset()
        self.library = server.library
        self.count = partitions
        self.partitions = Partitions("s", partitions)
        #: The first two are in different partitions, the third one of three in its own.
        self.resources: tuple[str, ...] = ("d", "y", "f", "w")
        self.parties: set[str] = {"w"}
        self.together = together
        self.seen: Counter[str] = Counter()
        self.trace: list[Move] = []
        self.tell = tell
        self.owner_of: dict[bytes, SimProcess] = {}
        self.operations: list[Any] = []  # kept, so that ids are unique
        self.kept: dict[Any, _Kept] = {}
        self.answered: set[Any] = set()
        self.refused: set[Any] = set()
        self.overdue: set[bytes] = set()
        self.was_set = self.was_set_back = False
        self.saved: tuple[list[bytes], Saved] | None = None
        self.fate = ""
        self.steps = 0
        self.processes: dict[str, SimProcess] = {}
        self.broker = Broker(self)
        self.checks = Checks(self)
        self._handler = _Watcher(self.checks)
        for setup in setups:
            self.processes[setup.name] = SimProcess(self, *setup)
        for p in list(self.processes.values()):
            self.run_alone(p)

    def clock(self) -> float:
        return (self.server.now - START) / 1_000_000 + 1000.0

    def place(self, resource: str) -> int:
        return self.partitions.of(resource.encode())

    @staticmethod
    def class_of(resource: str) -> str:
        return "L" if resource == "f" else "K"

    def run_alone(self, p: SimProcess) -> None:
        """Let a new process appear, without disturbance."""
        for _ in range(20):
            task = p.tasks.get("boot")
            if task is None:
                return
            self.do(("go", p.name, "boot", "ok"))

    # Moves

    def do(self, move: Move) -> bool:
        """Make a move. Return whether it was possible."""
        self.steps += 1
        self.trace.append(move)
        if self.tell is not None:
            self.tell(f"{self.clock() - 1000:10.3f} {move}")
        with self._handler:
            possible = getattr(self, f"do_{move[0]}")(*move[1:])
            for p in self.processes.values():
                if p.alive and self.clock() >= p.identity.lives_until:
                    # Also the one that it is about to be reborn as.
                    self.overdue |= {p.identity.id, p.engine.rebirth._next_id}
            self.checks.beliefs()
        if self.checks.violation is not None:
            raise self.checks.violation
        return possible is not False

    def _task(self, name: str, task: str) -> tuple[SimProcess | None, SimFlow | None]:
        p = self.processes.get(name)
        if p is None or not p.alive:
            return None, None
        return p, p.tasks.get(task)

    def do_user(self, name: str, task: str, what: str, *arguments: Any) -> bool:
        """A user begins something."""
        p, t = self._task(name, task)
        if p is None or t is None or not t.is_idle or p.stopping:
            return False
        self.seen[f"user {what}"] += 1
        t.finish((getattr(p, what), arguments))
        p.go(t)
        return True

    def do_call(self, name: str, partition: int, fate: str = "ok") -> bool:
        """A process sends what a lane has, and something becomes of it.

        Args:
            name: Which process.
            partition: Which lane.
            fate: "ok"; "slow": its tasks go on later; "later": so does the answer; "lost": it never
                arrives; "deaf": it is carried out, and the answer is lost; "twice"; "refused".
        """
        p = self.processes.get(name)
        if p is None or not p.alive or not p.identity.lanes:
            return False
        lane = p.identity.lanes[partition]
        call = lane.next_call()
        if call is None:
            return False
        self.seen[f"fate {fate}"] += 1
        words = self._keep_call(partition, call)
        if fate == "lost":
            lane.no_answer()
            return True
        if fate == "refused":
            self.refused.add(self._key(partition, call))
            lane.refuse(ServerError(_REFUSED), call)
            return True
        reply = self._apply(words, partition, call)
        if fate == "twice":
            reply = self._apply(words, partition, call)
        if fate == "deaf":
            lane.no_answer()
        elif fate == "later":
            lane.no_answer()
            p.replies.append((lane, call, reply))
        else:
            self._receive(p, lane, call, reply)
            if fate == "ok":
                self._go_on(p)
        return True

    def do_reply(self, name: str) -> bool:
        """An answer arrives late."""
        p = self.processes.get(name)
        if p is None or not p.alive or not p.replies:
            return False
        self._receive(p, *p.replies.pop(0))
        return True

    def _keep_call(self, partition: int, call: Call) -> tuple[bytes, ...]:
        prefix = self.partitions.prefixes[partition]
        name = "apply_free" if call.frees else "apply"
        words = self.library.request(name, prefix, *call.arguments).words
        self.kept.setdefault(self._key(partition, call), _Kept(words, partition, call))
        return words

    @staticmethod
    def _key(partition: int, call: Call) -> Any:
        return call.process, partition, call.sequence, call.number, call.arguments[3]

    def _apply(self, words: tuple[bytes, ...], partition: int, call: Call) -> Any:
        reply = self.server.call(words)
        self._say(f"apply {call.process.decode()}/{partition} {call.sequence}", call, reply)
        if isinstance(reply, Exception):
            kind = str(reply).split(" ")[0]
            self.seen[f"answer {kind}"] += 1
            if not kind.startswith("PHONON") or kind == "PHONONSTATE":
                self.checks.fail(f"unexpected: {reply}")
            return reply
        answers = msgpack.unpackb(reply[0], raw=True, strict_map_key=False)
        add_contents(answers, reply[2] if len(reply) > 2 else None)
        key = self._key(partition, call)
        if call.error is None and key not in self.checks.fresh:
            self.checks.fresh.add(key)
            if key in self.answered and self.checks.emptied:
                self.checks.fail(f"G4: {key}, answered before a loss, is carried out again")
            self.checks.carried_out(call, answers)
        elif call.error is None:
            self.seen["repeats"] += 1
        elif answers:
            self.seen["refused, but an earlier copy was carried out"] += 1
        self.checks.check()
        return reply

    def _receive(self, p: SimProcess, lane: Any, call: Call, reply: Any) -> None:
        """Do what a driver does with an answer."""
        if not lane.is_under_way(call):
            self.seen["answers that came too late"] += 1
            return
        if isinstance(reply, Exception):
            kind, last = str(reply).split(" ")[:2]
            told = lane.close() if kind == "PHONONLOST" else []
            for operation, answer in told:
                p.deliver(operation, answer)
            if not told:
                if kind == "PHONONSTALE" and not self.checks.losses:
                    self.checks.fail(f"G4: {kind} to a call in flight: {call.operations}")
                self.seen[f"suspected by {kind}"] += 1
                p.identity.suspect(lane, kind, int(last))
            return
        self.answered.add(self._key(lane.partition, call))
        told, again = lane.read(call, reply)
        for operation, answer in told:
            p.deliver(operation, answer)
        lane.advance(call, reply[1], again)

    def _go_on(self, p: SimProcess) -> None:
        for task in list(p.tasks.values()):
            if p.alive and task.is_ready and isinstance(task.effect, Send):
                p.go(task)

    def _say(self, what: str, call: Call | None, reply: Any) -> None:
        if self.tell is None:
            return
        said = ""
        if call is not None:
            said = str(list(call.operations)) if call.error is None else "what became of it?"
            if not isinstance(reply, Exception):
                reply = msgpack.unpackb(reply[0], raw=True, strict_map_key=False)
        self.tell(f"{'':15}{what} {said} -> {reply}")

    def do_go(self, name: str, task: str, fate: str = "ok") -> bool:
        """A task goes on.

        Args:
            name: Which process.
            task: Which task.
            fate: "ok"; and for a `Read` as well "step": one of its requests; "lost", "deaf",
                "twice", "fail": its patience is over, "deaf fail": after it was carried out.
        """
        p, t = self._task(name, task)
        if p is None or t is None or t.detached:
            return False
        if t.is_ready:
            p.go(t)
            return True
        effect = t.effect
        if isinstance(effect, Read):
            self._read(p, t, fate)
        elif isinstance(effect, Point):
            t.finish(None)
        elif isinstance(effect, Sleep):
            self.server.pass_time(max(0, t.deadline - self.server.now))
            t.finish(None)
        elif isinstance(effect, Wait | AwaitMail):
            if fate != "timeout" and self.server.now < t.deadline:
                return False
            self.seen["waited in vain"] += isinstance(effect, AwaitMail)
            t.finish(False)
        else:
            return False
        if t.is_ready:
            p.go(t)
        return True

    def _read(self, p: SimProcess, t: SimFlow, fate: str) -> None:
        requests = t.effect.requests
        if fate in ("lost", "fail"):
            t.replies = []
        elif fate == "step":
            t.replies.append(self._request(requests[len(t.replies)]))
        else:
            for request in requests[len(t.replies) :]:
                t.replies.append(self._request(request))
                if fate == "twice":
                    t.replies[-1] = self._request(request)
            if fate.startswith("deaf"):
                t.replies = []
        if fate.endswith("fail"):
            self.seen["reads in vain"] += 1
            t.finish([ConnectionLostError("simulated does not answer") for _ in requests])
        elif len(t.replies) == len(requests):
            t.finish(t.replies)

    def _request(self, request: Request) -> Any:
        function = request.words[1].decode().split("_", 2)[2]
        if function in _KEPT:
            key = (function, request.key, *request.words[4:])
            self.kept.setdefault(key, _Kept(request.words, -1, None))
        reply = self.server.call(request.words)
        self._say(f"{function} {request.words[3:]}", None, reply)
        if isinstance(reply, Exception):
            self.checks.fail(f"unexpected: {function} {request.words[3:]}: {reply}")
        if function in ("open", "fence"):
            self.checks.check()
        return reply

    def do_exec(self, name: str, task: str, index: int, fate: str = "ok") -> bool:
        """The user's code runs, for one job.

        Args:
            name: Which process.
            task: Which task.
            index: Which of the task's jobs.
            fate: "ok"; "raise"; "raise after": when it has committed; "half": it has committed, and
                goes on; "some": of several executed together the first one fails.
        """
        p, t = self._task(name, task)
        if p is None or t is None or not isinstance(t.effect, Execute) or t.ready:
            return False
        jobs = t.effect.jobs
        if index >= len(jobs) or jobs[index].outcome is not None:
            return False
        job = jobs[index]
        job.begun = True
        self.fate = fate
        self.seen[f"execute {fate}"] += 1
        try:
            job.outcome = Outcome(job.function())
        except HalfDoneError:
            return True
        except (Boom, PhononError) as error:
            job.outcome = Outcome(error=error)
        self.checks.end(p, t, job)
        if all(job.outcome is not None for job in jobs):
            t.finish(None)
            p.go(t)
        return True

    def do_early(self, name: str, task: str) -> bool:
        """Those jobs that have ended are seen to, before the others have."""
        p, t = self._task(name, task)
        if p is None or t is None or not isinstance(t.effect, Execute) or t.ready:
            return False
        if all(job.outcome is None for job in t.effect.jobs):
            return False
        t.finish(None)
        p.go(t)
        return True

    def user_code(self, p: SimProcess, instances: list[Instance]) -> Any:
        """Run the user's code, which raises, fails some records, or succeeds."""
        if self.fate == "raise":
            raise Boom
        failed = instances[:1] if self.fate == "some" and len(instances) > 1 else []
        for instance in instances:
            if instance not in failed:
                self.checks.apply(p, instance)
        if self.fate == "raise after":
            raise Boom
        if self.fate == "half":
            raise HalfDoneError
        return [(instance, Boom()) for instance in failed] or None

    def do_mail(self, name: str, partition: int, fate: str = "ok") -> bool:
        """A process reads its mailbox of a partition; the mail may be lost on its way."""
        p = self.processes.get(name)
        if p is None or not p.alive or not p.identity.lanes:
            return False
        process = p.identity.lanes[partition].process
        mailbox = self.partitions.prefixes[partition] + b"mailbox:" + process
        mail = self.server.expect(b"LPOP", mailbox)
        if mail is None:
            return False
        if fate == "lost":
            self.seen["mail lost"] += 1
            return True
        for task in list(p.tasks.values()):
            effect = task.effect
            if isinstance(effect, AwaitMail) and not task.ready and effect.waiter == mail.decode():
                self.seen["woken"] += 1
                task.finish(True)
        return True

    def do_gone(self, name: str, task: str) -> bool:
        """A caller gives up, or its patience is over; its flow goes on."""
        p, t = self._task(name, task)
        if p is None or t is None or t.is_idle or t.detached or t.ready:
            return False
        if not isinstance(t.effect, Send) and (t.gone or not t.name.startswith("user")):
            return False
        self.seen[f"callers gone, {t.name.rstrip('0123456789')}"] += 1
        p.detach(t)
        return True

    def do_beat(self, name: str) -> bool:
        """A process beats now."""
        p = self.processes.get(name)
        if p is None or not p.alive or p.engine.heartbeat.signal is None:
            return False
        p.engine.heartbeat.wake()
        return True

    def do_work(self, name: str) -> bool:
        """A process looks after its unfinished work now."""
        p = self.processes.get(name)
        if p is None or not p.alive or p.engine.outbox.signal is None:
            return False
        p.engine.outbox.wake()
        return True

    # Faults of processes, and of the server

    def living(self) -> list[SimProcess]:
        return [p for p in self.processes.values() if p.alive and p.identity.lanes]

    def do_time(self, micros: int, silent: str = "") -> None:
        """Time passes. All that live beat, but for one."""
        while micros > 0:
            some = min(micros, _STEP_US)
            micros -= some
            self.server.pass_time(some)
            for p in self.living():
                if p.name != silent and not p.identity.suspected:
                    self._beat_in_time(p)

    def _beat_in_time(self, p: SimProcess) -> None:
        task = p.tasks.get("heartbeat")
        if task is None:
            return
        if isinstance(task.effect, Wait):
            p.engine.heartbeat.wake()
        for _ in range(60):
            effect = task.effect
            if task.ended or not p.alive:
                return
            if task.is_ready:
                p.go(task)
                if isinstance(task.effect, Wait) and not task.is_ready:
                    return
            elif isinstance(effect, Read):
                self._read(p, task, "ok")
            elif isinstance(effect, Send):
                for partition in {o.partition for o in effect.operations}:
                    self.do_call(p.name, partition, "slow")
            else:
                return

    def do_kill(self, name: str) -> bool:
        """A process is killed, wherever it is."""
        p = self.processes.get(name)
        if p is None or not p.alive:
            return False
        self.seen["kills"] += 1
        for task in p.tasks.values():
            if not task.is_idle and not isinstance(task.effect, Wait):
                self.seen[f"killed in {task.name.rstrip('0123456789')}"] += 1
        if p.identity.suspected:
            self.seen["killed in rebirth"] += 1
        p.killed = True
        self.checks.drop(p)
        return True

    def do_pause(self, name: str) -> bool:
        """A process is silent for longer than its lease, while the others beat."""
        p = self.processes.get(name)
        if p is None or not p.alive or not p.identity.lanes:
            return False
        self.seen["pauses"] += 1
        self.do_time(LEASE_US + 2_000_000, name)
        return True

    def do_outage(self) -> None:
        """The server is away for longer than all leases."""
        self.seen["outages"] += 1
        self.server.pass_time(LEASE_US + 5_000_000)

    def do_start(self, *setup: Any) -> bool:
        """A process starts."""
        name = setup[0]
        if name in self.processes:
            return False
        self.seen["starts"] += 1
        self.processes[name] = SimProcess(self, *setup)
        return True

    def do_stop(self, name: str) -> bool:
        """A process stops."""
        p = self.processes.get(name)
        if p is None or not p.alive or not p.engine.is_started or p.stopping:
            return False
        p.stopping = True
        p.spawn("stop", p.stop())
        return True

    def do_back(self, micros: int) -> None:
        """The server's clock is set back."""
        self.seen["clocks set back"] += 1
        self.was_set = self.was_set_back = True
        self.server.skew -= micros

    def do_jump(self, micros: int) -> None:
        """The server's clock is set forward."""
        self.seen["clocks set forward"] += 1
        self.was_set = True
        self.server.skew += micros

    def do_forward(self) -> None:
        """The server's clock is not behind any more. To set it back delays takeovers for long."""
        self.server.skew = max(0, self.server.skew)

    def do_save(self) -> None:
        """The server's data is saved."""
        self.saved = self.server.save(), self.checks.save()

    def do_rollback(self, which: str = "all") -> bool:
        """The server's data is again what was saved.

        Args:
            which: "all"; "0", "1", ...: of the partition only; "namespace": of the list of
                processes.
        """
        if self.saved is None:
            return False
        self.seen[f"rollbacks {which}"] += 1
        self._lose(which, *self.saved)
        return True

    def do_empty(self, which: str = "all") -> None:
        """The server's data is gone."""
        self.seen[f"emptied {which}"] += 1
        if which == "all":
            self.saved = None
        self._lose(which, [], None)

    def _lose(self, which: str, data: list[bytes], saved: Saved | None) -> None:
        prefixes = [*self.partitions.prefixes, self.partitions.prefix]
        partitions = set(range(self.count))
        if which == "namespace":
            prefixes, partitions = prefixes[-1:], set()
        elif which != "all":
            prefixes, partitions = [prefixes[int(which)]], {int(which)}
        self.server.load(prefixes, data)
        self.checks.lose(saved, partitions)
        for p in self.living():
            for partition in partitions:
                lane = p.identity.lanes[partition]
                if lane.state is State.FENCED:
                    continue
                key = self.partitions.prefixes[partition] + b"lane:" + lane.process
                known = self.server.expect(b"HMGET", key, b"state", b"fenced")
                gone = lane.answered - sequence_of(known)
                if gone > 0 and not p.identity.suspected:
                    self.checks.expected[p.name] = gone

    def do_dup(self, key: Any) -> bool:
        """The network delivers a call that it has kept, once more."""
        kept = self.kept.get(key)
        if kept is None:
            return False
        if kept.call is None:
            self.seen["late duplicates outside of lanes"] += 1
            reply = self.server.call(kept.words)
            self._say(f"late duplicate {key}", None, reply)
            self.checks.check()
            return True
        if key in self.refused and self.checks.losses:
            # Refused, then the empty call that asked about it was lost with the server's data: no
            # client can tell any more. The documentation of a loss says so.
            return False
        self.seen["late duplicates"] += 1
        self._apply(kept.words, kept.partition, kept.call)
        return True

    def story(self) -> str:
        return "\n".join(map(str, self.trace))


class _Watcher(logging.Handler):
    """Finds errors in what the core logs, which it survives and a test must not."""

    def __init__(self, checks: Checks) -> None:
        super().__init__()
        self._checks = checks
        self._log = logging.getLogger("phonon")

    def __enter__(self) -> None:
        self._before = self._log.propagate, self._log.handlers
        self._log.propagate, self._log.handlers = False, [self]

    def __exit__(self, *_: object) -> None:
        self._log.propagate, self._log.handlers = self._before

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        error = record.exc_info[1] if record.exc_info else None
        for found in (error, *arguments):
            if isinstance(found, Exception) and not isinstance(found, PhononError | Boom):
                if self._checks.violation is None:
                    text = f"{type(found).__name__}: {found}"
                    violation = Violation(f"unexpected, in the log: {record.getMessage()}: {text}")
                    violation.__cause__ = found
                    self._checks.violation = violation
