"""A real cluster: keys in many slots, slots that move, functions and primaries that are lost."""

import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
import redis

import phonon
from phonon import LruCache, Process, Update
from phonon._protocol.library import Request
from phonon._transport import sync_io
from phonon._transport.cluster import ClusterServer
from phonon._transport.steps import RoundTrip
from phonon.errors import AuthenticationError, ConnectionLostError
from support.nodes import Cluster, Node, slot_of
from support.world import is_settled, wait_until

Make = Callable[..., Process]
SECRET = "sEcReT"  # noqa: S105 - of servers that live as long as the test


@pytest.fixture
def make(cluster: Cluster, namespace: str) -> Iterator[Make]:
    """Makes processes, and stops those that the test has not stopped."""
    made: list[Process] = []

    def make_process(**options: Any) -> Process:
        if "client" not in options:
            options.setdefault("url", cluster.url)
        made.append(Process(namespace=namespace, **options))
        return made[-1]

    yield make_process
    for process in made:
        process.stop()


class Ids(Update):
    """Collects numbers, each of which is to arrive once."""

    executed: Counter[int] = Counter()  # noqa: RUF012 - for all of them

    def merge(self, other: "Ids") -> None:
        self.doc = {"ids": self.doc["ids"] + other.doc["ids"]}

    def execute(self) -> None:
        self.executed.update(self.doc["ids"])


@pytest.fixture(autouse=True)
def _nothing_executed() -> None:
    Ids.executed.clear()


def left(cluster: Cluster, namespace: str) -> set[str]:
    """Return the keys of a namespace that do not expire, except its number of partitions."""
    keys = cluster.scan(f"{{{namespace}[}}/]*", expiring=False)
    return {name for key in keys if (name := key.partition("}:")[2]) != "partitions"}


def key(process: Process, kind: str, resource: str) -> str:
    partition, name = process.engine.members.place(resource)
    prefix: bytes = process.engine.identity.partitions.prefixes[partition]
    return (prefix + kind.encode() + b":" + name).decode()


def resource_at(process: Process, wanted: Callable[[int], bool]) -> str:
    """A resource's name in a slot that is wanted."""
    names = (f"at{i}" for i in itertools.count())
    return next(name for name in names if wanted(slot(process, name)))


def slot(process: Process, resource: str) -> int:
    return slot_of(key(process, "members", resource))


def server(process: Process) -> ClusterServer:
    found = process.engine.driver.server
    assert isinstance(found, ClusterServer)
    return found


def test_long_sessions_are_compacted(make: Make, cluster: Cluster, namespace: str) -> None:
    first, second = make(), make()
    names, rounds = [f"r{i}" for i in range(12)], 100
    for number in range(rounds):
        process = (first, second)[number % 2]
        with process.batch():
            for place, name in enumerate(names):
                Ids(process, name, doc={"ids": [number * len(names) + place]})
    for name in names:
        assert first.client.llen(key(first, "partials", f"test.test.{name}")) < 64
    first.stop()
    second.stop()
    assert Ids.executed == Counter(range(rounds * len(names)))
    assert not left(cluster, namespace)


def test_references_are_counted_wherever_they_are(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    first, second = make(), make()
    mine = {f"r{i}": first.create_reference(f"r{i}") for i in range(60)}
    assert {cluster.owner(slot(first, name)).port for name in mine} == {
        node.port for node in cluster.primaries()
    }
    theirs = {name: second.create_reference(name) for name in mine}
    for name, reference in mine.items():
        assert reference.count() == 2
        assert {holder.id for holder in theirs[name].holders()} == {first.id, second.id}
        reference.increment_times_modified()
        theirs[name].increment_times_modified()
        assert reference.modified_by() == {first.id: 1, second.id: 1}
    assert set(first.get_registry()) == set(mine)
    assert not any(reference.dereference() for reference in mine.values())
    assert first.get_registry() == []
    assert all(reference.dereference() for reference in theirs.values())
    assert second.get_registry() == []
    for process in (first, second):
        process.stop()
    assert left(cluster, namespace) == set()


def test_one_of_two_that_leave_at_once_is_last(make: Make) -> None:
    first, second = make(), make()
    with ThreadPoolExecutor(2) as threads:
        for i in range(50):
            references = [p.create_reference(f"r{i}") for p in (first, second)]
            answers = threads.map(lambda reference: reference.dereference(), references)
            assert sorted(answers) == [False, True]


WAITER = """
import json, sys
from phonon import Process
with Process(url=sys.argv[1], namespace=sys.argv[2]) as process:
    for name in json.loads(sys.argv[3]):
        with process.lock(name) as lock:
            print(lock.token, flush=True)
"""


def test_waiter_in_another_process_is_woken_at_its_node(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    process = make()
    names = [resource_at(process, partial(cluster.owns, node)) for node in cluster.primaries()]
    held = [process.lock(name) for name in names]
    for lock in held:
        assert lock.acquire()
    waiter = subprocess.Popen(
        [sys.executable, "-c", WAITER, cluster.url, namespace, json.dumps(names)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(phonon.__file__).parents[1])},
    )
    assert waiter.stdout is not None
    with waiter:
        try:
            for node, lock in zip(cluster.primaries(), held, strict=True):
                wait_until(node.waiters)
                token = lock.token
                lock.release()
                # Without being woken it would ask again only after five seconds.
                assert select.select([waiter.stdout], [], [], 4)[0], "it was not woken"
                assert int(waiter.stdout.readline()) > (token or 0)
            assert waiter.wait(20) == 0
        finally:
            waiter.kill()


def test_readers_places_and_parties_in_all_parts_of_the_cluster(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    first, second = make(), make()
    for i in range(20):
        readers = [process.lock(f"r{i}", shared=True) for process in (first, second)]
        with readers[0], readers[1]:
            assert not first.lock(f"r{i}").acquire(block=False)
            assert {holder.id for holder in readers[0].holders()} == {first.id, second.id}
            assert f"r{i}" in second.get_registry()
        places = [process.semaphore(f"s{i}", 2) for process in (first, second)]
        with places[0], places[1]:
            assert not second.semaphore(f"s{i}", 2).acquire(block=False)
        parts = [first.create_reference(f"p{i}", parties=2)]
        assert not parts[0].dereference()
        parts.append(second.create_reference(f"p{i}", parties=2))
        assert parts[1].wait(timeout=20)
        assert parts[1].dereference()
    with ThreadPoolExecutor(1) as threads:
        with first.semaphore("s", 1) as place:
            waiting = threads.submit(second.semaphore("s", 1).acquire, timeout=20)
            wait_until(place.waiters)
        # Without being woken it would ask again only after five seconds.
        assert waiting.result(4)
    for process in (first, second):
        process.stop()
    assert left(cluster, namespace) == set()


def test_updates_of_500_keys_in_all_parts_of_the_cluster(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    processes = [make() for _ in range(3)]
    caches: list[LruCache[Ids]] = [LruCache(max_entries=200) for _ in processes]
    keys = 500
    numbers = range(3000)
    for number in numbers:
        at, key = number % 3, number * 7 % keys
        caches[at].set(key, Ids(processes[at], key, doc={"ids": [number]}, init_cache=False))
    assert sum(cache.size() for cache in caches) == 600
    for cache in caches:
        cache.expire_all()
    assert Ids.executed == Counter(numbers)
    for process in processes:
        assert process.get_registry() == []
        process.stop()
    assert left(cluster, namespace) == set()


def test_batch_is_one_exchange_and_the_nodes_work_side_by_side(
    make: Make, cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make(heartbeat_interval=50)
    wait_until(lambda: process.engine.heartbeat.beats)
    trips = watch(monkeypatch)
    with process.batch():
        for number in range(600):
            Ids(process, number % 300, doc={"ids": [number]})
        for i in range(100):
            process.create_reference(f"r{i}")
    # One call of each partition; all of a node's are sent at once, and to all nodes before any
    # answer is read.
    assert trips == [sorted(share_sizes(process))]
    assert sum(trips[0]) == 16
    assert len(trips[0]) == 3
    assert len(process.get_registry()) == 400
    with process.batch():
        for number in range(300):
            Ids(process, number, doc={"ids": [1000 + number]}).end_session()
    assert Ids.executed == Counter([*range(600), *range(1000, 1300)])
    process.stop()
    assert left(cluster, namespace) == set()


def share_sizes(process: Process) -> list[int]:
    """How many partitions each node has."""
    there = server(process)
    return list(Counter(map(there.node_of, process.engine.identity.partitions.prefixes)).values())


def watch(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record exchanges with nodes: how many calls of a lane go to each."""
    trips: list[list[int]] = []
    original = sync_io._perform

    def record(step: Any) -> Any:
        if isinstance(step, RoundTrip):
            calls = [sum(b"_apply" in c[1] for c in share.commands) for share in step.shares]
            if any(calls):
                trips.append(sorted(calls))
        return original(step)

    monkeypatch.setattr(sync_io, "_perform", record)
    return trips


def test_interrupted_exchanges_leave_no_answers_to_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = server(make(heartbeat_interval=50))
    me = threading.current_thread()  # the heartbeat reads too
    keys = [b"number%d" % i for i in range(300)]

    def exchange(requests: list[Request]) -> list[Any]:
        return sync_io.run(there.exchange(requests, 10))

    sets = [Request(key, (b"SET", key, b"%d" % i, b"EX", b"60")) for i, key in enumerate(keys)]
    gets = [Request(key, (b"GET", key)) for key in keys]
    assert exchange(sets) == [b"OK"] * len(keys)
    for reads in range(3):
        left = itertools.count(reads, -1)
        original = sync_io._read

        def interrupted(
            *args: Any,
            left: Iterator[int] = left,
            original: Callable[..., Any] = original,
        ) -> Any:
            if threading.current_thread() is me and next(left) == 0:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(sync_io, "_read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                exchange(gets)
        # In another order, or an answer that was left would be the right one.
        assert exchange(gets[::-1]) == [b"%d" % i for i in reversed(range(len(keys)))]


def test_stop_ends_what_is_open_and_leaves_nothing(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    process = make()
    cache: LruCache[Ids] = LruCache()
    for number in range(200):
        cache.set(number, Ids(process, number, doc={"ids": [number]}))
        process.create_reference(f"r{number}")
    lock = process.lock("locked")
    assert lock.acquire()
    assert any(name.startswith("members:") for name in left(cluster, namespace))
    process.stop()
    assert Ids.executed == Counter(range(200))
    assert left(cluster, namespace) == set()


class Work:
    """Threads that use a cluster in every way while something happens to it."""

    def __init__(self, processes: list[Process], keys: int = 40) -> None:
        self.processes = processes
        self.keys = keys
        self.numbers = itertools.count()
        self.end = threading.Event()
        self.acknowledged: list[list[int]] = [[] for _ in processes]
        self.attempted: set[int] = set()
        self.threads = ThreadPoolExecutor()
        self.futures: list[Future[None]] = []

    def __enter__(self) -> Self:
        for process, acknowledged in zip(self.processes, self.acknowledged, strict=True):
            self.futures.append(self.threads.submit(self.work, process, acknowledged))
        return self

    def work(self, process: Process, acknowledged: list[int]) -> None:
        for turn in itertools.count():
            if self.end.is_set():
                return
            ids = list(itertools.islice(self.numbers, 12))
            self.attempted.update(ids)
            with process.batch():
                for number in ids[2:]:
                    Ids(process, number % self.keys, doc={"ids": [number]})
            for number in ids[:2]:  # by themselves, beside the pipeline
                Ids(process, number % self.keys, doc={"ids": [number]})
            acknowledged += ids
            name = f"turn{turn % 20}"
            with process.lock(name):
                reference = process.create_reference(name)
                assert reference.count() >= 1
            reference.dereference()

    def goes_on(self, steps: int = 60) -> None:
        """Wait until each process has got so many numbers acknowledged from now on."""
        goals = [len(acknowledged) + steps for acknowledged in self.acknowledged]

        def reached() -> bool:
            for future in self.futures:
                if future.done():
                    future.result()
            pairs = zip(self.acknowledged, goals, strict=True)
            return all(len(acknowledged) >= goal for acknowledged, goal in pairs)

        wait_until(reached, 60)

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.threads.shutdown()
        for future in self.futures:
            future.result()

    def finish(self, safe: set[int] | None = None) -> None:
        """End the sessions, and see that nothing is lost, and nothing there twice.

        What a primary had acknowledged but not replicated goes with it: then ``safe`` is what
        must be there.
        """
        for process in self.processes:
            process.stop()
        if safe is None:
            safe = {number for numbers in self.acknowledged for number in numbers}
        assert safe <= Ids.executed.keys() <= self.attempted
        assert set(Ids.executed.values()) == {1}


def test_slots_that_move_in_mid_work(make: Make, cluster: Cluster, namespace: str) -> None:
    spare = cluster.nodes[4]  # has no slots and no functions, and nobody knows of it
    spare.ask("FUNCTION", "FLUSH")
    processes = [make(heartbeat_interval=2) for _ in range(2)]
    keys = [Ids(processes[0], key, doc={"ids": []}).resource_id for key in range(3)]
    slots = {slot(processes[0], name) for name in (*keys, "turn1", "turn2")}
    slots |= {slot_of(processes[0].heartbeat_hash_name)}
    homes = {found: cluster.owner(found) for found in slots}
    moved = errors(cluster, "MOVED")
    with Work(processes) as work:
        work.goes_on()
        for found in slots:
            asked = errors(cluster, "ASK")
            cluster.open_slot(found, homes[found], spare)
            wait_until(lambda asked=asked: errors(cluster, "ASK") > asked)  # type: ignore[misc]  # mypy infers no lambda with defaults
            # Half of a partition's keys are here, and half are there, while calls wait.
            assert cluster.move_keys(found, homes[found], spare) > 1
            cluster.close_slot(found, spare)
            work.goes_on(20)
        assert spare.ask("DBSIZE") > 0
        for found, home in homes.items():
            cluster.move(found, home)
        work.goes_on()
    assert errors(cluster, "MOVED") > moved
    work.finish()
    assert left(cluster, namespace) == set()


def test_node_that_sends_us_on_is_believed_before_those_that_have_not_heard_of_it(
    make: Make, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make()
    reference = process.create_reference("x")
    home = cluster.owner(slot(process, "x"))
    monkeypatch.setattr(server(process), "_refresh", lambda _: iter(()))
    for target in (cluster.nodes[4], home):
        cluster.move(slot(process, "x"), target)
        assert reference.count() == 1
        moved = errors(cluster, "MOVED")
        assert reference.count() == 1
        assert errors(cluster, "MOVED") == moved
    assert reference.dereference()


def errors(cluster: Cluster, kind: str) -> int:
    return sum(node.errors(kind) for node in cluster.nodes)


def test_resource_waits_while_its_slot_moves_and_has_one_life(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    """Its keys arrive one by one. A call over there would begin anew what has not arrived yet."""
    process, other = make(), make()
    spare = cluster.nodes[4]
    update = Ids(process, "x", doc={"ids": [1]})
    other.create_reference(update.resource_id)
    found = slot(process, update.resource_id)
    home = cluster.owner(found)
    with ThreadPoolExecutor() as threads:
        cluster.open_slot(found, home, spare)
        asked = home.errors("ASK")
        calls: list[Future[Any]] = [
            threads.submit(Ids, process, "x", doc={"ids": [2]}),
            threads.submit(update.ref.count),
            threads.submit(other.create_reference, update.resource_id),
        ]
        wait_until(lambda: home.errors("ASK") > asked + 10)
        assert not any(call.done() for call in calls)
        assert spare.ask("DBSIZE") == 0
        assert cluster.move_keys(found, home, spare) > 2
        cluster.close_slot(found, spare)
        assert calls[1].result(20) == 2
        for call in calls:
            call.result(20)
    other.stop()
    process.stop()
    assert Ids.executed == Counter([1, 2])
    cluster.move(found, home)
    assert left(cluster, namespace) == set()


@pytest.mark.slow
def test_process_waits_while_the_slot_of_the_namespace_moves(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    """Nobody can beat meanwhile, for longer than a lease; it is nobody's death."""
    told: list[Exception] = []
    # A busy machine may keep one of them from beating for a second.
    processes = [make(heartbeat_interval=1.5, on_error=told.append) for _ in range(2)]
    ids = [process.id for process in processes]
    references = [process.create_reference("x") for process in processes]
    spare = cluster.nodes[4]
    spare.ask("FUNCTION", "FLUSH")
    found = slot_of(processes[0].heartbeat_hash_name)
    home = cluster.owner(found)
    beats = [process.engine.heartbeat.beats for process in processes]
    cluster.open_slot(found, home, spare)
    wait_until(lambda: not any(p.engine.identity.surely_lives for p in processes))
    references += [processes[0].create_reference("y")]  # its partition is where it was
    cluster.move_keys(found, home, spare)
    cluster.close_slot(found, spare)
    wait_until(
        lambda: all(p.engine.heartbeat.beats > b + 2 for p, b in zip(processes, beats, strict=True))
    )
    assert [reference.count() for reference in references] == [2, 2, 1]
    cluster.move(found, home)
    for process in processes:
        process.stop()
    assert told == []
    assert [process.id for process in processes] == ids
    assert left(cluster, namespace) == set()


def test_functions_that_a_node_has_lost(make: Make, cluster: Cluster, namespace: str) -> None:
    with Work([make(), make()]) as work:
        for node in cluster.primaries():
            work.goes_on(20)
            node.ask("FUNCTION", "FLUSH")
            wait_until(partial(node.ask, "FUNCTION", "LIST"))
    work.finish()
    assert left(cluster, namespace) == set()


def test_primary_that_dies_in_mid_work(make: Make, cluster: Cluster, namespace: str) -> None:
    """The replica's data, later data, and the other nodes' data count once."""
    primary, replica = cluster.pair()
    processes = [make(), make()]
    mark = resource_at(processes[0], partial(cluster.owns, primary))
    with Work(processes) as work:
        work.goes_on()
        safe = {number for numbers in work.acknowledged for number in numbers.copy()}
        assert primary.replicates(key(processes[0], "mark", mark))
        primary.kill()
        wait_until(replica.is_primary)
        since = next(work.numbers)
        work.goes_on(100)
    primary.start()
    safe |= {n for numbers in work.acknowledged for n in numbers if n > since}
    assert len(safe) > 200
    work.finish(safe)


@pytest.mark.slow
def test_lock_is_waited_for_at_the_primary_that_came_after(
    make: Make, cluster: Cluster, namespace: str
) -> None:
    primary, replica = cluster.pair()
    holder, waiter = make(), make()
    name = resource_at(holder, partial(cluster.owns, primary))
    with ThreadPoolExecutor() as threads, holder.lock(name):
        lock = waiter.lock(name)
        waiting = threads.submit(lock.acquire, timeout=60)
        wait_until(primary.waiters)
        assert primary.replicates(key(holder, "mark", name))
        primary.kill()
        wait_until(replica.is_primary)
        wait_until(replica.waiters)
        assert not waiting.done()
        primary.start()
    assert waiting.result(4)  # woken: it would have asked by itself only after five seconds
    lock.release()


@pytest.mark.slow
def test_cluster_that_is_down_loses_nothing(make: Make, cluster: Cluster, namespace: str) -> None:
    process = make(url=f"{cluster.url}?socket_timeout=0.3", retry_timeout=0.3)
    Ids(process, "a", doc={"ids": [1]})
    held = [Ids(process, key, doc={"ids": [10 + key]}, init_cache=False) for key in range(30)]
    with cluster.nodes[1].paused():
        wait_until(lambda: cluster.nodes[2].ask("CLUSTER INFO")["cluster_state"] == "fail")
        with pytest.raises(ConnectionLostError, match="nothing local is lost"):
            process.create_reference("b")
        lost = 0
        for update in held:
            try:
                update.cache()
            except ConnectionLostError:
                lost += 1
                break
        assert lost
        with pytest.raises(ConnectionLostError), process.batch():
            for key in range(30, 60):
                Ids(process, key, doc={"ids": [10 + key]})
    cluster.wait_until_well()

    def is_stored(update: Ids) -> bool:  # a busy machine takes longer than 0.3 s
        try:
            update.cache()
        except ConnectionLostError:
            return False
        return True

    for update in held:
        wait_until(partial(is_stored, update))
    wait_until(lambda: is_settled(process))
    process.stop()
    assert Ids.executed == Counter([1, *range(10, 70)])
    assert left(cluster, namespace) == set()


def test_hosts_and_nodes_that_are_not_there(cluster: Cluster, namespace: str) -> None:
    address = cluster.nodes[2].address
    with Process(hosts=[address], namespace=namespace) as process:
        assert process.create_reference("x").dereference()
        assert repr(process).endswith(f"at redis+cluster://{address}>")
        assert cluster.connections() >= 3
    with Process(hosts=["127.0.0.1:1", address], namespace=namespace) as process:
        assert process.create_reference("x").dereference()
    wait_until(lambda: cluster.connections() == 0)


CLIENTS: list[Callable[[Node], "redis.RedisCluster"]] = [
    lambda node: redis.RedisCluster(host="127.0.0.1", port=node.port),
    lambda node: redis.RedisCluster.from_url(f"redis://{node.address}"),
    lambda node: redis.RedisCluster("127.0.0.1", node.port, protocol=2, decode_responses=True),
]


@pytest.mark.parametrize("connect", CLIENTS)
def test_client_of_the_callers(
    cluster: Cluster, namespace: str, connect: Callable[[Node], "redis.RedisCluster"]
) -> None:
    with connect(cluster.nodes[0]) as client:
        assert client.ping(target_nodes=client.ALL_NODES)
        before = cluster.connections()
        with Process(client=client, namespace=namespace) as process:
            assert process.client is client
            cache: LruCache[Ids] = LruCache()
            for number in range(90):
                cache.set(number % 30, Ids(process, number % 30, doc={"ids": [number]}))
            with process.lock("x"):
                assert not process.lock("x").acquire(block=False)
            reference = process.create_reference("x")
            assert [holder.pid for holder in reference.holders()] == [os.getpid()]
            assert cluster.connections() > before
        assert Ids.executed == Counter(range(90))
        # Those of clients before it may have been cut meanwhile.
        wait_until(lambda: cluster.connections() <= before)
        assert client.ping(target_nodes=client.ALL_NODES)
        for node in client.get_nodes():  # redis-py leaves them open if it was given a URL
            client.get_redis_connection(node).connection_pool.disconnect()


def test_cluster_with_a_password(make: Make, cluster: Cluster, namespace: str) -> None:
    place = cluster.url.partition("://")[2]
    try:
        for node in cluster.nodes:
            node.ask("CONFIG SET", "requirepass", SECRET, "masterauth", SECRET)
            node.password = SECRET
        for wrong in ("", ":wrong@", "nobody:x@"):
            with pytest.raises(AuthenticationError, match="put user and password into the URL"):
                make(url=f"redis+cluster://{wrong}{place}")
        process = make(url=f"redis+cluster://:{SECRET}@{place}")
        assert process.create_reference("x").dereference()
        assert SECRET not in repr(process)
        process.stop()
    finally:
        for node in cluster.nodes:
            node.ask("CONFIG SET", "requirepass", "", "masterauth", "")
            node.password = None


def test_nodes_that_do_not_know_their_names(make: Make, cluster: Cluster) -> None:
    kind = "cluster-preferred-endpoint-type"
    try:
        for node in cluster.nodes:
            node.ask("CONFIG SET", kind, "unknown-endpoint")
        process = make()
        references = [process.create_reference(f"r{i}") for i in range(30)]
        found = slot(process, "r0")
        home = cluster.owner(found)
        cluster.move(found, cluster.nodes[4])
        assert [reference.count() for reference in references] == [1] * 30
        cluster.move(found, home)
        assert all(reference.dereference() for reference in references)
        process.stop()
    finally:
        for node in cluster.nodes:
            node.ask("CONFIG SET", kind, "ip")


def test_forked_child_is_another_process(make: Make) -> None:
    process = make()
    reference = process.create_reference("x")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            process.create_reference("x")
            os.write(write, b"%d" % reference.count())
            process.stop()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert answer.read() == "2"
    os.waitpid(child, 0)
    assert reference.count() == 1
