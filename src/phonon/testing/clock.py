"""A clock that a test advances, for the server and the library together.

The server's part is a variant of the function library that adds an offset, stored in a key, to the
server's time. It has another name than the shipped library, which reads no such key, so that no
production program can follow a test's clock. The library's part replaces the module ``time`` in
Phonon's modules, except in those that talk to the server: the network's time-outs are real.
"""

import asyncio
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any

from phonon import _lifetime
from phonon._core.flows import Flow, Read
from phonon._protocol import library
from phonon.errors import ConfigurationError
from phonon.settings import check_has

#: The key of the server's offset, microseconds.
KEY = "phonon-testing:clock"
#: Modules whose time stays real.
_REAL = ("phonon._transport", "phonon._embedded", "phonon.embedded", "phonon.testing")
_SERVERS_TIME = "local time = call('TIME')\n  return time[1], time[2]"
_SHIFTED_TIME = f"""local time = call('TIME')
  local micros = time[1] * 1000000 + time[2] + tonumber(call('GET', '{KEY}') or 0)
  return string.format('%d', math.floor(micros / 1000000)), string.format('%d', micros % 1000000)"""
#: Real seconds to wait for the work that an advance triggers.
_PATIENCE = 20.0
_LOOK = 0.002


class _Time(ModuleType):
    """The module ``time``, ahead of the real one.

    Attributes:
        ahead: Seconds.
    """

    def __init__(self) -> None:
        super().__init__("time", time.__doc__)
        self.ahead = 0.0

    def monotonic(self) -> float:
        """Return the seconds of the monotonic clock."""
        return time.monotonic() + self.ahead

    def time(self) -> float:
        """Return the seconds since the epoch."""
        return time.time() + self.ahead

    def clock_gettime(self, clock: int) -> float:
        """Return the seconds of a clock."""
        return time.clock_gettime(clock) + self.ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@cache
def _library() -> library.Library:
    text = library.text()
    if text.count(_SERVERS_TIME) != 1:
        raise ConfigurationError(
            "this release's function library reads the time otherwise than phonon.testing knows"
        )
    return library.Library(text.replace(_SERVERS_TIME, _SHIFTED_TIME))


class Clock:
    """Time as the server and the library see it, from `start` to `stop`.

    Processes that are made in between follow the clock. Its time goes on like real time;
    `advance` adds to it.

    Args:
        client: A redis-py client of the server, of the database that the processes use.
    """

    def __init__(self, client: Any) -> None:
        check_has("client", client, ["set", "incrby"], "a redis.Redis, such as Lab.server.client")
        self._client = client
        self._time = _Time()
        self._replaced: list[tuple[ModuleType, str, Any]] = []

    def start(self) -> None:
        """Become the clock of all processes that are made from now on."""
        self._client.set(KEY, 0)
        self._replace(library, "default", _library)
        self._shift_modules()

    def stop(self) -> None:
        """Restore the real clock."""
        for module, name, value in reversed(self._replaced):
            setattr(module, name, value)
        self._replaced.clear()
        self._client.delete(KEY)

    @property
    def ahead(self) -> float:
        """Return how many seconds the clock is ahead of real time."""
        return self._time.ahead

    def advance(self, seconds: float) -> None:
        """Let time pass: leases run out, survivors take over, retries and sessions come due.

        Live processes of this interpreter beat meanwhile as they would in that time. The call
        returns when they have done all work that came due.

        Args:
            seconds: The number of seconds.

        Raises:
            ConfigurationError: An `AsyncProcess` of this thread's event loop has to beat meanwhile:
                use ``await clock.advance_async(seconds)``.
        """
        if any(engine.is_async for engine in _living()) and _in_a_loop():
            raise ConfigurationError(
                "the event loop of an AsyncProcess cannot run while advance() does: "
                "await clock.advance_async(seconds)"
            )
        for _ in self._advancing(seconds):
            time.sleep(_LOOK)

    async def advance_async(self, seconds: float) -> None:
        """Let time pass, in a program with an event loop; see `advance`."""
        for _ in self._advancing(seconds):
            await asyncio.sleep(_LOOK)

    # For both drivers. At each yield the caller waits for a moment.

    def _advancing(self, seconds: float) -> Iterator[None]:
        if seconds < 0:
            raise ConfigurationError(f"time does not go back: advance(seconds={seconds!r})")
        self._shift_modules()  # for modules that were imported since
        left = seconds
        while left > 0:
            engines = _living()
            # After one leap all processes would be overdue at once, and none could detect deaths.
            step = min([left, *map(_pace, engines)])
            left -= step
            self._time.ahead += step
            self._client.set(KEY, int(self._time.ahead * 1_000_000))
            # Twice: the first beat may have begun before the clock was set.
            for _ in range(2):
                beats = {engine: engine.heartbeat.beats for engine in engines}
                for engine in engines:
                    _wake(engine)
                yield from _until(partial(_have_beaten, beats))
                yield from _until(partial(_are_quiet, engines))

    def _shift_modules(self) -> None:
        for name, module in list(sys.modules.items()):
            if not name.startswith("phonon.") or name.startswith(_REAL) or module is None:
                continue
            for attribute, value in list(vars(module).items()):
                if value is time:
                    self._replace(module, attribute, self._time)
                elif value is time.monotonic or value is time.time:
                    self._replace(module, attribute, getattr(self._time, value.__name__))

    def _replace(self, module: ModuleType, name: str, value: Any) -> None:
        self._replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)


def _living() -> list[Any]:
    """Return the engines of this interpreter's processes that live and reach their server."""
    engines = []
    for process in list(_lifetime._forkable):  # noqa: SLF001 - within the library
        engine = getattr(process, "_engine", None)
        if engine is not None and engine.is_started and not _is_out(engine):
            engines.append(engine)
    return engines


def _is_out(engine: Any) -> bool:
    """Return whether a process has ended, or was paused or killed by a test."""
    return bool(engine.stopped or engine.heartbeat.stopping or engine in paused)


#: The engines of the processes that a test has paused or killed.
paused: set[Any] = set()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _wake(engine: Any) -> None:
    """Wake all workers that wait for a time, so that they read the clock again."""
    for part in list(vars(engine).values()):
        ring: Any = getattr(getattr(part, "signal", None), "set", None)
        if ring is not None:
            ring()
    identity = engine.identity
    if not identity.waiters:
        return

    def nudge() -> Flow[None]:
        yield Read(identity.nudges(identity.id))

    engine.driver.spawn(nudge(), "phonon-testing-nudge")


def _pace(engine: Any) -> float:
    """Return the seconds until a process has to act to keep its lease."""
    return float(min(engine.options.heartbeat_interval, engine.leases.soonest()))


def _have_beaten(beats: dict[Any, int]) -> bool:
    return all(_is_out(e) or e.heartbeat.beats > before for e, before in beats.items())


def _are_quiet(engines: Sequence[Any]) -> bool:
    """Return whether processes have done all due background work by now."""
    return not any(
        e.outbox.taken_over
        or e.takeover.is_working
        or e.identity.suspected
        or (e.leases.soonest() < math.inf and e.leases._due <= e.identity.clock())  # noqa: SLF001 - within the library
        for e in engines
        if not _is_out(e)
    )


def _until(condition: Callable[[], bool]) -> Iterator[None]:
    give_up = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(
                f"after {_PATIENCE:g} real seconds the processes have not finished the work "
                "that came due: does one of their execute() calls wait for something?"
            )
        yield
