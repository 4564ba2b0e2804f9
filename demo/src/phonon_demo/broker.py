"""Deals messages out to workers, as a message broker does."""

from phonon_demo.jobs import Message
from phonon_demo.pool import Pool

#: Messages that a worker is sent, stores and acknowledges together.
LIST = 500


class Broker:
    """Gives each worker one message in turn, so that every worker meets every key.

    The share of a worker that has ended goes to the others. So does what it has not acknowledged:
    whether that had been stored, nobody knows, so it may count twice. Such is "at least once".

    Args:
        pool: The workers.

    Attributes:
        count: Messages dealt.
        redealt: Messages that a worker has ended without acknowledging.
    """

    def __init__(self, pool: Pool) -> None:
        self.count = 0
        self.redealt = 0
        self._pool = pool
        self._workers = pool.alive
        self._lists: list[list[Message]] = [[] for _ in self._workers]
        self._turn = 0

    def deal(self, message: Message) -> None:
        """Deal one message, sooner or later."""
        turn = self.count % len(self._lists)
        self.count += 1
        self._lists[turn].append(message)
        if len(self._lists[turn]) == LIST:
            self._hand_out(turn)

    def deal_rest(self) -> None:
        """Deal what is left, now."""
        for turn, messages in enumerate(self._lists):
            if messages:
                self._hand_out(turn)

    def wait(self) -> None:
        """Wait until all is acknowledged."""
        self._redeal()
        while any(worker.unacknowledged for worker in self._pool.alive):
            self._pool.listen()
            self._redeal()

    def _hand_out(self, turn: int) -> None:
        messages, self._lists[turn] = self._lists[turn], []
        worker = self._workers[turn]
        if worker.fate:
            self._hand_over(messages)
        else:
            self._pool.send(worker, messages)
        self._redeal()

    def _redeal(self) -> None:
        while self._pool.orphans:
            messages = self._pool.orphans.popleft()
            self.redealt += len(messages)
            self._hand_over(messages)

    def _hand_over(self, messages: list[Message]) -> None:
        alive = self._pool.alive
        self._turn += 1
        self._pool.send(alive[self._turn % len(alive)], messages)
