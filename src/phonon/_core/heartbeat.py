"""The heartbeat: renews the lease, verifies the lanes, and finds dead processes."""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from phonon._core.flows import Flow, Read, Signal, Wait
from phonon._core.identity import Identity
from phonon._core.leases import Leases
from phonon._core.outbox import Outbox
from phonon._core.rebirth import Rebirth
from phonon._core.takeover import Takeover
from phonon._protocol.lane import Lane
from phonon._protocol.operations import class_of_queue
from phonon._protocol.partitions import decode
from phonon.errors import ServerError, ServerUnreachableError

log = logging.getLogger("phonon")

#: A process may be declared dead after this many heartbeat intervals without a heartbeat.
DEAD_AFTER = 4
#: Seconds after another process's deadline at which to check it.
DEATH_GRACE = 0.01
#: The most dead processes that the answer to a beat names. See HANDED_OUT in processes.lua.
HANDED_OUT = 4
#: The number of beats between two searches for lanes of processes that are not registered.
SWEEP_EVERY = 4
#: The most pages of this process's locks and batches to compare before it stops.
MOST_PAGES = 16
#: Seconds by which the server's clock may be ahead of this one in that comparison.
AHEAD = 3600


class _LaneState(NamedTuple):
    """The state of a lane before the question to the server."""

    lane: Lane
    answered: int
    stamp: bytes


class Heartbeat:
    """Keeps a process alive.

    Args:
        identity: The identity of this process.
        rebirth: Called when this process was declared dead.
        takeover: Called for other processes that were declared dead.
        outbox: Takes up batches that their executor has forgotten.
        leases: Locks with leases of their own.
        interval: Seconds between two beats.
        recovers: Whether the process executes the batches of dead ones.
        is_referenced: Tells whether the public process object still exists. If not, the heartbeat
            stops, and survivors take over.
        report: Returns the facts that operators see about the process.
    """

    def __init__(
        self,
        identity: Identity,
        rebirth: Rebirth,
        takeover: Takeover,
        outbox: Outbox,
        leases: Leases,
        *,
        interval: float,
        recovers: bool,
        is_referenced: Callable[[], bool],
        report: Callable[[], bytes],
    ) -> None:
        self._identity = identity
        self._rebirth = rebirth
        self._takeover = takeover
        self._outbox = outbox
        self._leases = leases
        self._interval = interval
        self._recovers = recovers
        self._is_referenced = is_referenced
        self._report = report
        self.signal: Signal | None = None
        self.begin()

    def begin(self) -> None:
        """Start without a beat: at first, and in a forked child."""
        self.stopping = False
        self.closing = False
        self.beats = 0
        self._orphans: dict[bytes, float] = {}
        self._warned = False

    def wake(self) -> None:
        """Beat now."""
        if self.signal is not None:
            self.signal.set()

    def work(self) -> Flow[None]:
        """Beat until the process stops, also after errors.

        If a heartbeat ended by an error, others would take over from a process that still works.
        """
        pause = 0.0
        while not self.stopping and self._is_referenced():
            yield Wait(self.signal, pause)
            if self.stopping or not self._is_referenced():
                return
            pause = self._interval
            try:
                if self._identity.suspected:
                    yield from self._rebirth.run()
                pause = min(pause, (yield from self.beat()))
            except (ServerUnreachableError, ServerError) as error:
                pause = min(pause, 1.0)
                if not self._warned:
                    log.warning("no heartbeat: %s", error)
                self._warned = True
            except Exception:
                log.exception("a heartbeat of process %s failed", self._identity.name)
            else:
                if self._warned:
                    log.warning("the heartbeat of process %s is back", self._identity.name)
                self._warned = False

    def beat(self) -> Flow[float]:
        """Beat once.

        Returns:
            Seconds until the next beat, at the most.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        identity = self._identity
        own_id, begun = identity.id, identity.clock()
        known = [_LaneState(lane, lane.answered, lane.stamp) for lane in identity.lanes]
        before = b"%d" % int((time.time() - self._interval) * 1000)
        request = identity.in_namespace(
            "beat",
            own_id,
            identity.lease_ms,
            identity.epoch,
            identity.listing,
            b"%d" % identity.may_mark,
            b"%d" % self._recovers,
            b"%d" % int(self._interval * 1000),
            self._report(),
            b"%d" % int((begun - identity.beaten_at) * 1_000_000),
        )
        page = b"%d" % (self.beats % 16 if self.beats % 2 else 0)
        verify = identity.everywhere("verify", own_id, before, page)
        answer, *found = yield Read([request, *verify], self._interval)
        if isinstance(answer, Exception):
            raise answer
        if identity.id != own_id:
            return 0.0
        self.beats += 1
        lost = not self.closing and self._has_lost(known, found)
        if answer[0] != b"alive":
            yield from self._rebirth.run(forgotten=answer[0] == b"forgotten")
            return 0.0
        identity.beat_answered(begun)
        if self.closing:
            self._takeover.go_on()  # the lanes cannot be closed before the former self is reaped
            return self._interval
        if lost:
            yield from self._rebirth.run()
            return 0.0
        self._takeover.living = answer[2]
        self._takeover.has_more = len(answer) - 3 >= HANDED_OUT
        self._takeover.add(answer[3:])
        self._compare(found)
        self._leases.start_work()
        if self._outbox.has_work:
            self._outbox.wake()
        if self.beats % SWEEP_EVERY == 1:
            yield from self.sweep()
        next_death = answer[1] / 1000 + DEATH_GRACE if answer[1] >= 0 else self._interval
        return float(next_death) if identity.may_mark else self._interval

    def _has_lost(self, known: list[_LaneState], found: list[Any]) -> bool:
        """Return whether the server has lost calls that it had answered.

        All lanes are compared, so that each loss is reported.
        """
        lanes, has_lost = self._identity.lanes, False
        for (lane, answered, stamp), answer in zip(known, found, strict=True):
            if isinstance(answer, Exception) or lanes[lane.partition] is not lane:
                continue
            sequence, number, last_stamp, fenced = answer[:4]
            if (
                number != lane.number
                or sequence < answered
                or (sequence == answered and last_stamp != stamp)
            ):
                known_calls = sequence if number == lane.number else 0
                self._identity.suspect(lane, "PHONONLOST", max(0, known_calls))
                has_lost = True
            elif fenced:
                self._identity.suspect(lane, "PHONONFENCED", sequence)
                has_lost = True
        return has_lost

    def compare(self) -> Flow[None]:
        """Compare all locks and batches with the server, before the process stops.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        identity = self._identity
        now = b"%d" % int((time.time() + AHEAD) * 1000)
        for page in range(MOST_PAGES):
            verify = identity.everywhere("verify", identity.id, now, b"%d" % page)
            found = yield Read(verify)
            self._compare(found)
            if not any(isinstance(each, list) and (each[5] or each[6]) for each in found):
                break

    def _compare(self, found: list[Any]) -> None:
        """Take up this process's batches and locks on the server that are unknown here."""
        for partition, answer in enumerate(found):
            if isinstance(answer, Exception):
                continue
            queues, batches, locks, gone = answer[4:8]
            self._takeover.add(q for q in queues if class_of_queue(q) is not None)
            for name, token in zip(batches[::2], batches[1::2], strict=True):
                if not self._outbox.knows(name, token):
                    log.warning(
                        "a batch of %r was forgotten by its executor and is taken up again",
                        decode(name),
                    )
                    self._outbox.take_over(partition, name, token, 0.0)
            self._leases.compare(partition, locks, gone)

    def sweep(self) -> Flow[None]:
        """Take over the lanes of processes that are not registered.

        A rollback of the server may have removed a registration. Lanes are read before processes,
        and a lane is an orphan only when it was found twice over more than a lease: until then its
        process may not know of the rollback, and relies on its resources.
        """
        identity = self._identity
        surveys = yield Read(identity.everywhere("survey"), self._interval)
        (listed,) = yield Read((identity.in_namespace("processes"),), self._interval)
        if isinstance(listed, Exception):
            return
        lanes: set[bytes] = set()
        for survey in surveys:
            if not isinstance(survey, Exception):
                lanes.update(survey)
        now = identity.clock()
        lost = lanes.difference(listed) - {identity.id}
        self._orphans = {process: self._orphans.get(process, now) for process in lost}
        patience = identity.lease + self._interval
        self._takeover.add(p for p, since in self._orphans.items() if now - since > patience)
