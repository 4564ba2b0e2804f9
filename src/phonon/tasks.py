"""The runtime of an event loop: the engine runs in greenlets, and where it waits its task waits.

`run` starts a function in a greenlet of the current task. When that function comes to something
that has to be awaited, `await_` hands it to the task, which awaits it as usual: the event loop goes
on, and a cancellation arrives in the function as `asyncio.CancelledError`, at the place where it
waits. SQLAlchemy's asyncio extension works in the same way.
"""

import asyncio
import contextlib
import inspect
import logging
import sys
import threading
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar, cast

from greenlet import getcurrent, greenlet

from phonon.errors import ConfigurationError, ForkedError
from phonon.protocol.effects import Outcome

log = logging.getLogger("phonon")

T = TypeVar("T")

#: Seconds that a cancelled call gives its cleaning up, which goes on in the background after that.
PATIENCE = 0.5
#: Seconds that a task which was cancelled, because its process stops, is waited for.
LAST_PATIENCE = 5.0


class _Green(greenlet):  # type: ignore[misc]  # it has no types
    """Runs the engine's code on behalf of a task, in that task's context."""

    def __init__(self, function: Callable[..., Any], parent: greenlet) -> None:
        super().__init__(function, parent)
        self.gr_context = parent.gr_context
        #: Whether the task is destroyed: nothing can be awaited any more.
        self.dying = False


@types.coroutine
def run(function: Callable[..., T], *args: Any, **kwargs: Any) -> Generator[Any, Any, T]:
    """Run a function that may use `await_`; to be awaited."""
    green = _Green(function, getcurrent())
    pending = green.switch(*args, **kwargs)
    while not green.dead:
        try:
            value = yield pending
        except GeneratorExit:
            green.dying = True
            green.throw(GeneratorExit)
            raise
        except BaseException as error:  # noqa: BLE001 - a cancellation: it arrives where we wait
            pending = green.throw(error)
        else:
            pending = green.switch(value)
    return cast("T", pending)


def await_(awaitable: Awaitable[T], timeout: float | None = None) -> T:
    """Wait for something, in a function that `run` runs.

    Args:
        awaitable: What to wait for.
        timeout: Seconds to wait at the most.

    Raises:
        TimeoutError: It took longer.
        ConfigurationError: The caller is ordinary code: nobody would wait.
    """
    green = getcurrent()
    if not isinstance(green, _Green):
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise _refusal()
    steps: Any = awaitable if inspect.iscoroutine(awaitable) else awaitable.__await__()
    try:
        pending = steps.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    if timeout is None:
        return cast("T", _finish(green, steps, pending))
    with limit(timeout):
        return cast("T", _finish(green, steps, pending))


def _refusal() -> ConfigurationError:
    """What ordinary code is told."""
    return ConfigurationError(
        "this belongs to an AsyncProcess and cannot be called from here: await the method of "
        "its asyncio twin, in the event loop of that process"
    )


def _finish(green: _Green, steps: Any, pending: Any) -> Any:
    """Go through what is left of something that has begun, and waits."""
    task = cast("greenlet", green.parent)
    try:
        while True:
            if green.dying:
                raise GeneratorExit
            try:
                value = task.switch(pending)
            except BaseException as error:  # noqa: BLE001 - it is for whoever waits down there
                pending = steps.throw(error)
            else:
                pending = steps.send(value)
    except StopIteration as stop:
        return stop.value


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Interrupt the block when it has waited for so long.

    Raises:
        TimeoutError: It was.
    """
    timeout = asyncio.timeout(seconds)
    _at_once(timeout.__aenter__())
    try:
        yield
    except BaseException as error:
        _at_once(timeout.__aexit__(type(error), error, error.__traceback__))
        raise
    _at_once(timeout.__aexit__(None, None, None))


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that does not wait."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)


#: Whether this is an ``execute``, or something that it has called.
_executing: ContextVar[bool] = ContextVar("phonon_executing", default=False)


class _Own:
    """An attribute of a `Local` that each task has of its own. Tasks that it starts inherit it.

    Args:
        name: What to call it in the task's context.
        default: What it is if it was not set.
    """

    def __init__(self, name: str, default: Any) -> None:
        self._default = default
        self._values: ContextVar[Mapping[Local, Any]] = ContextVar(name, default={})  # noqa: B039 - never changed

    def __get__(self, local: "Local", _: "type[Local] | None" = None) -> Any:
        return self._values.get().get(local, self._default)

    def __set__(self, local: "Local", value: Any) -> None:
        values = {
            other: theirs for other, theirs in self._values.get().items() if other is not local
        }
        if value is not self._default:
            values[local] = value
        self._values.set(values)

    def forget(self) -> None:
        """Nothing was set, of any process."""
        self._values.set({})


#: The batch that a task is in, open or not.
_batch = _Own("phonon_batches", None)


class Local:
    """What each task has of its own in a process, as do those that it starts."""

    batch = _batch
    #: Whether it works on what was left undone.
    working = _Own("phonon_working", False)  # noqa: FBT003 - what it is is said there


class Lock:
    """A lock that tasks may hold while they wait.

    Args:
        reentrant: Whether the task that has it may take it again.
    """

    def __init__(self, *, reentrant: bool = False) -> None:
        self._lock = asyncio.Lock()
        self._reentrant = reentrant
        self._owner: object = None
        self._depth = 0

    def __enter__(self) -> None:
        Tasks.admit()
        me = asyncio.current_task()
        if not (self._reentrant and self._owner is me):
            await_(self._lock.acquire())
            self._owner = me
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()


class Condition:
    """A condition for tasks.

    Args:
        loop: The event loop.
        lock: Its lock; nobody waits for anything else while he has it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, lock: Any = None) -> None:
        self._loop = loop
        self._lock = lock or threading.Lock()
        self._waiters: deque[asyncio.Future[bool]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Let go, and wait to be notified."""
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        timer = None
        if timeout is not None:
            timer = self._loop.call_later(timeout, _tell, waiter, False)  # noqa: FBT003 - positional there
        self._lock.release()
        try:
            return bool(await_(waiter))
        finally:
            self._lock.acquire()
            self._waiters.remove(waiter)
            if timer is not None:
                timer.cancel()

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until something is so, and say whether it is."""
        end = None if timeout is None else self._loop.time() + timeout
        while not predicate():
            left = None if end is None else end - self._loop.time()
            if left is not None and left <= 0:
                return False
            self.wait(left)
        return True

    def notify(self) -> None:
        """Let one of those that wait go on."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(True)
                return

    def notify_all(self) -> None:
        """Let all of them go on."""
        for waiter in self._waiters:
            _tell(waiter, True)  # noqa: FBT003 - as above


def _tell(waiter: "asyncio.Future[bool]", value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)


class Worker:
    """A task in the background."""

    def __init__(self, task: "asyncio.Task[None]") -> None:
        self._task = task

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return not self._task.done()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, for so many seconds at the most.

        Raises:
            RuntimeError: It is the one that calls.
        """
        if self._task is asyncio.current_task():
            raise RuntimeError("a task does not wait for itself")
        if not self._task.done():
            await_(asyncio.wait([self._task], timeout=timeout))


class Tasks:
    """The runtime of the event loop that is running. It owns the tasks that it starts."""

    is_async = True
    local = staticmethod(Local)

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        #: Whether this is the copy of it in a forked child.
        self.forked = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @staticmethod
    def lock() -> Lock:
        """See `Runtime`."""
        return Lock()

    @staticmethod
    def rlock() -> Lock:
        """See `Runtime`."""
        return Lock(reentrant=True)

    def condition(self, lock: Any = None) -> Condition:
        """See `Runtime`."""
        return Condition(self.loop, lock)

    @staticmethod
    def admit() -> None:
        """See `Runtime`.

        Raises:
            ConfigurationError: The caller is ordinary code.
        """
        if not isinstance(getcurrent(), _Green):
            raise _refusal()

    @staticmethod
    def me() -> "asyncio.Task[Any] | None":
        """The task, if it is one."""
        with contextlib.suppress(RuntimeError):  # no event loop runs in this thread
            return asyncio.current_task()
        return None

    def my_name(self) -> str:
        """The task's name."""
        task = self.me()
        return task.get_name() if task is not None else ""

    @staticmethod
    def sleep(seconds: float) -> None:
        """See `Runtime`."""
        await_(asyncio.sleep(seconds))

    def start(
        self, work: Coroutine[Any, Any, T], name: str | None, context: Context
    ) -> "asyncio.Task[T]":
        """Start a task that does not outlive the process.

        Raises:
            RuntimeError: It was stopped, or the event loop is closed.
        """
        if self._closed or self.loop.is_closed():
            work.close()
            raise RuntimeError("the process was stopped, or its event loop is closed")
        task = self.loop.create_task(work, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def spawn(self, work: Callable[[], object], name: str) -> Worker:
        """See `Runtime`. The task has nothing of the context that it is started in."""
        return Worker(self.start(self._supervise(work, name), name, Context()))

    @staticmethod
    async def _supervise(work: Callable[[], object], name: str) -> None:
        try:
            await run(work)
        except Exception:
            log.exception("the task %s has failed", name)

    @staticmethod
    def wait(futures: Iterable[Any], timeout: float) -> None:
        """See `Runtime`. What is waited for goes on if the one that waits is cancelled."""
        await_(asyncio.wait([running.task for running in futures], timeout=max(0.0, timeout)))

    @staticmethod
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See `Runtime`. Code that is not ``async`` runs in a thread: the event loop goes on."""
        if inspect.iscoroutinefunction(function):
            return await_(function(*args, **kwargs))
        result = await_(asyncio.to_thread(function, *args, **kwargs))
        return await_(result) if inspect.isawaitable(result) else result

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        """See `Runtime`. If there is something to await in it, it is awaited in the background."""
        result = function(*args)
        if inspect.isawaitable(result):
            self.spawn(lambda: await_(result), f"phonon-tell-{function!r}")

    def clean_up(self, work: Callable[[], object]) -> None:
        """See `Runtime`.

        A task that was cancelled must not be held up for long. What does not get done in time is
        kept, and goes on with what else is kept.
        """
        if not isinstance(sys.exc_info()[1], asyncio.CancelledError):
            work()
            return
        try:
            with limit(PATIENCE):
                work()
        except TimeoutError:
            pass
        except Exception:
            log.exception("cleaning up after a cancelled call has failed")

    def check(self) -> None:
        """Refuse to work for another event loop.

        Raises:
            ConfigurationError: It is another one that runs.
            ForkedError: It is the parent process's.
        """
        if self.forked:
            raise ForkedError(
                "this AsyncProcess belongs to the parent process, as does its event loop: make one "
                "in the child, in a loop of its own"
            )
        if asyncio.get_running_loop() is not self.loop:
            raise ConfigurationError(
                "this AsyncProcess belongs to another event loop: make one in each loop"
            )

    def close(self) -> None:
        """Cancel what is still running, and wait for its end."""
        self._closed = True
        left = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        if left:
            _, stubborn = await_(asyncio.wait(left, timeout=LAST_PATIENCE))
            for task in stubborn:
                log.error("%r was cancelled, and goes on", task)


class Running:
    """What an executor runs: as much of a `concurrent.futures.Future` as the driver needs."""

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self.task = task

    def done(self) -> bool:
        """Whether it has ended."""
        return self.task.done()

    def result(self) -> Any:
        """Its outcomes, by number."""
        return _Cancelled() if self.task.cancelled() else self.task.result()


class _Cancelled:
    """The outcomes of what was cancelled before it began."""

    def __getitem__(self, i: int) -> Outcome:
        return Outcome(error=asyncio.CancelledError())


class Places:
    """Runs the user's ``execute`` in tasks of their own, so many at a time.

    Args:
        runtime: Whose tasks.
        places: How many. What an ``execute`` itself sets going needs no place.
    """

    def __init__(self, runtime: Tasks, places: int) -> None:
        self._runtime = runtime
        self._places = asyncio.Semaphore(places)

    def submit(self, work: Callable[[], Any]) -> Running:
        """Start it as soon as there is a place.

        Raises:
            RuntimeError: The process was stopped.
        """
        context = copy_context()
        context.run(_batch.forget)  # a batch block is the caller's
        return Running(self._runtime.start(self._run(work), None, context))

    async def _run(self, work: Callable[[], Any]) -> Any:
        if _executing.get():
            return await run(work)
        async with self._places:
            _executing.set(True)
            return await run(work)
