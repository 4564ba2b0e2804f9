"""The worker of `chaos.run`: it merges messages in a cache, and notes those that are stored.

Each delivery of a message gets a number of its own. The broker of a worker that was killed delivers
again what was not acknowledged, and then it has another number.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from chaos.jobs import AsyncNumberedUpdate, NumberedUpdate, Sink
from chaos.journal import Journal
from phonon import LruCache, PhononError, Process
from phonon.aio import AsyncLruCache, AsyncProcess
from phonon.errors import ServerUnreachableError
from phonon.settings import Durability
from phonon.sources.streams import StreamEntry, StreamSource
from phonon_demo.async_worker import read
from phonon_demo.worker import BATCH, GROUP, Plan

#: Seconds for which a new worker tries to reach a server that is being started again.
PATIENCE = 15.0


@dataclass(frozen=True)
class StruckPlan(Plan):
    """The settings of a worker.

    Attributes:
        journal: The folder of the workers' journals.
        update: The class of updates.
        checks: Whether the database checks the token.
        durability: The safety of data before it is acknowledged.
        verbose: Whether to show what the library logs.
    """

    journal: str = ""
    update: type[NumberedUpdate] = NumberedUpdate
    checks: bool = True
    durability: Durability | None = None
    verbose: bool = False


class PlainStream(StreamSource):
    """Stores entries without their ids, and acknowledges them, as other programs do."""

    def _store(self, storing: Any, stream: str, raw: Sequence[Any]) -> None:
        with self.storing():
            for id_, fields in raw:
                is_list = isinstance(fields, list)  # by the older version of the protocol
                content = dict(zip(fields[::2], fields[1::2], strict=True)) if is_list else fields
                storing.handle(StreamEntry(id_, content, stream))
        if raw:
            self._client.xack(stream, self._group, *[id_ for id_, _ in raw])

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Store the updates of the block."""
        with self._process.batch():
            yield


class NumberedStream(PlainStream):
    """Notes what is stored."""

    deliveries: "Deliveries"

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Store the updates of the block."""
        with self.deliveries.stored(), super().storing():
            yield


class Deliveries:
    """Numbers the deliveries of a worker, and notes them when they are stored.

    Args:
        journal: The journal of the worker.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._worker = uuid.uuid4().hex[:12]
        self._count = itertools.count()
        self._numbers: list[str] = []

    def read(self, fields: Mapping[bytes, bytes]) -> tuple[str, list[Any]]:
        """Return the key and the content of a message, with the number of this delivery."""
        *content, number = json.loads(fields[b"value"])
        self._numbers.append(f"{number}/{self._worker}/{next(self._count)}")
        return fields[b"key"].decode(), [*content, self._numbers[-1]]

    @contextlib.contextmanager
    def stored(self) -> Iterator[None]:
        """Note the deliveries of the block as acknowledged, if all of them are stored."""
        self._numbers = []
        try:
            yield
        except PhononError as error:  # the source would only log it
            raise AssertionError(f"a batch was not stored: {error}") from error
        # All data is on the server: here a program would acknowledge to its broker.
        self._journal.note("acknowledged", self._numbers)


def work(plan: StruckPlan) -> int:
    """Read, merge and write until a signal comes."""
    with begun(plan) as journal, connected(_options(plan, journal)) as process:
        cache: LruCache[NumberedUpdate] = LruCache(plan.max_entries)
        source = NumberedStream(
            process, plan.stream, GROUP,
            batch_size=BATCH, poll_timeout=0.1, claim_idle=4 * plan.heartbeat, sessions=cache,
        )  # fmt: skip
        source.deliveries = deliveries = Deliveries(journal)

        def handle(entry: StreamEntry) -> None:
            key, content = deliveries.read(entry.fields)
            cache.set(key, plan.update(process, key, content))

        source.run(handle)
    return 0


def async_work(plan: StruckPlan) -> int:
    """Do the same with an event loop."""
    asyncio.run(_async_work(plan))
    return 0


async def _async_work(plan: StruckPlan) -> None:
    with begun(plan) as journal:
        deliveries, give_up = Deliveries(journal), time.monotonic() + PATIENCE
        process = AsyncProcess(**_options(plan, journal))
        while time.monotonic() < give_up:
            with contextlib.suppress(ServerUnreachableError):
                await process.start()
                break
            await asyncio.sleep(0.1)
        async with process:
            cache: AsyncLruCache[Any] = AsyncLruCache(plan.max_entries)
            kind: Any = AsyncNumberedUpdate

            async def store(entries: Sequence[Any]) -> bool:
                with deliveries.stored():
                    async with process.batch():
                        for _, fields in entries:
                            key, content = deliveries.read(fields)
                            update: Any = kind(process, key, content)
                            await cache.set(key, update)
                return True

            await read(plan, process.id, store)
            await cache.expire_all()


@contextlib.contextmanager
def begun(plan: StruckPlan) -> Iterator[Journal]:
    """Yield the journal of a worker, which notes what the library logs and the sink writes."""
    journal = Journal(plan.journal)
    log = logging.getLogger("phonon")
    log.addHandler(journal)
    log.propagate = plan.verbose
    Sink.current = Sink(plan.database, journal.note, checks=plan.checks)
    try:
        yield journal
    finally:
        Sink.current.close()


def connected(options: dict[str, Any]) -> Process:
    """Return a process, as soon as there is a server."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return Process(**options)
        except (ServerUnreachableError, redis.ConnectionError):
            if time.monotonic() > give_up:
                raise
        time.sleep(0.1)


def _options(plan: StruckPlan, journal: Journal) -> dict[str, Any]:
    return {
        "url": plan.url,
        "namespace": plan.namespace,
        "heartbeat_interval": plan.heartbeat,
        "durability": plan.durability,
        "on_error": journal.trouble,
    }
