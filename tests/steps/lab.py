"""Calls the server's steps one by one through real lanes, with a clock that a test moves."""

import itertools
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import redis

from phonon._protocol import lane as shipped_lane
from phonon._protocol.answers import Reply
from phonon._protocol.library import Library, text
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import Partitions
from support import operations as ops
from support.world import Redis

EPOCH_US = 1_700_000_000_000_000
BATCH_SCORE, LEFT_SCORE = 2**50, 2**52
WEEK_MS = 604_800_000

# Everything there is to know about some keys, in a form that two looks can be compared in.
DUMP = """
local read = {
  string = function(key) return redis.call('GET', key) end,
  hash = function(key) return redis.call('HGETALL', key) end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
}
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  local kind = redis.call('TYPE', key).ok
  found[#found + 1] = { key, redis.call('PTTL', key), kind, read[kind](key) }
end
return found
"""


class Violation(AssertionError):  # noqa: N818 - of a guarantee
    """The server did what it must not do."""


def _content(kind: bytes, raw: Any) -> Any:
    if kind == b"hash":
        return dict(zip(raw[::2], raw[1::2], strict=True))
    if kind == b"zset":
        return {member: float(score) for member, score in zip(raw[::2], raw[1::2], strict=True)}
    return set(raw) if kind == b"set" else raw


def make_library(clock_key: str, body: str | None = None) -> Library:
    """Return the library with a test clock; with another text if a test breaks it."""
    return Library(text() if body is None else body, clock_key)


class Lab:
    """One partition of one namespace, on a server that may be shared with other tests.

    Args:
        server: The server.
        namespace: Nobody else's.
        library: A library that is loaded already; otherwise one is made, loaded and removed.
        lanes: The module that has `Lane`: another than the shipped one if a test breaks it.
        db: The database.
        clock: Whether the library gets the clock that a test moves.
    """

    def __init__(
        self,
        server: Redis,
        namespace: str,
        library: Library | None = None,
        *,
        lanes: Any = shipped_lane,
        db: int = 1,
        clock: bool = True,
    ) -> None:
        self.client = server.client(db)
        self.namespace = namespace
        self.lanes = lanes
        self.own = library is None
        self.clock_key = f"{namespace}.clock"
        if library is None:
            library = make_library(self.clock_key) if clock else Library(text())
            self.client.function_load(library.source, replace=True)
        elif library.source.find("TEST_CLOCK = '") > 0:
            self.clock_key = library.source.partition("TEST_CLOCK = '")[2].partition("'")[0]
        self.library = library
        self.partitions = Partitions(namespace, 4)
        self.prefix = self.partitions.prefixes[0]
        self.clock = clock
        self.now = EPOCH_US
        self.set_clock(EPOCH_US)

    def close(self) -> None:
        # By prefix: other tests use the server at the same time.
        for prefix in (*self.partitions.prefixes, self.partitions.prefix):
            keys: Any = [k for k in self.client.scan_iter(count=1000) if k.startswith(prefix)]
            if keys:
                self.client.delete(*keys)
        if self.own and self.clock:
            self.client.function_delete(self.library.name)
            self.client.delete(self.clock_key)
        self.client.close()

    def set_clock(self, micros: int) -> None:
        self.now = micros
        if self.clock:
            self.client.set(self.clock_key, micros)

    def advance(self, ms: float) -> None:
        self.set_clock(self.now + int(ms * 1000))

    @property
    def now_ms(self) -> int:
        return self.now // 1000

    def function(self, name: str, key: bytes, *words: Any) -> Any:
        name_ = self.library.function(name)
        return self.client.execute_command("FCALL", name_, 1, key, *words)  # type: ignore[no-untyped-call]

    def ask(self, name: str, *words: Any) -> Any:
        """Call a function of the partition, outside of lanes."""
        return self.function(name, self.prefix, *words)

    def whole(self, name: str, *words: Any) -> Any:
        """Call a function of the namespace."""
        return self.function(name, self.partitions.prefix, *words)

    def process(self, name: str) -> "Proc":
        return Proc(self, name)

    def key(self, suffix: str | bytes) -> bytes:
        return self.prefix + (suffix.encode() if isinstance(suffix, str) else suffix)

    def dump(self, prefix: bytes | None = None) -> dict[str, Any]:
        """All keys of the partition by their names behind its prefix, without times to live."""
        return {name: content for name, (content, _) in self.dump_with_ttl(prefix).items()}

    def dump_with_ttl(self, prefix: bytes | None = None) -> dict[str, tuple[Any, int]]:
        prefix = self.prefix if prefix is None else prefix
        pattern = b"".join(b"\\" + bytes([c]) if c in b"*?[]\\" else bytes([c]) for c in prefix)
        found: Any = self.client.eval(DUMP, 0, pattern + b"*")
        return {
            key.removeprefix(prefix).decode("utf-8", "surrogateescape"): (_content(kind, raw), ttl)
            for key, ttl, kind, raw in found
        }

    def data(self) -> dict[str, Any]:
        """The partition's keys without books of lanes: lanes, their markers, the last token."""
        return {
            name: content
            for name, content in self.dump().items()
            if not name.startswith("lane") and name != "token"
        }

    def registry(self, name: str) -> dict[bytes, float]:
        found: dict[bytes, float] = self.dump().get(f"registry:{name}", {})
        return found


class Proc:
    """One process's side of the partition: a real lane, and what was sent, to be sent again."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.id = name.encode()
        number, partitions = lab.ask("open", name, 4)
        assert partitions == 4
        self.lane = lab.lanes.Lane(0, self.id, number)
        self.sent: list[Any] = []

    def send(self, call: Any) -> Any:
        """Nothing but the call."""
        self.sent.append(call)
        return self.send_raw(call)

    def send_raw(self, call: Any) -> Any:
        self.lab.advance(0.01)  # no two calls at the same time, so stamps differ
        name = "apply_free" if call.frees else "apply"
        return self.lab.ask(name, *call.arguments)

    def answers(self, *operations: Operation) -> list[Any]:
        """Send operations, in as many calls as the lane makes of them."""
        for operation in operations:
            self.lane.enqueue(operation)
        told: list[Any] = []
        for calls in itertools.count():
            call = self.lane.next_call()
            if call is None:
                break
            if calls > 1000:
                raise Violation("the lane sends without end")
            told += [content_of(*each) for each in self.lane.receive(self.send(call))]
        return told

    def do(self, operation: Operation) -> Any:
        (answer,) = self.answers(operation)
        return answer

    def again(self, place: int = -1) -> list[Any]:
        """An earlier call once more, as if its reply had been lost or the network had kept it."""
        return self.decode(self.send_raw(self.sent[place]))

    def decode(self, reply: Any) -> list[Any]:
        answers: list[Any] = msgpack.unpackb(reply[0], raw=True, strict_map_key=False)
        self.lab.lanes.add_contents(answers, reply[2] if len(reply) > 2 else None)
        return answers

    # -- operations, on resource "x" unless told otherwise

    def join(self, resource: bytes = b"x") -> Any:
        return self.do(ops.join(0, resource))

    def append(self, partial: bytes = b"1", resource: bytes = b"x") -> Any:
        return self.do(ops.append(0, resource, partial))

    def leave(self, partial: bytes = b"", flags: int = 0, resource: bytes = b"x") -> Any:
        return self.do(ops.leave(0, resource, partial, flags))

    def modify(self, times: int = 1, resource: bytes = b"x") -> Any:
        return self.do(ops.modify(0, resource, times))

    def meet(self, parties: int, first_id: bytes | None = None) -> Any:
        return self.do(ops.meet(0, b"x", parties, first_id or self.id))

    def complete(self, token: int, resource: bytes = b"x") -> Any:
        return self.do(ops.complete(0, resource, token))

    def fail(self, token: int, most: int = 3, error: bytes = b"boom", delay: int = 500) -> Any:
        return self.do(ops.fail(0, b"x", token, error, delay, most))

    def resume(self, token: int) -> Any:
        return self.do(ops.resume(0, b"x", token))

    def replay(self, token: int) -> Any:
        return self.do(ops.replay(0, b"x", token))

    def discard(self, token: int) -> Any:
        return self.do(ops.discard(0, b"x", token))

    def hand_off(self, token: int, queue: bytes = b"class:C") -> Any:
        return self.do(ops.hand_off(0, b"x", token, queue))

    def holder(self, name: int | str) -> str:
        return f"{self.id.decode()}/{name}"

    def lock(self, name: int | str = 1, *, queue: bool = False, lease: int = 0) -> Any:
        operation = ops.lock(0, b"x", self.holder(name), queue=queue, lease_ms=lease, thread="main")
        return self.do(operation)

    def unlock(self, name: int | str = 1) -> Any:
        return self.do(ops.unlock(0, b"x", self.holder(name)))

    def renew(self, name: int | str = 1, lease: int = 0) -> Any:
        return self.do(ops.renew(0, b"x", self.holder(name), lease))

    def reap(self, dead: "Proc | bytes", most: int = 100, *, recovers: bool = True) -> Any:
        dead = dead if isinstance(dead, bytes) else dead.id
        return self.do(ops.reap(0, dead, most, recovers=recovers))

    def close(self) -> Any:
        return self.do(ops.close(0))

    def batch(self, *partials: bytes, resource: bytes = b"x") -> int:
        """Get a batch of our own to execute; the result is its token."""
        for partial in partials[:-1]:
            self.append(partial, resource)
        answer = self.leave(partials[-1] if partials else b"data", resource=resource)
        assert answer[0] == Reply.RUN, answer
        return int(answer[3])

    def mail(self) -> list[bytes]:
        found: list[bytes] = self.lab.dump().get(f"mailbox:{self.id.decode()}", [])
        return found

    def take_mail(self) -> None:
        self.lab.client.delete(self.lab.key(b"mailbox:" + self.id))


def content_of(operation: Operation, answer: Any) -> Any:
    """An answer, with the content of the batch where that is the very partial that was sent."""
    if isinstance(answer, list) and answer[-1] is True:
        return [*answer[:-1], [operation.words[3]]]
    return answer


_names = itertools.count()


@pytest.fixture(name="lab")
def lab_fixture(server: Redis, namespace: str) -> Iterator[Lab]:
    lab = Lab(server, f"{namespace}-{next(_names)}")
    yield lab
    lab.close()


def refused(kind: str) -> "pytest.RaisesExc[redis.ResponseError]":
    """The server must answer with this error."""
    return pytest.raises(redis.ResponseError, match=kind)
