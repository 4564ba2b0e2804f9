"""The real server of a simulation: one raw connection, a stopped clock, and a look at everything.

Nothing but the simulation uses its database, so a schedule begins with `Link.reset`.
"""

import socket
from collections.abc import Iterator
from typing import Any

import hiredis
import pytest

from conftest import Redis
from phonon.errors import DeclaredDeadError, PhononError, ServerError, StaleOperationError
from phonon.protocol.effects import Call
from phonon.protocol.library import Library, text

DATABASE = 11
CLOCK_KEY = "simulation.clock"
EPOCH_MS = 1_700_000_000_000

# The library's test clock is added to the server's, which goes on by itself. Here it stands still,
# so that a schedule is the same whenever it runs.
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

# survey(prefix of the namespace): everything about one resource, in one exchange. It uses nothing
# of the library, which may be broken on purpose.
LOOK = """
redis.register_function(NAME .. '_survey', function(keys, args)
  local base, prefix = keys[1], args[1]
  local function call(...) return redis.call(...) end
  local members = call('ZRANGE', base .. ':members', 0, -1, 'WITHSCORES')
  local running = call('HMGET', base .. ':running', 'owner', 'token')
  local unnamed = {}
  local function names(pid)
    local registry = prefix .. '{@' .. pid .. '}:holds'
    return type(redis.pcall('ZSCORE', registry, base)) == 'string'
  end
  local function check(pid)
    if not names(pid) then
      unnamed[#unnamed + 1] = pid
    end
  end
  -- What is in an heir's hands is found through it, or through who has just left it there.
  local function check_heir(heir)
    for _, pid in ipairs(call('ZRANGE', prefix .. '{*}:processes', 0, -1)) do
      if names(pid) then
        return
      end
    end
    unnamed[#unnamed + 1] = heir
  end
  for i = 1, #members, 2 do
    check(members[i])
  end
  if running[1] and string.sub(running[1], 1, 6) == 'class:' then
    check_heir(running[1])
  elseif running[1] then
    check(running[1])
  end
  local lock = call('HGET', base .. ':lock', 'pid')
  if lock then
    check(lock)
  end
  for _, holder in ipairs(call('ZRANGE', base .. ':shared', 0, -1)) do
    check(string.match(holder, '^(.*)/'))
  end
  local parked = {}
  for _, token in ipairs(call('HKEYS', base .. ':parked')) do
    for _, partial in ipairs(call('LRANGE', base .. ':parked:' .. token, 0, -1)) do
      parked[#parked + 1] = partial
    end
  end
  return {
    members, call('LRANGE', base .. ':partials', 0, -1), call('LRANGE', base .. ':batch', 0, -1),
    running[1] or '', running[2] or '', parked, unnamed,
  }
end)
"""


class Link:
    """A connection to the server, with a library of its own.

    Args:
        path: The server's unix socket.
        body: The library's Lua text; other than the shipped one if a test breaks it.
    """

    def __init__(self, path: str, body: str | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._reader = hiredis.Reader()
        self.calls = 0
        body = (text() if body is None else body) + LOOK
        self.library = Library(STOPPED_CLOCK + body, CLOCK_KEY)
        self._functions: dict[str, bytes] = {}
        self.expect("SELECT", DATABASE)
        self.expect("FUNCTION", "LOAD", "REPLACE", self.library.source)
        self.offset = 0

    def close(self) -> None:
        self.expect("FLUSHDB", "SYNC")
        self.expect("FUNCTION", "DELETE", self.library.name)
        self._socket.close()

    def send(self, *words: Any) -> Any:
        """A command; the result is its reply, errors included."""
        return self.send_all([words])[0]

    def send_all(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Commands in one exchange."""
        self.calls += len(commands)
        self._socket.sendall(b"".join(hiredis.pack_command(words) for words in commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(self._socket.recv(65536))
            else:
                replies.append(reply)
        return replies

    def expect(self, *words: Any) -> Any:
        """A command that the simulation itself needs."""
        reply = self.send(*words)
        if isinstance(reply, Exception):
            raise reply
        return reply

    @property
    def now(self) -> int:
        return EPOCH_MS + self.offset

    def reset(self) -> None:
        """An empty server, at the beginning of time."""
        self.offset = 0
        self.send_all([("FLUSHDB", "SYNC"), ("SET", CLOCK_KEY, 0)])

    def advance(self, ms: int) -> None:
        self.offset += ms
        self.expect("SET", CLOCK_KEY, self.offset)

    def function(self, step: str) -> bytes:
        found = self._functions.get(step)
        if found is None:
            found = self._functions[step] = self.library.function(step)
        return found

    def call(self, call: Call) -> Any:
        """Deliver a call of a flow; the result is its answer, or the error that the flow gets.

        A millisecond passes with each.
        """
        self.offset += 1
        if not call.step:
            reply = self.send(*call.args)
        else:
            keys = (1, call.base) if call.registry is None else (2, call.base, call.registry)
            first, *rest = call.args
            args = (first, call.number, *rest) if call.numbered else call.args
            _, reply = self.send_all(
                [
                    ("SET", CLOCK_KEY, self.offset),
                    ("FCALL", self.function(call.step), *keys, *args),
                ]
            )
        return error_of(str(reply)) if isinstance(reply, Exception) else reply

    def look(self, base: bytes, prefix: bytes) -> Any:
        return self.expect("FCALL", self.function("survey"), 1, base, prefix)


def error_of(text: str) -> PhononError:
    """What a driver makes of a server's error."""
    if "PHONONDEAD" in text:
        return DeclaredDeadError(text)
    if "PHONONSTALE" in text:
        return StaleOperationError(text)
    return ServerError(text)


@pytest.fixture(name="link")
def link_fixture(server: Redis) -> Iterator[Link]:
    """The shipped library on the common server."""
    link = Link(server.socket)
    yield link
    link.close()
