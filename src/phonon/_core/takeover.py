"""Takes over from dead processes, and from this process's former identities."""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from phonon._core.flows import FLUSH, REBORN, Flow, Send, Sleep, read
from phonon._core.identity import Identity
from phonon._core.outbox import Outbox
from phonon._protocol import operations
from phonon._protocol.answers import Reaped
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import decode
from phonon.errors import PhononError

log = logging.getLogger("phonon")

#: Resources that one operation reaps at the most.
MOST = 128
#: The first number of batches to take; it grows while they are executed quickly.
FIRST = 2
QUICK = 0.05
#: Survivors that share one dead process's batches, at the most. See SHARERS in processes.lua.
SHARERS = 16
#: The most batches that may wait for execution when more are taken, and seconds between two checks.
FEW = 16
PAUSE = 0.01
#: Memberships renewed in one exchange.
MOST_JOINS = 4096

#: The line in the log about a takeover; `chaos.worker` reads its arguments.
TAKEN_OVER = (
    "process %s has taken over %d resources of process %s, which was declared dead, and %d batches"
)


_GONE: Any = object()


@dataclass
class _TakeoverProgress:
    """The progress of a takeover."""

    resources: int = 0
    batches: int = 0


class Takeover:
    """Works through the registries of dead processes.

    Every process takes over memberships and locks. Only processes that execute batches take over
    batches; but a process always takes over from its own former identities.

    Args:
        identity: The identity of this process.
        outbox: Executes the batches.
        recovers: Whether this process executes the batches of others.
        can_execute: Tells whether this process knows a class.

    Attributes:
        former: Own former identities, each with the partitions where it is not reaped yet. Until
            the reap the lanes there hold operations back whose answers would count the former self.
        living: The number of living processes, this one included, as of the last beat.
        has_more: Whether the last beat has named as many dead processes as one beat can.
        ask_for_more: Sends a beat, whose answer names further dead processes.
    """

    def __init__(
        self,
        identity: Identity,
        outbox: Outbox,
        *,
        recovers: bool,
        can_execute: Callable[[str], bool],
    ) -> None:
        self._identity = identity
        self._outbox = outbox
        self._recovers = recovers
        self._can_execute = can_execute
        self.start_worker: Callable[[], None] = lambda: None
        self.ask_for_more: Callable[[], None] = lambda: None
        self.on_taken: Callable[[str, str], object] = lambda *_: None
        self.begin()

    def begin(self) -> None:
        """Start without work: at first, and in a forked child."""
        self.former: dict[bytes, set[int]] = {}
        self._dead: dict[bytes, None] = {}
        # By resource. They stay until their answers are seen: a worker may give up waiting.
        self._joins: dict[bytes, Operation] = {}
        # The partitions where released processes still have batches.
        self._released: dict[bytes, list[int]] = {}
        self.has_more = False
        self.living = 1
        self.leaving = False
        self.is_working = False

    def add(self, dead: Iterable[bytes]) -> None:
        """Take over from dead processes, and class queues, in the background."""
        for process in dead:
            if process == self._identity.id or (self.leaving and process not in self.former):
                continue
            class_name = operations.class_of_queue(process)
            if class_name is None or (self._recovers and self._can_execute(class_name)):
                self._dead.setdefault(process)
        self.go_on()

    def go_on(self) -> None:
        """Go on with what an error has ended, in the background."""
        if self._dead:
            self._start()

    def add_former(self, former: Iterable[bytes], joins: Sequence[Operation]) -> None:
        """Take over from own former identities, before their operations are repeated.

        Args:
            former: The identities.
            joins: Make this process a member of its resources before its former self is reaped.
        """
        self._joins = {join.resource: join for join in joins}
        partitions = range(self._identity.partitions.count)
        for process in former:
            self.former[process] = set(partitions)
            self._dead.pop(process, None)
        self._dead = dict.fromkeys([*self.former, *self._dead])
        self._start()

    def _start(self) -> None:
        """Start the worker, unless it will look again."""
        if not self.is_working:
            # Set before it runs: an event loop starts it later, and one beat may call this often.
            self.is_working = True
            self.start_worker()

    def work(self) -> Flow[None]:
        """Take over from all known dead processes."""
        self.is_working = True
        try:
            while self._has_more():
                process = self._next()
                if process is None:
                    continue
                try:
                    yield from self.take_over(process)
                except PhononError as error:
                    log.warning("process %s takes over later: %s", self._identity.name, error)
                    if process in self.former:
                        self._dead.setdefault(process)
                    return
            if self.has_more:
                self.has_more = False
                self.ask_for_more()
        finally:
            self.is_working = False

    def _next(self) -> bytes | None:
        """Remove and return a dead process; None if another thread was faster."""
        for process in list(self._dead):
            if self._dead.pop(process, _GONE) is not _GONE:
                return process
        return None

    def _has_more(self) -> bool:
        """Return whether there is more work. If not, the next dead process starts a worker."""
        if not self._dead:
            self.is_working = False
        self.is_working = bool(self._dead)
        return self.is_working

    def take_over(self, dead: bytes) -> Flow[None]:
        """Take over everything that a dead process has left.

        If this process dies meanwhile, the next survivor takes over the rest.

        Raises:
            PhononError: The server does not answer.
        """
        if dead == self._identity.id:
            return  # a late duplicate registered the id again: the next beat names it
        while self._joins:
            yield from self._join(list(self._joins.values())[:MOST_JOINS])
        own_id = self._identity.id
        recovers = self._recovers or dead in self._identity.former
        taken = _TakeoverProgress()
        try:
            left = yield from self._reap(dead, recovers, taken)
        finally:
            if own_id == self._identity.id:
                self._released.pop(dead, None)
            else:
                self._released.clear()  # a rebirth ends each release, wherever it is
            foreign = dead not in self._identity.former
            if taken.resources and foreign and operations.class_of_queue(dead) is None:
                name, whose = self._identity.name, decode(dead)
                words = (name, taken.resources, whose, taken.batches)
                log.warning(TAKEN_OVER, *words, extra={"process_id": name, "dead_id": whose})
                self._identity.measures.add("reaped", taken.resources)
                self._identity.measures.add("reaped_batches", taken.batches)
                self.on_taken(TAKEN_OVER % words, whose)
        if own_id != self._identity.id:
            # This process was reborn meanwhile, perhaps because the server lost the reap: a former
            # self is reaped again, and the next beat names any other process that is still dead.
            return
        self.former.pop(dead, None)
        if not left and operations.class_of_queue(dead) is None:
            yield from read(self._identity.in_namespace("unlist", dead))

    def _join(self, joins: Sequence[Operation]) -> Flow[None]:
        """Renew memberships. Without them a reap would end sessions of which this process is one.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        own_id = self._identity.id
        answers = yield Send(renewed(joins), first=True)
        if own_id == self._identity.id:
            for operation, answer in zip(joins, answers, strict=True):
                if isinstance(answer, Exception):
                    raise answer
                self._joins.pop(operation.resource, None)

    def _reap(self, dead: bytes, recovers: bool, taken: _TakeoverProgress) -> Flow[list[int]]:
        """Reap a dead process in all partitions.

        Memberships and locks are reaped at once. Batches are reaped as they are executed, because
        survivors share them, and none should take more than it can execute soon.

        Returns:
            The partitions in which batches are left to survivors that execute batches.
        """
        # An earlier attempt may have reaped a former self in part, and `stop` closed those lanes.
        partitions = list(self.former.get(dead, range(self._identity.partitions.count)))
        if not recovers:
            return (yield from self._reap_in(partitions, dead, taken, recovers=False))
        if dead not in self.former and operations.class_of_queue(dead) is None:
            partitions = yield from self._release(dead, taken)
        return (yield from self._reap_in(partitions, dead, taken, recovers=True))

    def _release(self, dead: bytes, taken: _TakeoverProgress) -> Flow[list[int]]:
        """Release all that a dead process held, except for its batches.

        Returns:
            The partitions with batches; the dead process is fenced, so there will be no others.
        """
        left = self._released.get(dead)
        if left is None:
            everywhere = range(self._identity.partitions.count)
            left = yield from self._reap_in(everywhere, dead, taken, recovers=False)
            self._released[dead] = left
        return left

    def _wait_for_capacity(self, own_id: bytes) -> Flow[float]:
        """Wait until the batches taken over are nearly executed. Return the seconds that this took.

        Meanwhile other dead processes are released, so that their locks do not wait for the user's
        code.
        """
        clock = self._identity.clock
        begun = clock()
        while self._outbox.taken_over > FEW and not self.leaving and own_id == self._identity.id:
            fresh = self._dead.keys() - self._released - self.former.keys() - {own_id}
            others = [dead for dead in fresh if operations.class_of_queue(dead) is None]
            if others:
                yield from self._release(others[0], _TakeoverProgress())
            else:
                yield Sleep(PAUSE)
        return clock() - begun

    def _reap_in(
        self, partitions: Iterable[int], dead: bytes, taken: _TakeoverProgress, *, recovers: bool
    ) -> Flow[list[int]]:
        todo = list(partitions)
        random.shuffle(todo)  # survivors should begin in different partitions
        left: list[int] = []
        own_id = self._identity.id
        paced = recovers and dead not in self.former
        most = min(FIRST, MOST) if paced else MOST
        while todo and own_id == self._identity.id:
            before, remaining = taken.batches, 0
            reaps = [operations.reap(p, dead, most, recovers=recovers) for p in todo]
            answers = yield Send(reaps, first=True)
            again = []
            refused: list[Exception] = []
            for partition, answer in zip(todo, answers, strict=True):
                if isinstance(answer, Exception):
                    refused.append(answer)
                    continue
                if answer is REBORN:
                    again.append(partition)
                    continue
                reaped = Reaped(*answer)
                taken.resources += reaped.resources
                taken.batches += self._take(partition, reaped)
                if reaped.left > 0:
                    again.append(partition)
                    remaining = max(remaining, reaped.left)
                else:
                    left += [partition] * (reaped.left_in_all > 0)
                    if own_id == self._identity.id and self._reaped(dead, partition):
                        yield FLUSH
            if refused:
                raise refused[0]
            todo = again
            if paced and todo:
                quick = (
                    taken.batches == before or (yield from self._wait_for_capacity(own_id)) < QUICK
                )
                most = min(most * 2, MOST, self._share(remaining)) if quick else max(most // 2, 1)
        return left

    def _share(self, remaining: int) -> int:
        """Return how many of a partition's remaining batches to take at once, at the most.

        Half of a fair share, as in guided self-scheduling: slow batches may follow quick ones, and
        a batch that one survivor has taken cannot be executed by another.
        """
        if self.living <= 1:
            return MOST
        return max(FIRST, -(-remaining // (2 * min(self.living, SHARERS))))

    def _take(self, partition: int, reaped: Reaped) -> int:
        found = reaped.batches
        for name, token, later_ms in zip(found[::3], found[1::3], found[2::3], strict=True):
            self._outbox.take_over(partition, name, token, later_ms / 1000)
        for name, error in zip(reaped.wrong[::2], reaped.wrong[1::2], strict=True):
            text = error.decode("utf-8", "replace")
            log.error("%r could not be taken over from a dead process: %s", decode(name), text)
        return len(found) // 3

    def _reaped(self, dead: bytes, partition: int) -> bool:
        """Note that a former self is reaped in a partition.

        Returns:
            Whether operations that waited for the reap may be sent there now.
        """
        left = self.former.get(dead)
        if left is None:
            return False
        left.discard(partition)
        if any(partition in others for others in self.former.values()):
            return False
        self._identity.lanes[partition].release()
        return True


def renewed(joins: Iterable[Operation]) -> list[Operation]:
    """Return operations that renew memberships.

    The former self is reaped after them, so they must not wait for the reap.
    """
    fresh = [operations.join(operation.partition, operation.resource) for operation in joins]
    for operation in fresh:
        operation.ahead = True
    return fresh
