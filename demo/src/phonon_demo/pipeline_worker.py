"""A worker of the pipeline, an OS process of its own. This is what a user's program looks like."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
import sqlalchemy as sa

from phonon import Model, Process, RetryPolicy
from phonon.errors import ServerUnreachableError
from phonon.fields import ID, Counter, Max, Sum
from phonon.sinks import SqlTable
from phonon_demo.pipeline import (
    GROUP,
    HEARTBEAT,
    TABLE,
    Plan,
    handled_file,
    keeping_what_fails,
)

#: Keys in a worker's collection: fewer than there are, so that sessions end all the time.
MAX_ENTRIES = 100
#: Messages that are stored together.
BATCH = 200


class PageViews(Model, name="pipeline_views"):
    """What is known about one user."""

    user: ID[str]
    views: Sum[int] = Sum()
    seconds: Sum[int] = Sum()
    longest: Max[int] = Max()
    pages: Counter[str] = Counter()


class LingeringTable(SqlTable):
    """A table whose writer takes its time to report back, so that it may die before.

    Attributes:
        linger: Seconds.
        checks: Whether the token is checked.
    """

    linger = 0.0
    checks = True

    def write(self, records: Sequence[Any]) -> None:
        """Write records."""
        if not self.checks:
            for record in records:
                record.__dict__["token"] = time.time_ns()  # greater than any before
        super().write(records)
        time.sleep(self.linger)


def end_with_the_parent() -> None:
    """End soon after whoever has started this worker: it may have been killed."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def work(plan: Plan) -> None:
    """Read, merge and write until a signal comes."""
    engine = sa.create_engine(plan.database)
    sink = LingeringTable(engine, TABLE)
    sink.linger, sink.checks = plan.linger, plan.without != "token"
    with _process(plan) as process:
        views = process.collect(PageViews, MAX_ENTRIES, sink=sink)
        counter = Handled(plan.handled)

        def handle(key: Any, value: Any) -> None:
            page, seconds = value.decode().split()
            counter.count()
            views.add(key.decode(), 1, int(seconds), int(seconds), {page: 1})

        loop(plan, process, views)(handle)
    engine.dispose()


class Handled:
    """Enters how many messages were handled, into a file that outlives the worker."""

    def __init__(self, folder: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT
        self._file = os.open(handled_file(folder), flags, 0o600) if folder else -1
        self._handled = 0

    def count(self) -> None:
        """Count one."""
        self._handled += 1
        if self._file >= 0:
            # In place: to truncate the file first would leave nothing if it is killed then.
            os.pwrite(self._file, b"%020d" % self._handled, 0)


def loop(plan: Plan, process: Process, views: Any) -> Callable[[Callable[[Any, Any], None]], None]:
    """Return what reads messages and hands each to a function."""
    if plan.source == "kafka":
        from phonon_demo import pipeline_kafka  # noqa: PLC0415 - an extra

        return pipeline_kafka.loop(plan, process, views, BATCH)
    from phonon.sources.streams import StreamSource  # noqa: PLC0415 - only if it is wanted

    class Unchecked(StreamSource):
        """Acknowledges what was stored, as other programs do, and checks no ids."""

        def _store(self, storing: Any, stream: str, raw: Sequence[Any]) -> None:
            with keeping_what_fails(), self._process.batch():
                for _, fields in raw:
                    if fields is not None:
                        content = fields
                        if not isinstance(fields, dict):
                            content = dict(zip(fields[::2], fields[1::2], strict=True))
                        storing.handle(_Entry(content))
            if raw:
                self._client.xack(stream, self._group, *[entry for entry, _ in raw])

    source = (Unchecked if plan.without == "ids" else StreamSource)(
        process,
        plan.topic,
        GROUP,
        client=redis.Redis.from_url(plan.broker),
        batch_size=BATCH,
        poll_timeout=0.1,
        claim_idle=4 * HEARTBEAT,
        sessions=views,
    )
    return lambda handle: source.run(lambda e: handle(e.fields[b"key"], e.fields[b"value"]))


class _Entry:
    def __init__(self, fields: dict[bytes, bytes]) -> None:
        self.fields = fields


def _process(plan: Plan) -> Process:
    while True:
        with contextlib.suppress(ServerUnreachableError):
            return Process(
                url=plan.url,
                namespace=plan.namespace,
                heartbeat_interval=HEARTBEAT,
                # A database that is away is no reason to give up, and nor are workers that die.
                retry=RetryPolicy(1_000_000, 0.05, longest_delay=0.5, crashes=1_000_000),
            )
        time.sleep(0.1)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    work(Plan(**json.loads(sys.argv[1])))
