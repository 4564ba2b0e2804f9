"""Any text names a resource or a namespace: no two share a key; a partition is one slot."""

import contextlib
import itertools
import random
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from phonon._protocol.answers import Reply
from phonon._protocol.partitions import Partitions, decode, encode_resource, encode_semaphore
from steps.lab import Lab, lab_fixture  # noqa: F401 - the fixture is found by its name
from support import operations as ops
from support.world import Redis, wait_until

SPECIAL = [
    *("", "}", "{", "{}", "{a}", "a}b{c", "}{", "\n", "\0", "\0r", "\0s", "\0rx", "\0\0", " "),
    *("ключ", "e\u0301", "\u00e9", "\ud800", "\udcff", "\U0010ffff", "%7D", "%", "%25", "%2}"),
    *("=", ":", "x", "x}", "x:members", "members:x", "1:x", "*", "?[a]\\", "x" * 10_000),
]
NAMESPACES = [
    *(
        "",
        "phonon",
        "phonon/0",
        "phonon/1",
        "phonon%2F0",
        "a/3",
        "a",
        "a:b",
        "{",
        "}",
        "{}",
        "{a}b",
    ),
    *("%", "%7B", "%257B", "/", "//", "ключ", "\ud800", "\n"),
]


@pytest.mark.parametrize("name", SPECIAL, ids=lambda name: ascii(name[:20]))
def test_a_special_name_comes_back(name: str) -> None:
    assert decode(encode_resource(name)) == name
    assert decode(encode_semaphore(name)) == name


def test_what_is_no_text_is_shown() -> None:
    assert decode(b"\xff") == "\\xff"


def test_no_two_names_meet() -> None:
    short = ["".join(w) for n in range(5) for w in itertools.product("\0rsx", repeat=n)]
    names = [*dict.fromkeys([*SPECIAL, *short])]
    encoded = [*map(encode_resource, names), *map(encode_semaphore, names)]
    assert len(set(encoded)) == 2 * len(names)


ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=20)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(ANY_TEXT, ANY_TEXT)
def test_any_two_names_are_one_only_if_they_are_equal(one: str, other: str) -> None:
    assert decode(encode_resource(one)) == one
    assert (encode_resource(one) == encode_resource(other)) == (one == other)
    assert encode_resource(one) != encode_semaphore(other)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 100, 1024])
def test_partitions_are_spread_evenly_over_the_slots(count: int) -> None:
    partitions = Partitions("phonon", count)
    slots = [key_slot(prefix + b"members:x") for prefix in partitions.prefixes]
    assert [slot * count // 16384 for slot in slots] == list(range(count))
    for prefix in partitions.prefixes:
        assert key_slot(prefix) == key_slot(prefix + b"members:{a}}:") == key_slot(prefix + b"}{")


def test_no_two_namespaces_share_a_prefix_and_none_begins_with_another() -> None:
    prefixes = []
    for namespace in NAMESPACES:
        partitions = Partitions(namespace, 16)
        prefixes += [partitions.prefix, *partitions.prefixes]
    assert len(set(prefixes)) == len(prefixes)
    ordered = sorted(prefixes)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


def test_namespaces_of_other_sizes_share_prefixes_only_with_themselves() -> None:
    small, large = Partitions("a", 4), Partitions("a", 64)
    assert small.prefix == large.prefix
    other = Partitions("a/0", 4)
    assert not {*small.prefixes, *large.prefixes} & {*other.prefixes, other.prefix}


def test_names_are_spread_over_the_partitions() -> None:
    partitions = Partitions("phonon")
    found = [partitions.of(encode_resource(f"user:{i}")) for i in range(16_000)]
    assert all(700 < found.count(p) < 1300 for p in range(16))


@pytest.mark.parametrize("name", SPECIAL, ids=lambda name: ascii(name[:20]))
def test_a_session_of_a_special_name(lab: Lab, name: str) -> None:
    x = encode_resource(name)
    bystander = encode_resource(name + "!")
    a = lab.process("a")
    a.append(b"not theirs", bystander)
    a.append(b"1", x)
    token = a.do(ops.leave(0, x))[3]
    assert a.do(ops.fail(0, x, token, b"e", 0, 1)) == Reply.PARKED
    assert a.do(ops.lock(0, x, "a/1", queue=False))[0] == Reply.GRANTED
    every: Any = lab.client.keys()
    found = [k for k in every if k.startswith(lab.prefix) and k.endswith(x)]
    tails = {key.removeprefix(lab.prefix).removesuffix(x) for key in found if x}
    assert tails <= {b"lock:", b"parked:", b"dead:%d:" % token} or len(x) < 3
    assert lab.client.exists(lab.prefix + b"dead:%d:" % token + x)
    assert a.do(ops.discard(0, x, token)) == Reply.DISCARDED
    a.do(ops.unlock(0, x, "a/1"))
    assert a.leave(resource=bystander)[-1] == [b"not theirs"]


def free_port() -> int:
    while True:
        port = random.randrange(10_000, 12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # noqa: S104 - as the server will
            return port


def test_the_steps_never_leave_the_slot() -> None:
    """A server in cluster mode refuses a step that touches a key of another slot."""
    server = Redis("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        cluster = server.client(db=0)
        cluster.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)  # type: ignore[no-untyped-call]
        wait_until(lambda: b"cluster_state:ok" in cluster.execute_command("CLUSTER", "INFO"))  # type: ignore[no-untyped-call]
        lab = Lab(server, "}{", clock=False, db=0)
        lab.whole("list", "a", 1000, 4, "card", 0)
        for name in map(encode_resource, SPECIAL):
            a, b = lab.process("a"), lab.process("b")
            a.append(b"1", name)
            b.do(ops.meet(0, name, 2, b"b"))
            for process in (a, b):
                process.do(ops.lock(0, name, f"{process.id.decode()}/1", queue=True, lease_ms=5000))
            b.do(ops.leave(0, name, b"2"))
            a.do(ops.unlock(0, name, "a/1"))
            batches = b.reap(a)[3]
            assert b.do(ops.fail(0, name, batches[1], b"e", 0, 1)) == Reply.PARKED
            token = b.do(ops.replay(0, name, batches[1]))[3]
            assert b.do(ops.hand_off(0, name, token, b"class:C")) == Reply.HANDED
            assert b.reap(b"class:C")[3][0] == name
            assert b.do(ops.complete(0, name, token)) == Reply.DONE
            cluster.flushall()
        with pytest.raises(Exception, match=r"(?i)slot"):
            lab.function("count", b"", b"x")
            lab.client.eval("return redis.call('MGET', 'a', 'b')", 0)
        lab.client.close()
        cluster.close()
    finally:
        server.close()
