"""A small library of functions, and the two ways to carry steps out behind one interface."""

import asyncio
import itertools
from typing import Any, NamedTuple, TypeVar

import uvloop

from phonon._protocol.library import Request
from phonon._transport import async_io, connect, sync_io
from phonon._transport.connect import ClientBackend, SharedConnection
from phonon._transport.server import Server
from phonon._transport.steps import Steps
from support.nodes import Cluster, Node, Watched, slot_of

__all__ = ["Cluster", "Lab", "Node", "Watched", "slot_of"]

T = TypeVar("T")
_numbers = itertools.count()

SOURCE = """#!lua name={name}
redis.register_function('{name}_count', function(keys, args)
    redis.call('INCRBY', keys[1] .. 'n', 1)
    return args[1]
end)
redis.register_function('{name}_fail', function(keys, args) return redis.error_reply(args[1]) end)
"""


class Library(NamedTuple):
    name: str
    source: str


def library() -> Library:
    """One that no other test has loaded."""
    name = f"lab{next(_numbers)}"
    return Library(name, SOURCE.format(name=name))


class Lab:
    """Runs steps in this thread, or in an event loop that runs only meanwhile."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.library = library()
        self.opened: list[SharedConnection] = []
        self.runner: asyncio.Runner | None = None
        self.backend: ClientBackend = sync_io.BACKEND
        if kind != "threads":
            factory = uvloop.new_event_loop if kind == "uvloop" else None
            self.runner = asyncio.Runner(loop_factory=factory)
            self.backend = async_io.backend(self.runner.get_loop())

    def run(self, steps: Steps[T]) -> T:
        if self.runner is None:
            return sync_io.run(steps)
        return self.runner.run(async_io.run(steps))

    def connect(self, target: Any, **settings: Any) -> Server:
        connecting = connect.connect_url if isinstance(target, str) else connect.connect_client
        shared = self.run(connecting(target, self.library, self.backend, **settings))
        self.opened.append(shared)
        return shared.server

    def count(self, key: bytes, word: bytes = b"x") -> Request:
        """A request that is answered with a word, and counts in ``<key>n``."""
        return Request(key, (b"FCALL", f"{self.library.name}_count".encode(), b"1", key, word))

    def fail(self, key: bytes, error: bytes) -> Request:
        """A request that is answered with an error."""
        return Request(key, (b"FCALL", f"{self.library.name}_fail".encode(), b"1", key, error))

    def exchange(self, server: Server, *requests: Request, patience: float = 10) -> list[Any]:
        return self.run(server.exchange(requests, patience))

    def close(self) -> None:
        for shared in self.opened:
            self.run(shared.close())
        if self.runner is not None:

            async def tasks() -> int:
                return len(asyncio.all_tasks())

            assert self.runner.run(tasks()) == 1
            self.runner.close()
