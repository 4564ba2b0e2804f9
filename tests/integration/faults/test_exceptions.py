"""Exceptions that generators, futures and executors treat in a way of their own."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from phonon import RetryPolicy
from support.both import APIS, Api, got, until
from support.world import Redis

SOON = RetryPolicy(first_delay=0.02, jitter=0)


def group() -> BaseException:
    return ExceptionGroup("several", [ValueError()])


def group_with_an_interrupt() -> BaseException:
    return BaseExceptionGroup("several", [KeyboardInterrupt()])


ERRORS: list[Callable[[], BaseException]] = [
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    asyncio.CancelledError,
    SystemExit,
    KeyboardInterrupt,
    group,
    group_with_an_interrupt,
]
WHERE = ["execute", "execute_many", "merge", "state", "reset_states", "callback", "on_error"]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("api", APIS[:2], ids=lambda api: api.name)
def test_it_is_a_failure_like_any_other(  # noqa: C901 - a class with all that users override
    api: Api, where: str, error: Callable[[], BaseException], server: Redis, namespace: str
) -> None:
    """The data is kept and written once, and nothing hangs."""
    raising = [True]
    written: list[int] = []
    armed: list[bool] = []

    def maybe(place: str) -> None:
        if place == where and raising and (place != "state" or armed):
            raise error()

    class Raising(api.update, name=f"raising in {namespace}"):  # type: ignore[misc, name-defined, call-arg]  # of either API
        own = 0

        def merge(self, other: Any) -> None:
            maybe("merge")
            self.doc["n"] = self.doc.get("n", 0) + other.doc.get("n", 0)

        def state(self) -> dict[str, Any]:
            maybe("state")
            return {"own": self.own}

        def reset_states(self) -> None:
            maybe("reset_states")

    def execute(self: Any) -> None:
        maybe("execute")
        written.append(self.doc["n"])

    def execute_many(_: Any, updates: Any) -> None:
        maybe("execute_many")
        written.extend(update.doc["n"] for update in updates)

    if where == "execute_many":
        Raising.execute_many = classmethod(api.user_code(execute_many))
    else:
        Raising.execute = api.user_code(execute)

    async def played() -> None:
        process = api.process(
            url=server.url,
            namespace=namespace,
            retry=SOON,
            heartbeat_interval=0.5,
            on_error=lambda _: maybe("on_error"),
        )
        if api.is_async:
            await process.start()
        if where == "callback":
            reference = await got(process.create_reference("resource"))
            with contextlib.suppress(BaseException):
                await got(reference.dereference(api.user_code(lambda: maybe("callback"))))
            assert await got(reference.count()) == 1
            raising.clear()
            assert await got(reference.dereference())
        else:
            updates = [Raising(process, "record", doc={"n": 1}, init_cache=False) for _ in "xx"]
            cache = api.cache()
            armed.append(True)
            for update in updates:
                with contextlib.suppress(BaseException):
                    await got(cache.set("record", update))
            with contextlib.suppress(BaseException):
                await got(cache.expire_all())
            raising.clear()
            for update in updates:
                with contextlib.suppress(BaseException):
                    if update.has_unsent():
                        await got(update.end_session())
            await until(lambda: sum(written) == 2)
        await got(process.stop())

    api.run(played)
    assert sum(written) == (0 if where == "callback" else 2)
