"""The worker processes of a run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Self

from phonon import Process
from phonon_demo.brokers import Broker
from phonon_demo.errors import WorkerError
from phonon_demo.plan import Plan

#: Seconds within which all messages are stored, and workers leave.
TIMEOUT = 120.0


class Worker:
    """A worker process.

    Args:
        plan: The worker's settings.
        module: The module that it runs.
    """

    def __init__(self, plan: Plan, module: str = "phonon_demo.worker") -> None:
        self.popen = subprocess.Popen(  # noqa: S603 - all words are the program's own
            # -P: a file in the user's folder must not take the place of a module.
            [sys.executable, "-P", "-m", module, json.dumps(asdict(plan))],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the program, which then ends its workers.
            process_group=0,
        )

    @cached_property
    def process(self) -> str:
        """The id of its `phonon.Process`; empty if it ended before it had connected."""
        assert self.popen.stdout is not None  # noqa: S101 - for the type checker
        return self.popen.stdout.readline().strip()

    @property
    def is_alive(self) -> bool:
        """Return whether the worker has not ended."""
        return self.popen.poll() is None

    @property
    def fate(self) -> str:
        """The end of the worker."""
        status = self.popen.wait()
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with exit status {status}"

    def kill(self) -> None:
        """Kill the worker with SIGKILL, and close its pipe. A second call does nothing."""
        self.popen.kill()
        self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()

    def leave(self) -> int:
        """Wait until the worker has ended its sessions and left. Return how many it has written.

        Raises:
            WorkerError: The worker does not leave, or fails.
        """
        try:
            said, _ = self.popen.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise WorkerError(f"worker (pid {self.popen.pid}) does not leave") from None
        if self.popen.returncode == -signal.SIGTERM:  # before it began to read
            return 0
        if self.popen.returncode:
            raise WorkerError(f"worker (pid {self.popen.pid}) {self.fate}")
        return int(json.loads(said.splitlines()[-1])["sessions"])


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
        for worker in self.workers:
            if worker not in alive and worker.popen.returncode > 0:
                raise WorkerError(f"worker (pid {worker.popen.pid}) {worker.fate}")
        if not alive:
            raise WorkerError("all workers have died before their work was done")
        return alive

    def leave(self) -> int:
        """Let all workers end their sessions and leave. Return the number of written sessions."""
        alive = self.alive
        for worker in alive:
            worker.popen.send_signal(signal.SIGTERM)
        return sum([worker.leave() for worker in alive])


def wait_until_stored(broker: Broker, process: Process, pool: Pool, count: int) -> None:
    """Wait until all messages are stored, and survivors have taken over from the dead worker.

    Raises:
        WorkerError: It takes too long, or no worker is left.
    """
    give_up = time.monotonic() + TIMEOUT
    while True:
        alive = pool.alive
        # A worker that replaces a dead one is listed before it says its id. Until then the dead one
        # may be counted in its place.
        have_begun = all(worker.process for worker in alive)
        living = len(alive) + 1  # and this program's own process
        with contextlib.suppress(ConnectionError):
            stored = broker.stored(process)
            listed = int(process.client.zcard(process.heartbeat_hash_name))
            if have_begun and stored >= count and listed == living:
                return
            if time.monotonic() > give_up:
                raise WorkerError(
                    f"{stored:,} of {count:,} messages were stored after {TIMEOUT:g} s, and "
                    f"{listed} processes are listed, of which {living} live"
                )
        time.sleep(0.05)
