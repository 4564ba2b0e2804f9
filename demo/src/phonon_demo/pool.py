"""The worker processes of a run, and the stream that they read."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from phonon.admin import Admin
from phonon.cli.errors import CommandError
from phonon_demo.models import Message

#: Seconds within which all messages are stored, and workers leave.
TIMEOUT = 120.0
SPAWN = multiprocessing.get_context("spawn")


class WorkerError(CommandError):
    """A worker has ended before its time; the message names it and the reason."""


class Worker:
    """A worker process.

    Args:
        work: The function that it runs, of a module. It returns the number of sessions written.
        plan: The argument of the function.
    """

    def __init__(self, work: Callable[[Any], int], plan: Any) -> None:
        self._written: Any = SPAWN.Value("Q", lock=False)
        # A daemon is not waited for if the program ends before it is in a pool.
        self._process = SPAWN.Process(target=_run, args=(work, plan, self._written), daemon=True)
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def is_alive(self) -> bool:
        """Return whether the worker has not ended.

        Raises:
            WorkerError: It has failed: it has ended, and not by a signal.
        """
        if (status := self._process.exitcode or 0) > 0:
            raise WorkerError(f"worker (pid {self.pid}) ended with exit status {status}")
        return self._process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the worker with SIGKILL, and wait until it has ended."""
        self._process.kill()
        self._process.join()

    def written(self) -> int:
        """Wait until the worker has left. Return how many sessions it has written."""
        self._process.join(TIMEOUT)
        if self.is_alive:
            raise WorkerError(f"worker (pid {self.pid}) does not leave")
        return int(self._written.value)


def _run(work: Callable[[Any], int], plan: Any, written: Any) -> None:
    """Run in a worker process."""
    os.setpgid(0, 0)  # Ctrl-C is for the program, which then ends its workers

    def leave_with_the_program() -> None:
        multiprocessing.connection.wait([program.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    program: Any = multiprocessing.parent_process()
    threading.Thread(target=leave_with_the_program, daemon=True).start()
    written.value = work(plan)


class Pool:
    """The workers of a run; a context manager that ends all of them.

    Args:
        workers: The workers, which have been started.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()

    @property
    def alive(self) -> list[Worker]:
        """The workers that have not ended.

        Raises:
            WorkerError: There are none, or one has failed.
        """
        alive = [worker for worker in self.workers if worker.is_alive]
        if not alive:
            raise WorkerError("all workers have died before their work was done")
        return alive

    def leave(self) -> int:
        """Let all workers end their sessions and leave. Return how many they have written."""
        alive = self.alive
        for worker in alive:
            worker.signal(signal.SIGTERM)
        return sum([worker.written() for worker in alive])

    def wait(self, admin: Admin, is_stored: Callable[[], bool] = lambda: True) -> None:
        """Wait until messages are stored, and survivors have taken over from the dead workers."""
        give_up = time.monotonic() + TIMEOUT
        while True:
            with contextlib.suppress(ConnectionError):
                alive = sorted(worker.pid for worker in self.alive)
                # A process that has died is listed until all that it had is taken over.
                listed = sorted(process.pid for process in admin.processes())
                stored = is_stored()
                if stored and listed == alive:
                    return
                if time.monotonic() > give_up:
                    raise WorkerError(
                        f"after {TIMEOUT:g} s the messages are {'' if stored else 'not '}stored, "
                        f"and the processes {listed} are listed, of which {alive} live"
                    )
            time.sleep(0.05)


class Stream:
    """A stream of the server, whose entries the workers share.

    Args:
        client: A client of the server.
        name: The key of the stream.
    """

    def __init__(self, client: Any, name: str) -> None:
        self.name = name
        self._client = client
        self._count = 0

    def produce(self, messages: Sequence[Message]) -> None:
        """Add messages."""
        pipeline = self._client.pipeline(transaction=False)
        for message in messages:
            pipeline.xadd(self.name, {"key": message.key, "value": json.dumps(message.content)})
        pipeline.execute()
        self._count += len(messages)

    def is_stored(self) -> bool:
        """Return whether all messages were acknowledged."""
        groups = self._client.xinfo_groups(self.name) if self._count else ()
        return all(group["pending"] == group["lag"] == 0 for group in groups)
