"""Celery: tasks that add to records, tasks that run one at a time, joins that survive crashes.

::

    app = Celery("shop", broker="redis://localhost/0")
    phonon = setup(app, "redis://localhost/1")

    @app.task(acks_late=True, reject_on_worker_lost=True)
    @phonon.exactly_once
    def viewed(page):
        phonon.add(Views, page, doc={"n": 1})
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from phonon.contrib.worker import Worker
from phonon.errors import ConfigurationError

try:
    import celery
    from celery import signals
    from celery.canvas import Signature
    from celery.exceptions import Ignore
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"phonon.contrib.celery needs {missing.name}: pip install 'phonon[celery]'",
        name=missing.name,
    ) from missing

log = logging.getLogger("phonon")

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds for which the parts of a join that never became complete are remembered.
_WEEK = 7 * 24 * 3600


class CeleryWorker(Worker):
    """The process and the cache of each of an app's workers; made by `setup`.

    Args:
        name: The app's name.
        url: The URL of Phonon's server.
        options: As for a `Worker`.
    """

    def __init__(self, name: str, url: str | None, **options: Any) -> None:
        super().__init__(url, **options)
        self._name = name

    def exactly_once(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Store a task's records once, even if the task is delivered or retried several times.

        Write it below ``@app.task``. The task's records are stored when it has returned, together
        with its id, and not at all if it raises. A task that is delivered again within an hour adds
        nothing and returns None.
        """

        @functools.wraps(function)
        def task(*args: P.args, **kwargs: P.kwargs) -> R | None:
            request = _request()
            if request is None:  # called directly, not sent
                with self.batch():
                    return function(*args, **kwargs)
            result: R | None = self.once(
                request.id, lambda: function(*args, **kwargs), of=f"celery/{self._name}"
            )
            return result

        return task

    def one_at_a_time(
        self, function: Callable[P, R] | None = None, *, retry: float | None = None
    ) -> Any:
        """Run one task of the same name and arguments at a time; write it below ``@app.task``.

        The lock lasts as long as the worker lives, so a task that runs for hours keeps it. When a
        worker is killed, its lock is freed.

        Args:
            function: The task's function.
            retry: Seconds after which a task tries again if another one was running. None: the task
                is ignored, because the other one does its work.
        """
        if function is None:
            return functools.partial(self.one_at_a_time, retry=retry)
        wrapped = function

        @functools.wraps(wrapped)
        def task(*args: P.args, **kwargs: P.kwargs) -> R:
            request = _request()
            name = request.task if request is not None else wrapped.__qualname__
            lock = self.process.lock(f"celery/{name}{_arguments(args, kwargs)}", block=False)
            if not lock.acquire():
                if request is not None and retry is not None:
                    raise celery.current_task.retry(countdown=retry, max_retries=None)
                log.info("task %s is running elsewhere with the same arguments", name)
                raise Ignore
            try:
                return wrapped(*args, **kwargs)
            finally:
                lock.release()

        return task

    def join(self, name: str, part: Any, *, parties: int, then: Signature[Any]) -> bool:
        """Mark a part as done; the worker that completes the last part sends the next task.

        This is a chord that survives its workers: parts have names, so a part that is delivered
        again because its worker died counts once, and none is missing. Call it at the end of a task
        with ``acks_late=True, reject_on_worker_lost=True``.

        Args:
            name: The name of the join, a new one each time.
            part: The name of the part.
            parties: The number of parts.
            then: The task to send when all parts are done. If a worker dies at that moment the task
                may be sent twice, with the same task id: `exactly_once` makes it count once.

        Returns:
            Whether this was the last part.
        """
        key = f"phonon-celery:{self.process.namespace}:{name}"
        # One at a time: otherwise the last two would both find all parts done.
        with self.process.lock(f"celery/join/{name}"):
            client = self.process.client
            client.sadd(key, repr(part))
            client.expire(key, _WEEK)
            if client.scard(key) < parties:
                return False
            then.apply_async(task_id=f"{name}/then")
            client.delete(key)
        return True


def setup(app: "celery.Celery", url: str | None = None, **options: Any) -> CeleryWorker:
    """Give each worker of an app a process, and end its sessions when it shuts down.

    It works with any pool: in each child of ``prefork``, and in the worker itself with ``solo`` and
    ``threads``. A warm shutdown ends all sessions, and so does a child that has reached its
    ``max_tasks_per_child``. After a cold shutdown, or a kill, the other workers take over.

    Args:
        app: The Celery app.
        url: The URL of Phonon's server; None: as for `phonon.Process`.
        options: Arguments of `phonon.Process`, and ``max_entries``.

    Returns:
        The object with which tasks add records.
    """
    if not isinstance(app, celery.Celery):
        raise ConfigurationError(f"app is a celery.Celery, not {app!r}: setup(app, url)")
    worker = CeleryWorker(app.main or "celery", url, **options)

    def stop(**_: Any) -> None:
        worker.stop()

    signals.worker_process_shutdown.connect(stop, weak=False)
    signals.worker_shutdown.connect(stop, weak=False)
    return worker


def _request() -> Any:
    """Return the request of the running task; None outside of a task."""
    task = celery.current_task
    request = task.request if task else None
    return request if request is not None and request.id else None


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [f"{name}={value!r}" for name, value in sorted(kwargs.items())]
    return f"({', '.join([*map(repr, args), *named])})"
