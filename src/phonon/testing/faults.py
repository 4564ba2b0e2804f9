"""Faults of a process: kill it, pause it, lose answers to it."""

import asyncio
import contextlib
import os
import signal
import weakref
from collections.abc import Iterator
from typing import Any

from phonon import Process, _lifetime
from phonon._transport import async_io
from phonon.errors import ConfigurationError
from phonon.process import BaseProcess
from phonon.settings import check_count
from phonon.testing import clock
from phonon.testing.wire import Wire

#: Connections of killed processes of an event loop, until they are closed.
_closings: "weakref.WeakSet[asyncio.Future[None]]" = weakref.WeakSet()
#: The wires of the processes that were made with one.
_wires: "weakref.WeakKeyDictionary[Any, Wire]" = weakref.WeakKeyDictionary()


def attach(process: Any, wire: Wire) -> None:
    """Note the wire through which a process reaches its server."""
    _wires[process] = wire


def kill(process: Any) -> None:
    """Kill a process, without a clean stop.

    A process of the operating system gets SIGKILL, and is waited for. A `Process` of this
    interpreter is cut off from its server, and stops beating; the server and the other processes
    see no difference. Its calls under way raise a `ConnectionLostError`, later ones a
    `ProcessStoppedError`.

    Args:
        process: A `Process` or `AsyncProcess` that was made by the fixture ``phonon_processes``; or
            an object with a ``pid``: a ``subprocess.Popen`` or a ``multiprocessing.Process``.
    """
    if not hasattr(process, "engine"):
        os.kill(_pid_of(process), signal.SIGKILL)
        getattr(process, "wait", getattr(process, "join", int))()
        return
    wire = _wire_of(process)
    engine = process.engine
    clock.paused.add(engine)
    _lifetime.forget(process)
    engine.driver.retry_timeout = 0.0  # a caller that waits for an answer need not wait long
    wire.cut()
    engine.close()
    if isinstance(process, Process):
        process._close_connection()  # noqa: SLF001 - between the library's own modules
    else:
        _closings.add(asyncio.ensure_future(async_io.run(process._connection.close())))  # noqa: SLF001 - as above


@contextlib.contextmanager
def pause(process: Any) -> Iterator[None]:
    """Pause a process for the time of the ``with`` block.

    A process of the operating system gets SIGSTOP and SIGCONT. A `Process` of this interpreter is
    cut off from its server for that time; its calls wait.

    Args:
        process: As for `kill`.
    """
    if not hasattr(process, "engine"):
        os.kill(_pid_of(process), signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process.pid, signal.SIGCONT)
        return
    wire = _wire_of(process)
    clock.paused.add(process.engine)
    wire.hold()
    try:
        yield
    finally:
        clock.paused.discard(process.engine)
        wire.release()


@contextlib.contextmanager
def lose_answers(process: Any, answers: int = 1) -> Iterator[None]:
    """Lose the server's next answers to a process, after it has carried out the calls.

    The process repeats those calls. After the ``with`` block all answers arrive.

    Args:
        process: A `Process` or `AsyncProcess` that was made by the fixture ``phonon_processes``.
        answers: The number of answers to lose.
    """
    wire = _wire_of(process)
    wire.lose(check_count("answers", answers))
    try:
        yield
    finally:
        wire.lose(0)


def _pid_of(process: Any) -> int:
    pid = getattr(process, "pid", None)
    if not isinstance(pid, int):
        raise ConfigurationError(
            f"process is not {process!r}: give a Process that the testing kit has made, or a "
            "subprocess.Popen or multiprocessing.Process that was started"
        )
    return pid


def _wire_of(process: Any) -> Wire:
    wire = _wires.get(process) if isinstance(process, BaseProcess) else None
    if wire is None:
        raise ConfigurationError(
            f"{process!r} was not made by the testing kit, so its connection is not in its hands: "
            "make it with the fixture phonon_processes, or phonon.testing.Lab"
        )
    return wire
