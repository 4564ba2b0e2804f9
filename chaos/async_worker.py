"""A worker with an event loop: the same program as `chaos.worker`, for asyncio."""

import asyncio
import contextlib
import signal
import time
from typing import Any

from chaos.sink import Sink
from chaos.wire import Ready, WorkerSettings
from chaos.worker import REPORT_INTERVAL, Link, ProgressReporter, Stop, options
from phonon.aio import AsyncLruCache, AsyncProcess, AsyncUpdate
from phonon.errors import ServerUnreachableError


class _Inbox:
    """Receives the program's messages, to be awaited.

    Args:
        link: The connection to it.
        stop: The handler of signals.
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


async def work(link: Link, settings: WorkerSettings, stop: Stop) -> None:
    """Handle messages until there are no more."""
    reporter = ProgressReporter(link)
    inbox = _Inbox(link, stop)
    Sink.current = Sink(settings.database, settings.job.table, reporter.written)
    with contextlib.closing(Sink.current):
        async with await _connect(settings, reporter) as process:
            job: Any = settings.job
            cache: AsyncLruCache[AsyncUpdate] = AsyncLruCache(settings.max_entries)
            link.send(Ready(process.id))
            while (messages := await inbox.receive()) is not None:
                async with process.batch():
                    for message in messages:
                        await cache.set(message[0], job.update(process, message))
                # Only now are they all on the server, and safe: a broker would be told here.
                reporter.acknowledge(len(messages))
            await cache.expire_all()
            await process.stop()
            reporter.report(done=True)


async def _connect(settings: WorkerSettings, reporter: ProgressReporter) -> AsyncProcess:
    give_up = time.monotonic() + settings.patience
    while True:
        try:
            return await AsyncProcess(**options(settings, reporter)).start()
        except ServerUnreachableError:
            if time.monotonic() >= give_up:
                raise
            await asyncio.sleep(REPORT_INTERVAL)


def run(link: Link, settings: WorkerSettings, stop: Stop) -> None:
    """Do the work in an event loop of its own."""
    asyncio.run(work(link, settings, stop))
