"""Calls the server's steps one by one, with a clock that stands still unless a test moves it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import redis

from conftest import Redis
from phonon.protocol.compaction import digest
from phonon.protocol.keys import Keys
from phonon.protocol.library import Library, default, text

LEASE = 30_000

# The library's test clock is added to the server's, which goes on while a test runs. Here it
# stands still, so that every time in every answer can be foretold, on however slow a machine.
STOPPED_CLOCK = """
local function call(command, ...)
  if command == 'TIME' then
    return { '1700000000', '0' }
  end
  return redis.call(command, ...)
end
local function pcall(...) return redis.pcall(...) end
local function error_reply(text) return redis.error_reply(text) end
local function sha1hex(text) return redis.sha1hex(text) end
local redis = {
  register_function = redis.register_function, call = call, pcall = pcall,
  error_reply = error_reply, sha1hex = sha1hex,
}
"""
EPOCH_MS = 1_700_000_000_000

# Everything there is to know about some keys, in a form that two looks can be compared in.
DUMP = """
local read = {
  string = function(key) return redis.call('GET', key) end,
  hash = function(key) return redis.call('HGETALL', key) end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
}
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  local kind = redis.call('TYPE', key).ok
  found[#found + 1] = { key, redis.call('PEXPIRETIME', key), kind, read[kind](key) }
end
return found
"""

Answer = list[Any]


class Key(NamedTuple):
    """What a key holds, and when it expires (milliseconds since the epoch, or -1)."""

    content: Any
    expires: int


def settled(dump: dict[str, Key]) -> dict[str, Key]:
    """What a call has changed that came again: anything but the time when the memory expires."""
    return {
        name: key._replace(expires=0) if name == "{=x}:memory" else key
        for name, key in dump.items()
    }


def _content(kind: bytes, raw: Any) -> Any:
    if kind == b"hash":
        return dict(zip(raw[::2], raw[1::2], strict=True))
    if kind == b"zset":
        return {member: int(score) for member, score in zip(raw[::2], raw[1::2], strict=True)}
    return set(raw) if kind == b"set" else raw


class Command(NamedTuple):
    """A step with its operation number: what is sent, and sent again if no answer comes."""

    number: int
    step: str
    args: tuple[Any, ...]


class Lab:
    """A library of its own on the common server, in the namespace of one test.

    Args:
        server: The server.
        namespace: Nobody else's.
        body: The library's Lua text; other than the shipped one if a test breaks it.
        clock: Whether the library gets the clock that a test can move, or the server's.
        db: The database.
    """

    def __init__(
        self,
        server: Redis,
        namespace: str,
        body: str | None = None,
        *,
        clock: bool = True,
        db: int = 1,
    ) -> None:
        self.client = server.client(db)
        self.namespace = namespace
        self.keys = Keys(namespace)
        # Not behind the namespace's colon: it is not a part of what a test looks at.
        self.clock_key = f"{namespace}.clock"
        body = text() if body is None else body
        self.library = Library(STOPPED_CLOCK + body, self.clock_key) if clock else Library(body)
        self.client.function_load(self.library.source, replace=True)
        self.offset = 0
        if clock:
            self.move_to(0)

    def close(self) -> None:
        if self.library.name != default().name:  # that one is everybody's
            self.client.function_delete(self.library.name)
        self.client.delete(self.clock_key)
        self.client.close()

    @property
    def now(self) -> int:
        """The library's clock, milliseconds since the epoch."""
        return EPOCH_MS + self.offset

    def move_to(self, offset_ms: int) -> None:
        self.offset = offset_ms
        self.client.set(self.clock_key, offset_ms)

    def advance(self, ms: int) -> None:
        self.move_to(self.offset + ms)

    def process(self, name: str, resource: str = "x", *, colocated: bool = True) -> "Process":
        return Process(self, name, resource, self.keys, colocated=colocated)

    def call(self, step: str, *words: Any) -> Any:
        return self.client.execute_command("FCALL", self.library.function(step), *words)  # type: ignore[no-untyped-call]

    def dump(self, namespace: str | None = None) -> dict[str, Key]:
        """All keys of a namespace, by their names behind it."""
        prefix = f"{namespace or self.namespace}:"
        found: Any = self.client.eval(DUMP, 0, f"{prefix}*")
        return {
            key.decode().removeprefix(prefix): Key(_content(kind, raw), expires)
            for key, expires, kind, raw in found
        }

    def beat(
        self, name: str, ttl_ms: int = LEASE, epoch: bytes = b"", *, outage: bool = False
    ) -> Answer:
        """The first beat; or, with the epoch that the last one answered, a later one."""
        return list(self.call("beat", 1, self.keys.processes, name, ttl_ms, epoch, int(outage)))

    def tombstone(self, process: "Process") -> None:
        """Bury a process of which nothing is left."""
        assert self.call("bury", 1, process.registry, 3_600_000) == 1

    def alive(self) -> Answer:
        return list(self.call("alive", 1, self.keys.processes))


class Process:
    """One process's side of one resource: it numbers its operations, and keeps its registry in a
    cluster, where a step cannot.

    Args:
        lab: Where it calls.
        name: Its id.
        resource: The resource.
        keys: The keys of its namespace.
        colocated: Whether a step may write the registry.
    """

    def __init__(
        self, lab: Lab, name: str, resource: str, keys: Keys, *, colocated: bool = True
    ) -> None:
        self.lab = lab
        self.id = name.encode()
        self.base = keys.base(resource)
        self.registry = keys.registry(self.id)
        self.colocated = colocated
        self.where = (2, self.base, self.registry) if colocated else (1, self.base)
        self.number = 0
        self.sent = Command(0, "", ())

    def command(self, step: str, *args: Any) -> Command:
        self.number += 1
        self.sent = Command(self.number, step, args)
        return self.sent

    def send(self, command: Command) -> Answer:
        """Nothing but the call."""
        number, step, args = command
        return list(self.lab.call(step, *self.where, self.id, number, *args))

    def do(self, step: str, *args: Any) -> Answer:
        """What a flow does: the call, and in a cluster the registry before and after it."""
        self.hold(lock=step == "lock")
        return self.let_go(self.send(self.command(step, *args)))

    def again(self) -> Answer:
        """The last call once more, as if its reply had been lost."""
        return self.send(self.sent)

    def hold(self, *, lock: bool = False) -> None:
        if not self.colocated:
            self.lab.call("hold", 1, self.registry, self.base, self.id, int(lock))

    def let_go(self, answer: Answer) -> Answer:
        if not self.colocated and answer[1] == 1:
            self.lab.client.zrem(self.registry, self.base)
        return answer

    def ask(self, step: str, *args: Any) -> Any:
        """A call that is not numbered."""
        return self.lab.call(step, 1, self.base, self.id, *args)

    def holds(self) -> bool:
        """Whether its registry names the resource."""
        return self.lab.client.zscore(self.registry, self.base) is not None

    def join(self, lease: int = LEASE, **put_back: int) -> Answer:
        return self.do("join", lease, *(word for pair in put_back.items() for word in pair))

    def modify(self, times: int = 1) -> Answer:
        return self.do("modify", LEASE, times)

    def append(self, partial: bytes) -> Answer:
        return self.do("append", LEASE, partial)

    def compact(self, first: int, partials: Sequence[bytes], *merged: bytes) -> Answer:
        return self.do("compact", first, len(partials), digest(partials), *merged)

    def leave(self, partial: bytes = b"", *, force: bool = False) -> Answer:
        return self.do("leave", int(force), LEASE, partial)

    def complete(self, token: int) -> Answer:
        return self.do("complete", token)

    def fail(self, token: int, most: int = 3, error: str = "boom", delay: int = 500) -> Answer:
        return self.do("fail", token, error, delay, most)

    def resume(self, token: int) -> Answer:
        return self.do("resume", token)

    def recover(self, dead: "Process", *, died: bool = True) -> Answer:
        registry = (dead.registry,) if self.colocated else ()
        answer = self.do("recover", dead.id, int(died), LEASE, *registry)
        if not self.colocated:
            self.lab.client.zrem(dead.registry, self.base)
        return answer

    def entrust(self, token: int, heir: "Process") -> Answer:
        heir.enter()
        return self.do("entrust", token, heir.id)

    def enter(self) -> None:
        """Write its registry, as somebody else does for an heir."""
        self.lab.call("hold", 1, self.registry, self.base, self.id)

    def replay(self, token: int) -> Answer:
        return self.do("replay", token)

    def discard(self, token: int) -> Answer:
        return self.do("discard", token)

    def fetch(self, token: int, first: int, last: int) -> Answer:
        return list(self.ask("fetch", token, first, last))

    def meet(self, parties: int) -> Answer:
        return self.do("meet", LEASE, parties)

    def holder(self, name: int | str) -> bytes:
        """What an acquisition is called: a number, with an "s" behind it if it is shared."""
        return b"%s/%s" % (self.id, str(name).encode())

    def lock(self, name: int | str = 1, *, queue: bool = False) -> Answer:
        return self.do("lock", self.holder(name), LEASE, int(queue), b"main")

    def unlock(self, name: int | str = 1) -> Answer:
        return self.do("unlock", self.holder(name))

    def renew(self, *names: int | str) -> Answer:
        words = [word for name in names for word in (self.holder(name), LEASE)]
        return list(self.ask("renew", LEASE, *words))

    def count(self) -> int:
        return int(self.ask("count"))

    def batch(self, partial: bytes = b"data") -> int:
        """Get a batch of our own to execute; the result is its token."""
        kind, _, token, *_ = self.leave(partial)
        assert kind == b"run", kind
        return int(token)


@pytest.fixture(name="lab")
def lab_fixture(server: Redis, namespace: str) -> Iterator[Lab]:
    lab = Lab(server, namespace)
    yield lab
    lab.close()


def refused(kind: str) -> "pytest.RaisesExc[redis.ResponseError]":
    """The server must answer with this error."""
    return pytest.raises(redis.ResponseError, match=kind)
