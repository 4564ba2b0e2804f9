"""Acts of an operator. Each act is one step on the server, which also logs it there."""

from typing import Any

from phonon._admin.content import class_name_of
from phonon._admin.inspector import PIECE, Inspector, missing
from phonon._admin.namespace import Namespace
from phonon._core.executor import TOKENS
from phonon._core.shown import counted
from phonon._protocol.library import of_operators
from phonon._protocol.operations import class_queue
from phonon._protocol.partitions import decode, encode_resource, encode_semaphore
from phonon._transport.steps import Steps
from phonon.errors import (
    BatchRunningError,
    LockLostError,
    ProcessMissingError,
    ServerError,
    UndecodableError,
    UnknownClassError,
)


class Acts:
    """Replays, discards, breaks locks and expires processes.

    Args:
        namespace: The namespace.
        inspector: Reads the namespace.
        who: The operator's name, for the log.
    """

    def __init__(self, namespace: Namespace, inspector: Inspector, who: str) -> None:
        self._namespace = namespace
        self._inspector = inspector
        self._who = who.encode("utf-8", "backslashreplace")

    def replay(self, resource: str, token: int) -> Steps[str]:
        """Hand a parked batch to a process that can execute it.

        Returns:
            The act in words.

        Raises:
            BatchMissingError: There is no such batch.
            BatchRunningError: Another batch of the resource is being executed.
            UndecodableError: The batch cannot be read, so no process could execute it.
            UnknownClassError: No live process can execute its classes. Nothing has changed.
        """
        space = self._namespace
        stored = _stored(resource, token)
        processes = yield from self._inspector.processes()
        encoded = encode_resource(resource)
        partition = space.partitions.of(encoded)
        names = yield from self._classes(partition, encoded, resource, token)
        able = [
            process
            for process in processes
            if process.state == "alive" and process.executes and names <= set(process.classes)
        ]
        if not able:
            missed = ", ".join(sorted(names))
            raise UnknownClassError(
                f"no live process can execute batch {token} of {resource!r}: it needs one that "
                f"has imported {missed} and recovers failed processes; start one, wait for its "
                "first heartbeat, and replay again. The batch is where it was",
                missed,
            )
        queue = class_queue(min(names))
        words = encoded, b"%d" % stored, queue, self._who
        answer = yield from self._do(partition, "admin_replay", *words)
        if answer[0] == b"missing":
            raise missing(resource, token)
        if answer[0] == b"running":
            raise BatchRunningError(
                f"another batch of {resource!r} is being executed: replay {token} when it is done"
            )
        patience = max(process.heartbeat_interval for process in able)
        return (
            f"batch {token} of {resource!r} goes on as {int(answer[1]) * TOKENS}: a process that "
            f"knows {min(names)} takes it within {patience:g} s"
        )

    def _classes(
        self, partition: int, encoded: bytes, resource: str, token: int
    ) -> Steps[set[str]]:
        """Return the names of the classes of a dead letter's partials."""
        space, names, first = self._namespace, set(), 0
        while True:
            words = b"dead:%d" % (token // TOKENS), encoded, b"%d" % first
            last = b"%d" % (first + PIECE - 1)
            (found,) = yield from space.ask([space.read(partition, "admin_content", *words, last)])
            if not found:
                break
            for partial in found:
                name = class_name_of(partial)
                if name is None:
                    raise UndecodableError(
                        f"a partial of batch {token} of {resource!r} cannot be read, so no "
                        "process could execute it; phonon show tells why, phonon discard deletes it"
                    )
                names.add(name)
            first += len(found)
        if not names:
            raise missing(resource, token)
        return names

    def discard(self, resource: str, token: int) -> Steps[str]:
        """Delete a parked batch, with its data.

        Raises:
            BatchMissingError: There is no such batch.
        """
        stored = _stored(resource, token)
        yield from self._namespace.roster()
        encoded = encode_resource(resource)
        partition = self._namespace.partitions.of(encoded)
        words = encoded, b"%d" % stored, self._who
        answer = yield from self._do(partition, "admin_discard", *words)
        if answer[0] == b"missing":
            raise missing(resource, token)
        return f"batch {token} of {resource!r} is deleted, with its {counted(answer[1], 'partial')}"

    def break_lock(self, name: str, token: int, *, semaphore: bool) -> Steps[str]:
        """Release a lock in place of its holder, if it has a given token, and wake the next.

        Raises:
            LockLostError: The lock is not held under that token any more.
        """
        yield from self._namespace.roster()
        encoded = encode_semaphore(name) if semaphore else encode_resource(name)
        partition = self._namespace.partitions.of(encoded)
        words = encoded, b"%d" % (token // TOKENS), self._who
        answer = yield from self._do(partition, "admin_unlock", *words)
        if answer[0] == b"missing":
            raise LockLostError(
                f"{name!r} is not held under token {token}: it was released, or acquired again, "
                "since the token was read; phonon locks shows its holder"
            )
        process = decode(answer[1]).rpartition("/")[0]
        return (
            f"the lock on {name!r} of process {process} is released; that process finds out when "
            "it checks or releases it, and a store that compares tokens refuses its writes from "
            "the next holder's on"
        )

    def expire(self, process: str) -> Steps[str]:
        """Mark a process as dead, so that survivors take over from it.

        Raises:
            ProcessMissingError: There is no such process.
        """
        yield from self._namespace.roster()
        words = encode_resource(process), self._who
        answer = yield from self._do(None, "admin_expire", *words)
        if answer == b"missing":
            raise ProcessMissingError(
                f"there is no process {process!r}; phonon ps lists those that there are"
            )
        if answer == b"dead":
            return f"process {process} was declared dead before; survivors are at work on it"
        return (
            f"process {process} is declared dead: survivors take over with their next heartbeat; "
            "if it is alive after all, it goes on under another id, without its locks"
        )

    def _do(self, partition: int | None, function: str, *words: bytes) -> Steps[Any]:
        """Carry an act out, unless one of its commands is forbidden: Redis does not roll back."""
        space = self._namespace
        also = [command.encode() for command in sorted(of_operators())]
        (forbidden,) = yield from space.ask([space.read(partition, "rights", *also)])
        if forbidden:
            grants = " ".join(f"+{decode(command).lower()}" for command in forbidden)
            raise ServerError(
                "this user may not run all that an act of an operator needs, and nothing was done: "
                f"grant with ACL SETUSER <user> {grants}, or use a worker's user"
            )
        (answer,) = yield from space.ask([space.write(partition, function, *words)])
        return answer


def _stored(resource: str, token: int) -> int:
    """Return the server's form of a batch's token."""
    stored, index = divmod(token, TOKENS)
    if index or stored <= 0:
        raise missing(resource, token)
    return stored
