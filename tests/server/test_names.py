"""Any text is the name of a resource or a namespace: no two share a key, and a resource's keys
share a slot."""

import contextlib
import itertools
import random
import socket
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot
from scenarios import SCENARIOS, prepare
from steps import LEASE, Lab, lab_fixture, refused  # noqa: F401 - the fixture is found by its name

from conftest import Redis, wait_until
from phonon.protocol.keys import TYPES, Keys

SPECIAL = [
    "",
    "}",
    "{",
    "{}",
    "{a}",
    "a}b{c",
    "}{",
    "\n",
    "\0",
    " ",
    "ключ",
    "e\u0301",
    "\u00e9",
    "\ud800",
    "\udcff",
    "\U0010ffff",
    "%7D",
    "%7d",
    "%",
    "%%",
    "%25",
    "%257D",
    "%2}",
    "=",
    "=x",
    ":",
    "x",
    "x}",
    "x:members",
    "x}:members",
    "x}:parked:1",
    "{*}:processes",
    "{@a}:holds",
    "*",
    "?[a]\\",
    "x" * 10_000,
    "}" * 10_000,
    "ж" * 5_000,
]
NAMESPACES = [
    "",
    "phonon",
    "phonon:",
    "phonon:{=x}",
    "phonon:{=",
    "a:b",
    "a",
    "{",
    "}",
    "{}",
    "{*}",
    "{a}b",
    "%",
    "%7B",
    "%7D",
    "%257B",
    "{*}:processes",
    "ключ",
    "\ud800",
    "\n",
]
SUFFIXES = [*TYPES, b":parked:1700000000000000", b":wake:a/1", b":wake:}:members/1"]


def random_names(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)  # noqa: S311 - repeatable, no secret
    planes = (0x80, 0x800, 0x10000, 0x110000)
    names: dict[str, None] = {}
    while len(names) < count:
        plane = rng.choice(planes)
        names["".join(chr(rng.randrange(plane)) for _ in range(rng.randrange(20)))] = None
    return list(names)


def keys_of(base: bytes) -> Iterator[bytes]:
    return (base + suffix for suffix in SUFFIXES)


def tag(key: bytes) -> bytes:
    """The part of a key that decides its slot, by the rule of the Redis Cluster specification."""
    opening = key.find(b"{")
    closing = key.find(b"}", opening + 1)
    assert opening >= 0
    assert closing > opening + 1, f"{key!r} has no tag, or an empty one"
    return key[opening + 1 : closing]


def assert_distinct(keys: Iterable[bytes]) -> int:
    seen: set[bytes] = set()
    for key in keys:
        assert key not in seen, key
        seen.add(key)
    return len(seen)


def assert_in_one_slot(base: bytes) -> None:
    assert {tag(key) for key in keys_of(base)} == {tag(base + b":")}
    assert len({key_slot(key) for key in keys_of(base)}) == 1


@pytest.mark.parametrize("name", SPECIAL, ids=lambda name: ascii(name[:20]))
def test_a_special_name_comes_back_and_stays_in_its_slot(name: str) -> None:
    keys = Keys("phonon")
    assert keys.resource(keys.base(name)) == name
    assert_in_one_slot(keys.base(name))


def test_ten_thousand_names_share_no_key_and_stay_in_their_slots() -> None:
    keys = Keys("phonon")
    names = [*dict.fromkeys([*SPECIAL, *random_names(10_000, 1)])]
    for name in names:
        base = keys.base(name)
        assert keys.resource(base) == name
        assert_in_one_slot(base)
    count = assert_distinct(key for name in names for key in keys_of(keys.base(name)))
    assert count == len(names) * len(SUFFIXES) > 10_000 * len(TYPES)


def test_all_short_names_of_the_dangerous_letters() -> None:
    keys = Keys("phonon")
    names = ["".join(w) for n in range(6) for w in itertools.product("%7D2}{", repeat=n)]
    assert_distinct(keys.base(name) for name in names)
    for name in names:
        assert keys.resource(keys.base(name)) == name
        assert tag(keys.base(name))


def test_namespaces_processes_and_resources_share_no_key() -> None:
    names = [*dict.fromkeys([*SPECIAL[:-3], *random_names(200, 2)])]
    processes = [b"a", b"b", b"0123456789abcdef0123456789abcdef"]

    def everything() -> Iterator[bytes]:
        for namespace in NAMESPACES:
            keys = Keys(namespace)
            yield keys.processes
            for process in processes:
                yield keys.registry(process)
                yield keys.card(process)
            for name in names:
                yield from keys_of(keys.base(name))

    count = assert_distinct(everything())
    assert count == len(NAMESPACES) * (1 + 2 * len(processes) + len(names) * len(SUFFIXES))


@pytest.mark.parametrize("namespace", NAMESPACES, ids=ascii)
def test_every_namespace_leaves_the_tag_to_the_resource(namespace: str) -> None:
    keys = Keys(namespace)
    assert keys.namespace == namespace
    for name in SPECIAL:
        base = keys.base(name)
        assert keys.resource(base) == name
        assert_in_one_slot(base)
        assert tag(base) == tag(Keys("phonon").base(name)), "the slot is the resource's alone"
    assert tag(keys.processes) == b"*"
    assert tag(keys.registry(b"a")) == tag(keys.card(b"a")) == b"@a"


ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=20)
DANGEROUS = st.text("%7BD25{}:=@*a", max_size=12)
NAMES = ANY_TEXT | DANGEROUS


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(NAMES, NAMES, NAMES, NAMES)
def test_two_pairs_of_namespace_and_name_are_one_only_if_they_are_equal(
    namespace: str, name: str, other_namespace: str, other: str
) -> None:
    base = Keys(namespace).base(name)
    assert Keys(namespace).resource(base) == name
    assert_in_one_slot(base)
    for ns, n in itertools.product({namespace, other_namespace}, {name, other}):
        assert (Keys(ns).base(n) == base) == ((ns, n) == (namespace, name))


@pytest.mark.parametrize("name", SPECIAL, ids=lambda name: ascii(name[:20]))
def test_a_session_of_a_special_name(lab: Lab, name: str) -> None:
    a, b = lab.process("a", name), lab.process("b", name)
    bystander = lab.process("a", name + "!")
    bystander.append(b"not theirs")
    a.append(b"1")
    b.append(b"2")
    a.leave()
    token = b.leave()[2]
    b.fail(token, most=1)
    assert b.lock()[0] == b"granted"
    base = a.base
    found = {key for key in lab.client.scan_iter(b"*", 1_000) if key.startswith(base + b":")}
    parked = b"%s:parked:%d" % (base, token)
    assert found == {base + b":memory", base + b":lock", base + b":parked", parked}
    assert bystander.count() == 1
    assert bystander.leave()[-1] == [b"not theirs"]


def free_port() -> int:
    """A port that was free a moment ago, and that the kernel gives to nobody by itself."""
    while True:
        port = random.randrange(10_000, 12_000)  # noqa: S311 - no secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # noqa: S104 - as the server will
            return port


def test_the_steps_never_leave_the_slot(namespace: str) -> None:
    """A server in cluster mode refuses a step that touches a key of another slot."""
    server = Redis("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        cluster = server.client(db=0)
        cluster.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)  # type: ignore[no-untyped-call]
        wait_until(lambda: b"cluster_state:ok" in cluster.execute_command("CLUSTER", "INFO"))  # type: ignore[no-untyped-call]
        lab = Lab(server, namespace, clock=False, db=0)
        for number, name in enumerate(SPECIAL):
            for scenario in list(SCENARIOS)[number % 3 :: 3] if number else SCENARIOS:
                process, step, args = prepare(lab, scenario, resource=name, colocated=False)
                answer = process.do(step, *args)
                assert f"{step} {answer[0].decode()}" == scenario.partition(" (")[0]
                slot = cluster.execute_command("CLUSTER", "KEYSLOT", process.base)  # type: ignore[no-untyped-call]
                assert slot == key_slot(process.base)
                cluster.flushall()
        with refused("same slot"):
            lab.process("a", "x").join()  # its registry is in another one
        lab.close()
        cluster.close()
    finally:
        server.close()
