"""A worker with an event loop: the same program as `phonon_demo.worker`, for asyncio."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from phonon.aio import AsyncLruCache, AsyncProcess, AsyncUpdate
from phonon.errors import ServerUnreachableError
from phonon_demo import twins  # noqa: F401 - before a batch of theirs is taken over
from phonon_demo.sink import Sink
from phonon_demo.wire import Ready, Setup
from phonon_demo.worker import REPORT_INTERVAL, Counter, Link, Stop, options


class _Inbox:
    """What the program sends, to be awaited.

    Args:
        link: The connection to it.
        stop: What is told of signals.
    """

    def __init__(self, link: Link, stop: Stop) -> None:
        self._link = link
        self._stop = stop
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._leave, number)

    def _leave(self, number: int) -> None:
        self._stop(number, None)
        self._news.set()

    async def receive(self) -> Any:
        """Wait for the program; see `Link.receive`."""
        self._news.clear()
        if self._stop.number is None:
            self._loop.add_reader(self._link.fileno(), self._news.set)
            try:
                await self._news.wait()
            finally:
                self._loop.remove_reader(self._link.fileno())
        return self._link.receive()  # it is there, or a signal is, which this raises


async def work(link: Link, setup: Setup, stop: Stop) -> None:
    """Handle messages until there are no more."""
    counter = Counter(link)
    inbox = _Inbox(link, stop)
    Sink.current = Sink(setup.database, setup.job.table, counter.written)
    with contextlib.closing(Sink.current):
        async with await _connect(setup, counter) as process:
            merge, expire_all = _merging(process, setup)
            link.send(Ready(process.id))
            while (messages := await inbox.receive()) is not None:
                async with process.batch():
                    for message in messages:
                        await merge(message)
                # Only now are they all on the server, and safe: a broker would be told here.
                counter.acknowledge(len(messages))
            await expire_all()
            await process.stop()
            counter.report(done=True)


def _merging(
    process: AsyncProcess, setup: Setup
) -> tuple[Callable[[Any], Awaitable[object]], Callable[[], Awaitable[None]]]:
    """Return what merges a message, and what ends all sessions, both to be awaited."""
    job: Any = setup.job  # its updates are those of phonon.aio
    if job.model is not None and not setup.updates:
        records: Any = process.collect(job.model, setup.max_entries)
        return lambda message: records.add(*job.row(message)), records.expire_all
    cache: AsyncLruCache[AsyncUpdate] = AsyncLruCache(setup.max_entries)
    return lambda message: cache.set(message[0], job.update(process, message)), cache.expire_all


async def _connect(setup: Setup, counter: Counter) -> AsyncProcess:
    give_up = time.monotonic() + setup.patience
    while True:
        try:
            return await AsyncProcess(**options(setup, counter)).start()
        except ServerUnreachableError:
            if time.monotonic() >= give_up:
                raise
            await asyncio.sleep(REPORT_INTERVAL)


def run(link: Link, setup: Setup, stop: Stop) -> None:
    """Do the work in an event loop of its own."""
    asyncio.run(work(link, setup, stop))
