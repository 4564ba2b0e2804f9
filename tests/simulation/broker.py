"""A broker with a topic and a queue, which deliver again as they like, and what must be true of them."""

from typing import TYPE_CHECKING, Any

from phonon._protocol.answers import Reply
from phonon._protocol.operations import Code, Operation

if TYPE_CHECKING:
    from simulation.world import World

#: The topic has offsets, the queue has ids.
TOPIC, QUEUE = "s", "q"
#: How long ids are remembered, seconds: longer than a schedule, and half of it ends as it begins.
WINDOW = 20_000.0


class Broker:
    """The messages of one world, and how far they have come.

    Attributes:
        produced: How many messages of the topic were ever delivered.
        queued: How many of the queue.
        acknowledged: The numbers of those of the queue that a consumer has acknowledged.
        epochs: By partition, the latest claim of the topic.
        begun: Partitions in which the topic stands somewhere.
        unbegun: Partitions in which a loss has left the topic nowhere. It may stand somewhere in
            others by what was still under way. Then it begins there where those stand, and what
            came before is lost with the data.
    """

    def __init__(self, world: "World") -> None:
        self._world = world
        self.produced = self.queued = 0
        self.acknowledged: set[int] = set()
        self.epochs: dict[int, int] = {}
        self.begun: set[int] = set()
        self.unbegun: set[int] = set()

    def brings(self, kind: str, number: int) -> list[tuple[str, bytes]]:
        """Return what a message brings: resources and items, each time the same."""
        resources = self._world.resources
        some = sorted({resources[number % 3], resources[number // 3 % 3]})
        return [(resource, f"{resource}-{kind}{number}".encode()) for resource in some]

    def all_items(self) -> set[bytes]:
        """Return what all messages have brought that were delivered, and are not lost."""
        return {
            item
            for kind, count in ((TOPIC, self.produced), (QUEUE, self.queued))
            for number in range(count)
            for resource, item in self.brings(kind, number)
            if kind == QUEUE or self._world.place(resource) not in self.unbegun
        }

    def data_lost(self, keys: list[tuple[bytes, Any, int]]) -> None:
        """The server has lost data, and has these keys now."""
        found = {key: value for key, value, _ in keys}
        sources = [prefix + b"source:s" for prefix in self._world.partitions.prefixes]
        begun = {p for p, key in enumerate(sources) if b"position" in found.get(key, ())[::2]}
        self.unbegun |= self.begun - begun
        self.begun = begun

    def carried_out(self, operation: Operation, answer: Any) -> list[tuple[str, bytes]]:
        """The server has carried out an operation of a source. Return what it has stored."""
        partition, words = operation.partition, operation.words
        kind = answer[0] if isinstance(answer, list) else answer
        if operation.code is Code.CLAIM and kind == Reply.CLAIMED:
            if answer[1] < self.epochs.get(partition, 0) and not self._world.checks.losses:
                self._fail(f"{operation!r} is older than claim {self.epochs[partition]}")
            self.epochs[partition] = answer[1]
        if kind != Reply.INGESTED:
            return []
        brought = words[-1]
        stored = [(brought[n].decode(), brought[n + 1]) for n in range(0, len(brought), 2)]
        if operation.code is Code.INGEST:
            self.begun.add(partition)
            epoch, begins, ends = words[2], int(words[3] or words[4]), int(words[4])
            if epoch != self.epochs[partition] and not self._world.checks.losses:
                self._fail(f"{operation!r} stores after claim {self.epochs[partition]}")
            wanted = self._here(partition, TOPIC, range(begins, ends))
            if not words[3] and ends and not self._world.checks.losses:
                self._fail(f"{operation!r} begins behind the first message")
        else:
            numbers = [int(each[len(QUEUE) :]) for each in words[3]]
            wanted = self._here(partition, QUEUE, numbers)
        items = sorted(item for _, some in stored for item in some.split(b","))
        if items != wanted:
            self._fail(f"{operation!r} stores {items} of {wanted}")
        return stored

    def _here(self, partition: int, kind: str, numbers: Any) -> list[bytes]:
        """Return what some messages bring to a partition."""
        place = self._world.place
        return sorted(
            item for n in numbers for r, item in self.brings(kind, n) if place(r) == partition
        )

    def _fail(self, text: str) -> None:
        self._world.checks.fail(f"Sources: {text}")
