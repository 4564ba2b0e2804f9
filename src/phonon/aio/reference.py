"""References, for tasks."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Self

from phonon.aio.lock import AsyncLock
from phonon.aio.twin import call, twin
from phonon.reference import Reference

if TYPE_CHECKING:
    from phonon.aio.process import AsyncProcess


class AsyncReference:
    """A process's membership in a resource; see `Reference`.

    Made by `AsyncProcess.create_reference`. Tasks that are to count separately take an
    `AsyncProcess` each.

    Args:
        process: Whose membership.
        resource: The name of the resource, any text.
        block: Whether `lock` waits by default.
        parties: How many different processes the session is to have, if that is known: until so
            many have come, nobody is the last.
    """

    def __init__(
        self,
        process: "AsyncProcess",
        resource: str,
        block: bool = True,
        parties: int | None = None,
    ) -> None:
        self._process = process
        self._engine = process.engine
        self._sync = Reference(process.sync, resource, block, parties)

    @classmethod
    def to(cls, process: "AsyncProcess", reference: Reference) -> Self:
        """The twin of a reference."""
        self = cls.__new__(cls)
        self._process = process
        self._engine = process.engine
        self._sync = reference
        return self

    def __repr__(self) -> str:
        return repr(self._sync).replace("<phonon.", "<phonon.aio.Async", 1)

    @property
    def resource_key(self) -> str:
        """The name of the resource."""
        return self._sync.resource_key

    @property
    def block(self) -> bool:
        """Whether `lock` waits by default."""
        return self._sync.block

    @property
    def parties(self) -> int | None:
        """How many different processes the session is to have."""
        return self._sync.parties

    @property
    def force_expiry(self) -> bool:
        """Whether `dereference` executes what there is although others hold the resource."""
        return self._sync.force_expiry

    @force_expiry.setter
    def force_expiry(self, force: bool) -> None:
        self._sync.force_expiry = force

    def lock(
        self,
        block: bool | None = None,
        shared: bool = False,
        *,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
    ) -> AsyncLock:
        """A lock on the resource, for an ``async with`` block; see `Reference.lock`."""
        return AsyncLock(
            self._process,
            self.resource_key,
            self.block if block is None else block,
            shared=shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
        )

    count = twin(Reference.count)
    refresh_session = twin(Reference.refresh_session)
    wait = twin(Reference.wait)
    increment_times_modified = twin(Reference.increment_times_modified)
    get_times_modified = twin(Reference.get_times_modified)
    modified_by = twin(Reference.modified_by)
    holders = twin(Reference.holders)

    async def dereference(
        self,
        callback: Callable[..., Any] | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        block: bool | None = None,
    ) -> bool:
        """Let go of the resource; see `Reference.dereference`.

        Args:
            callback: Called if this process is the last to let go, and awaited if it returns
                something to await.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            block: Whether to wait for the resource's lock. None: as the reference was told to.
        """
        return await call(
            self._engine,
            self._sync.dereference,
            None if callback is None else _awaited(callback),
            args,
            kwargs,
            block,
        )


def _awaited(callback: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Call it in the event loop, whatever it is."""

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        result = callback(*args, **kwargs)
        return await result if isawaitable(result) else result

    return awaited
