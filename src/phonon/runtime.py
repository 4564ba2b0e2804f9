"""What waits, and who: the same engine runs in threads, and in the tasks of an event loop.

Everything that may wait for something else goes through a runtime: a lock that is held while a call
is under way, a pause, a worker in the background, the user's code. A ``threading.Lock`` that nobody
holds while he waits for anything is the same in both worlds, and stays what it is.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from contextlib import AbstractContextManager
from inspect import iscoroutine, iscoroutinefunction
from types import TracebackType
from typing import Any, Protocol


class Worker(Protocol):
    """Something that runs in the background."""

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, for so many seconds at the most."""


class Condition(Protocol):
    """What a `threading.Condition` does."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> bool | None: ...

    def wait(self, timeout: float | None = None) -> bool:
        """Let go, and wait to be notified."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until something is so, and say whether it is."""

    def notify(self) -> None:
        """Let one of those that wait go on."""

    def notify_all(self) -> None:
        """Let all of them go on."""


class Runtime(Protocol):
    """How the engine waits."""

    #: Whether ``async def execute`` can be run here.
    is_async: bool

    def lock(self) -> AbstractContextManager[Any]:
        """A lock that may be held during calls."""

    def rlock(self) -> AbstractContextManager[Any]:
        """One that whoever holds it may take again."""

    def condition(self, lock: Any = None) -> Condition:
        """A condition, on a lock that nobody holds during calls."""

    def local(self) -> Any:
        """An object with attributes of their own for everybody."""

    def admit(self) -> None:
        """Refuse a caller who cannot wait here, before anything has been done for him."""

    def me(self) -> object:
        """Who is running: a thread or a task."""

    def my_name(self) -> str:
        """Its name, for people."""

    def sleep(self, seconds: float) -> None:
        """Pause."""

    def spawn(self, work: Callable[[], object], name: str) -> Worker:
        """Have something done in the background.

        Raises:
            RuntimeError: It is too late for that: the interpreter, or the event loop, is ending.
        """

    def wait(self, futures: Iterable[Any], timeout: float) -> None:
        """Wait until all of what an executor runs is done, for so many seconds at the most."""

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``execute``, ``execute_many`` or callback."""

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        """Run the user's ``on_error`` or ``on_lost``."""

    def clean_up(self, work: Callable[[], object]) -> None:
        """Do what is left to do when something has ended, maybe because it was interrupted."""

    def close(self) -> None:
        """The process was stopped: leave nothing running."""


class Threads:
    """The runtime of threads."""

    is_async = False
    lock = staticmethod(threading.Lock)
    rlock = staticmethod(threading.RLock)
    local = staticmethod(threading.local)
    me = staticmethod(threading.current_thread)
    sleep = staticmethod(time.sleep)

    @staticmethod
    def condition(lock: Any = None) -> threading.Condition:
        """See `Runtime`."""
        return threading.Condition(lock)

    @staticmethod
    def admit() -> None:
        """See `Runtime`. Any thread may wait."""

    @staticmethod
    def my_name() -> str:
        """The thread's name."""
        return threading.current_thread().name

    @staticmethod
    def spawn(work: Callable[[], object], name: str) -> threading.Thread:
        """A daemon thread."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread

    @staticmethod
    def wait(futures: Iterable[Any], timeout: float) -> None:
        """See `Runtime`."""
        wait(futures, timeout)

    @staticmethod
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See `Runtime`.

        Raises:
            TypeError: It is a coroutine function: it would not run, and its data would be lost.
        """
        result = function(*args, **kwargs)
        if iscoroutine(result):
            result.close()
            raise TypeError(
                f"{getattr(function, '__qualname__', function)} is a coroutine function, and this "
                "process has no event loop: use phonon.aio, with AsyncProcess and AsyncUpdate"
            )
        return result

    @staticmethod
    def tell(function: Callable[..., Any], *args: Any) -> None:
        """See `Runtime`."""
        if iscoroutinefunction(function):
            raise TypeError(f"{function!r} is a coroutine function: use phonon.aio.AsyncProcess")
        function(*args)

    @staticmethod
    def clean_up(work: Callable[[], object]) -> None:
        """See `Runtime`."""
        work()

    @staticmethod
    def close() -> None:
        """See `Runtime`."""


#: It has no state, so there is one.
THREADS = Threads()
