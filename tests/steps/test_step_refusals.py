"""A server that is full, or that forbids commands."""

import re

import pytest
import redis

from phonon._protocol import library
from phonon._protocol.answers import Reply
from steps.lab import Lab
from support import operations as ops
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


def test_each_command_that_is_forbidden_is_named(own: Lab) -> None:
    commands = library.default().commands
    assert {"HSET", "ZADD", "RPUSH"} <= set(commands)
    assert own.ask("rights", "BLMPOP") == []
    admin = own.client
    socket = admin.connection_pool.connection_kwargs["path"]
    for command in [*commands, "BLMPOP"]:
        forbidden = f"-{command.lower()}"
        admin.execute_command(  # type: ignore[no-untyped-call]
            "ACL", "SETUSER", "u", "reset", "on", ">p", "~*", "&*", "+@all", forbidden
        )
        with redis.Redis(unix_socket_path=socket, db=1, username="u", password="p") as client:  # noqa: S106
            own.client = client
            assert own.ask("rights", "BLMPOP") == [command.encode()]
    own.client = admin
    assert own.dump() == {}


def test_all_commands_of_the_steps_are_asked_about() -> None:
    used = set(re.findall(r"\bcall\('([A-Z]+)'", library.text()))
    asked = {command.partition("|")[0] for command in library.default().commands}
    assert used - {c.partition("|")[0] for c in library.of_operators()} <= asked
