"""Settings that several parts share."""

from typing import Any, NamedTuple


class Durability(NamedTuple):
    """The safety that stored data must have before the call that stores it returns.

    Until then the call counts as unanswered: it is repeated, and in the end it raises
    `ConnectionLostError`.

    Attributes:
        fsync: Whether the data has to be on the server's disk: its append-only file is on, and
            has been synchronized (``WAITAOF``: Redis 7.2, Valkey 7.2).
        replicas: How many replicas must have it as well, on their disks if ``fsync`` is set.
        timeout: Seconds to wait for that before the call is repeated.

    Example:
        >>> Durability(replicas=1).replicas  # for Process(durability=...)
        1
    """

    fsync: bool = True
    replicas: int = 0
    timeout: float = 1.0

    @property
    def command(self) -> tuple[bytes, ...]:
        """The command that waits until the data is safe."""
        ms = b"%d" % max(1, int(self.timeout * 1000))
        if self.fsync:
            return (b"WAITAOF", b"1", b"%d" % self.replicas, ms)
        return (b"WAIT", b"%d" % self.replicas, ms)

    def is_reached(self, reply: Any) -> bool:
        """Return whether the answer to `command` confirms it."""
        if self.fsync:
            return bool(reply[0] >= 1 and reply[1] >= self.replicas)
        return bool(reply >= self.replicas)
