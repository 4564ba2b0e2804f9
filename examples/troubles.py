"""Causes the problems of the runbook in docs/operations.md, for a drill.

::

    python examples/troubles.py stuck-lock --url redis://localhost:6379/1 --namespace drill
    phonon doctor --namespace drill

It prints "ready" when the problem exists, and ends it when it gets a line on its standard input, or
Ctrl-C.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from typing import Any

from phonon import ConflictFreeUpdate, Process, RetryPolicy

#: Retries soon, so that a drill is short.
SOON = RetryPolicy(attempts=1_000_000, first_delay=0.2, longest_delay=0.5)
ONCE = RetryPolicy(attempts=1)
#: More sessions than `phonon doctor` considers normal.
MANY = 1200
#: Seconds between the heartbeats of a drill's processes.
BEAT = 0.5


class Database:
    """The database that `execute` writes to, which may be down."""

    is_there = True


class Total(ConflictFreeUpdate, name="trouble-total"):
    """Adds up numbers, and writes them to a database that may be down."""

    def execute(self) -> None:
        """Write, or fail."""
        if not Database.is_there:
            raise ConnectionError("the database does not answer")
        if self.doc.get("amount") == "poison":
            raise ValueError(f"amount is no number in {self.doc!r}")


def ready() -> None:
    """Report that the problem exists."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def killed_process(process: Process) -> None:
    """Die with open sessions and a lock, as if killed for lack of memory."""
    for i in range(5):
        Total(process, f"order-{i}", doc={"amount": i})
    process.lock("orders").acquire()
    ready()
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)


def stuck_lock(process: Process) -> None:
    """Hold a lock for ever, while another process waits for it."""
    with Process(**settings(process)) as waiter:
        process.lock("reports").acquire()

        def wait() -> None:
            with waiter.lock("reports"):
                sys.stdout.write("the waiter has got the lock\n")
                sys.stdout.flush()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        ready()
        sys.stdin.readline()


def poison(process: Process) -> None:
    """Store something that no attempt can execute."""
    with contextlib.suppress(ValueError):
        Total(process, "order-1", doc={"amount": "poison"}).end_session()
    ready()
    sys.stdin.readline()


def unknown_class(process: Process) -> None:
    """Die with a batch of a class that no other process has imported."""

    class Forgotten(ConflictFreeUpdate, name="trouble-forgotten"):
        def execute(self) -> None:
            pass

    Forgotten(process, "order-1", doc={"amount": 1})
    ready()
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)


def full_backlog(process: Process) -> None:
    """Have an unusual number of batches that fail."""
    Database.is_there = False
    try:
        with process.batch():
            for i in range(MANY):
                Total(process, f"order-{i}", doc={"amount": i}).end_session()
    except* ConnectionError:
        pass
    ready()
    sys.stdin.readline()
    Database.is_there = True
    process.flush()
    sys.stdin.readline()


def eviction(process: Process) -> None:
    """Let the server delete any key when its memory is full."""
    process.client.config_set("maxmemory-policy", "allkeys-lru")
    ready()
    sys.stdin.readline()


TROUBLES: dict[str, tuple[Any, RetryPolicy]] = {
    "killed-process": (killed_process, SOON),
    "stuck-lock": (stuck_lock, SOON),
    "poison": (poison, ONCE),
    "unknown-class": (unknown_class, SOON),
    "full-backlog": (full_backlog, SOON),
    "eviction": (eviction, SOON),
}


def settings(process: Process) -> dict[str, Any]:
    """Return the arguments for another process of the same drill."""
    return {
        "client": process.client,
        "namespace": process.namespace,
        "heartbeat_interval": process.heartbeat_interval,
    }


def main() -> None:
    """Cause a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trouble", choices=TROUBLES)
    parser.add_argument("--url")
    parser.add_argument("--namespace", default="drill")
    options = parser.parse_args()
    make, retry = TROUBLES[options.trouble]
    with Process(
        url=options.url, namespace=options.namespace, heartbeat_interval=BEAT, retry=retry
    ) as process:
        make(process)


if __name__ == "__main__":
    main()
