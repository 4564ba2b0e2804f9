"""The primary that sentinels name, and the one that comes after it."""

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis.sentinel import Sentinel

from phonon import Process, Update
from phonon._transport import connect
from phonon.errors import AuthenticationError, ConfigurationError, ServerUnreachableError
from support.nodes import Watched
from support.world import wait_until

SECRET = "sEcReT"  # noqa: S105 - of servers that live as long as the test


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """Three servers with one password, the sentinel among them."""
    watched = Watched(1, SECRET)
    yield watched
    watched.close()


@pytest.fixture
def url(watched: Watched) -> str:
    return f"redis+sentinel://:{SECRET}@{watched.addresses}/main/1?sentinel_password={SECRET}"


class Ids(Update):
    """Collects numbers, each of which is to arrive once."""

    executed: Counter[int] = Counter()  # noqa: RUF012 - for all of them

    def merge(self, other: "Ids") -> None:
        self.doc = {"ids": self.doc["ids"] + other.doc["ids"]}

    def execute(self) -> None:
        self.executed.update(self.doc["ids"])


def test_primary_is_found_by_the_services_name(watched: Watched, url: str, namespace: str) -> None:
    with Process(url=url, namespace=namespace) as first, Process(url=url, namespace=namespace) as p:
        assert first.client is p.client
        reference = first.create_reference("x")
        p.create_reference("x")
        assert reference.count() == 2
        with first.lock("x"):
            assert not p.lock("x").acquire(timeout=0.01)
    found = watched.primary.ask("INFO", "keyspace")
    assert list(found) == ["db1"]
    assert repr(first).endswith(f"at redis+sentinel://:***@{watched.addresses}/main/1>")
    assert connect._shared == {}


def test_client_of_the_callers(watched: Watched, namespace: str) -> None:
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]  # parts of redis-py have no types
        [("127.0.0.1", watched.sentinels[0].port)],
        sentinel_kwargs={"password": SECRET},
        password=SECRET,
    )
    with Process(client=sentinel.master_for("main"), namespace=namespace) as process:
        assert process.create_reference("x").dereference()
        assert "server main" in repr(process)
    with pytest.raises(ServerUnreachableError, match="read only replica"):
        Process(client=sentinel.slave_for("main"))


def test_sentinels_that_are_gone_do_not_matter(url: str, namespace: str) -> None:
    for place in ("127.0.0.1:1,", "nowhere.invalid,"):
        with Process(url=url.replace("@", f"@{place}"), namespace=namespace) as process:
            assert process.create_reference("x").dereference()


@pytest.mark.parametrize(
    ("old", "new", "error", "hint"),
    [
        ("/main/", "/other/", ConfigurationError, "no service 'other', but 'main'"),
        ("sentinel_password=", "sentinel_password=x", AuthenticationError, "sentinel_password="),
        (f"?sentinel_password={SECRET}", "", AuthenticationError, "sentinel_password="),
        (f":{SECRET}@", "", AuthenticationError, "put user and password into the URL"),
        (f":{SECRET}@", ":wrong@", AuthenticationError, "put user and password into the URL"),
        ("/main/1", "/main/99", ConfigurationError, "no such database"),
    ],
)
def test_what_is_wrong_with_the_url(
    url: str, old: str, new: str, error: type[Exception], hint: str
) -> None:
    with pytest.raises(error) as refusal:
        Process(url=url.replace(old, new))
    assert hint in str(refusal.value)
    assert connect._shared == {}


def test_sentinel_and_server_taken_for_each_other(watched: Watched) -> None:
    sentinel, server = watched.sentinels[0].address, watched.primary.address
    with pytest.raises(ConfigurationError, match=r"is a sentinel: .*redis\+sentinel://host:port/"):
        Process(url=f"redis://:{SECRET}@{sentinel}")
    with pytest.raises(ConfigurationError, match="no sentinel at this address"):
        Process(url=f"redis+sentinel://{server}/main?sentinel_password={SECRET}")


class Worker:
    """Stores numbers until it is told to end."""

    def __init__(self, process: Process, numbers: Iterator[int]) -> None:
        self.process = process
        self.numbers = numbers
        self.attempted: list[int] = []
        self.acknowledged: list[int] = []
        self.acknowledged_late: list[int] = []

    def work(self, failed_over: threading.Event, end: threading.Event) -> None:
        while not end.is_set():
            late = failed_over.is_set()
            ids = list(itertools.islice(self.numbers, 20))
            self.attempted += ids
            with self.process.batch():
                for number in ids[3:]:
                    Ids(self.process, f"key{number % 50}", doc={"ids": [number]})
            for number in ids[:3]:  # by themselves, beside the pipeline
                Ids(self.process, f"key{number % 50}", doc={"ids": [number]})
            self.acknowledged += ids
            if late:
                self.acknowledged_late += ids


def test_calls_go_on_after_a_failover(namespace: str) -> None:
    """Data that the replica had when the primary was killed, and all later data, counts once."""
    Ids.executed.clear()
    numbers = itertools.count()
    failed_over, end = threading.Event(), threading.Event()
    with contextlib.ExitStack() as stack:
        watched = stack.enter_context(contextlib.closing(Watched(3)))
        threads = stack.enter_context(ThreadPoolExecutor())
        url = f"redis+sentinel://{watched.addresses}/main/1"
        processes = [stack.enter_context(Process(url=url, namespace=namespace)) for _ in range(3)]
        workers = [Worker(process, numbers) for process in processes]
        working = [threads.submit(worker.work, failed_over, end) for worker in workers]

        def have(count: int, ids: str) -> bool:
            assert not any(future.done() for future in working), [f.exception() for f in working]
            return all(len(getattr(worker, ids)) > count for worker in workers)

        try:
            wait_until(lambda: have(200, "acknowledged"))
            safe = {number for worker in workers for number in worker.acknowledged.copy()}
            assert watched.primary.replicates()
            watched.primary.kill()
            wait_until(watched.replica.is_primary)
            failed_over.set()
            wait_until(lambda: have(200, "acknowledged_late"))
        finally:
            end.set()
        for future in working:
            future.result()
        for worker in workers:
            worker.process.stop()
        safe |= {number for worker in workers for number in worker.acknowledged_late}
        attempted = {number for worker in workers for number in worker.attempted}
        assert safe <= Ids.executed.keys() <= attempted
        assert set(Ids.executed.values()) == {1}


def test_who_waits_for_a_lock_waits_on_after_a_failover(namespace: str) -> None:
    with contextlib.ExitStack() as stack:
        watched = stack.enter_context(contextlib.closing(Watched(1)))
        threads = stack.enter_context(ThreadPoolExecutor())
        url = f"redis+sentinel://{watched.addresses}/main"
        holder, waiter = (
            stack.enter_context(Process(url=url, namespace=namespace)) for _ in range(2)
        )
        lock, awaited = holder.lock("x"), waiter.lock("x")
        assert lock.acquire()
        waiting = threads.submit(awaited.acquire, timeout=60)
        wait_until(watched.primary.waiters)
        assert watched.primary.replicates()
        watched.primary.kill()
        wait_until(watched.replica.is_primary)
        wait_until(watched.replica.waiters)
        assert not waiting.done()
        assert lock.token is not None
        before = lock.token
        lock.release()
        assert waiting.result(4)  # woken: it would have asked by itself only after five seconds
        assert awaited.token is not None
        assert awaited.token > before
        awaited.release()


def test_primary_that_is_no_primary_any_more(namespace: str) -> None:
    """A planned failover: the old primary lives, and so do our connections to it.

    For a second both are primaries, and what the old one is told then is lost with it; no client
    can help that. But we are with the new one afterwards, and have seen no error.
    """
    with contextlib.closing(Watched(1)) as watched:
        url = f"redis+sentinel://{watched.addresses}/main"
        with Process(url=url, namespace=namespace) as process:
            reference = process.create_reference("x")
            watched.fail_over()

            def over() -> bool:
                reference.increment_times_modified()
                return watched.replica.is_primary() and not watched.primary.is_primary()

            wait_until(over)
            with process.batch():
                for i in range(100):
                    process.create_reference(f"y{i}")
            times = reference.get_times_modified()
            reference.increment_times_modified()
            assert reference.get_times_modified() == times + 1
            partition, name = process.engine.members.place("x")
            prefix = process.engine.identity.partitions.prefixes[partition]
            members = (prefix + b"members:" + name).decode()
            # Writes to the old primary in between are lost, and with them this process's identity.
            assert sum(reference.modified_by().values()) == times + 1
            assert int(watched.replica.ask("HGET", members, process.id)) >= 1
