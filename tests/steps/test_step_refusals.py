"""A server that is full, or that forbids commands."""

import pytest
import redis

from phonon._protocol import operations as ops
from phonon._protocol.answers import Reply
from steps.lab import Lab
from support.world import Redis


@pytest.fixture(name="own")
def own_fixture(own_server: Redis) -> Lab:
    return Lab(own_server, "own", clock=False)


def test_a_full_server_refuses_and_says_so_and_still_frees(own: Lab) -> None:
    a = own.process("a")
    token = a.batch(b"1", b"2")
    a.append(b"3", b"y")
    own.client.config_set("maxmemory", 1)
    mixed = [ops.append(0, b"x", b"4"), ops.complete(0, b"x", token), ops.leave(0, b"y")]
    for operation in mixed:
        a.lane.enqueue(operation)
    call = a.lane.next_call()
    assert call is not None
    with pytest.raises(redis.ResponseError, match=r"OOM|out of memory|maxmemory"):
        a.send(call)
    error = MemoryError()
    a.lane.refuse(error)
    told = []
    while (call := a.lane.next_call()) is not None:
        told += [(o.code.name, answer) for o, answer in a.lane.receive(a.send(call))]
    assert told[:2] == [("APPEND", error), ("COMPLETE", Reply.DONE)]
    assert told[2][1][-1] == [b"3"]
    assert a.complete(told[2][1][3], b"y") == Reply.DONE
    assert a.close() == Reply.CLOSED
    own.client.config_set("maxmemory", 0)
    assert own.data() == {}


#: What steps use; each of them is forbidden once.
COMMANDS = [
    "DEL",
    "HSETNX",
    "HSET",
    "HINCRBY",
    "HGET",
    "HMGET",
    "HGETALL",
    "HKEYS",
    "HLEN",
    "HEXISTS",
    "HDEL",
    "RPUSH",
    "LLEN",
    "LINDEX",
    "LPOS",
    "LRANGE",
    "LTRIM",
    "LREM",
    "RENAME",
    "EXISTS",
    "RPOP",
    "ZADD",
    "ZCARD",
    "ZCOUNT",
    "ZSCORE",
    "ZRANGE",
    "ZRANGEBYSCORE",
    "ZREM",
    "SADD",
    "SCARD",
    "SMEMBERS",
    "SREM",
    "SET",
    "GET",
    "PEXPIRE",
    "PERSIST",
    "SRANDMEMBER",
    "SETNX",
    "TIME",
]


def test_probe_finds_each_command_that_is_forbidden(own: Lab) -> None:
    assert own.ask("probe") == 1
    used = {word for word in COMMANDS if f"call('{word}'" in own.library.source}
    assert used == set(COMMANDS)
    admin = own.client
    socket = admin.connection_pool.connection_kwargs["path"]
    for command in COMMANDS:
        admin.execute_command(  # type: ignore[no-untyped-call]
            "ACL", "SETUSER", "u", "reset", "on", ">p", "~*", "&*", "+@all", f"-{command.lower()}"
        )
        with redis.Redis(unix_socket_path=socket, db=1, username="u", password="p") as client:  # noqa: S106
            own.client = client
            with pytest.raises(redis.RedisError, match=r"(?i)permission|acl"):
                own.ask("probe")
    own.client = admin
    assert own.dump().keys() <= {"probe", "probe:2"}


def test_probe_uses_all_that_the_steps_use(own: Lab) -> None:
    import re  # noqa: PLC0415

    text = own.library.source
    probe = text.partition("plain('probe'")[2].partition("\nend)")[0]
    used = set(re.findall(r"call\('([A-Z]+)'", text.replace(probe, "")))
    # TYPE only makes a message better, where it is permitted.
    assert used - {"TIME", "TYPE"} <= set(re.findall(r"call\('([A-Z]+)'", probe))
