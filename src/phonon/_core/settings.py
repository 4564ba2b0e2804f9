"""Settings that several parts share."""

from typing import Any, NamedTuple, Self

from phonon._core.checks import check_flag, check_seconds, check_whole
from phonon.errors import ConfigurationError


class _Values(NamedTuple):
    fsync: bool
    replicas: int
    timeout: float


class Durability(_Values):
    """The safety that stored data must have before the call that stores it returns.

    Until then the call counts as unanswered: it is repeated, and after a time it raises
    `ConnectionLostError`.

    Attributes:
        fsync: Whether the data has to be on the server's disk: its append-only file is on, and
            has been synchronized (``WAITAOF``: Redis 7.2, Valkey 7.2).
        replicas: The number of replicas that must have the data too, on their disks if ``fsync``.
        timeout: Seconds to wait for that before the call is repeated.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> Durability(replicas=1).replicas  # for Process(durability=...)
        1
    """

    __slots__ = ()

    def __new__(cls, fsync: bool = True, replicas: int = 0, timeout: float = 1.0) -> Self:
        if check_whole("replicas", replicas) < 0:
            raise ConfigurationError(
                f"replicas is at least 0, not {replicas!r}: see phonon.Durability"
            )
        check_seconds("timeout", timeout)
        return super().__new__(cls, check_flag("fsync", fsync), replicas, timeout)

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
