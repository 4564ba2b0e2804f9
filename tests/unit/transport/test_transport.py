"""One server: exchanges, losses, waits; the same for threads and for event loops."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.exceptions import ResponseError

from phonon._core.settings import Durability
from phonon._protocol.library import Request
from phonon._transport import async_io, connect, sync_io
from phonon._transport.server import Server
from phonon.errors import (
    ConfigurationError,
    ConnectionLostError,
    ForeignKeyError,
    ServerError,
    ServerUnreachableError,
)
from support.interrupts import alarm_handler
from support.proxy import Fault, Proxy
from support.transport import Lab, Node, Watched
from support.world import Redis, wait_until


@pytest.fixture(params=["threads", "asyncio", "uvloop"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(request.param)
    yield lab
    lab.close()
    assert connect._shared == {}


@pytest.fixture
def proxy(own_server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(own_server.socket)
    yield proxy
    proxy.close()


def counted(server: Redis, key: bytes) -> int:
    with server.client() as client:
        return int(client.get(key + b"n") or 0)


def clients(server: Redis) -> int:
    with server.client() as client:
        return len(client.client_list()) - 1


def blocked(client: "redis.Redis") -> int:
    return int(client.info("clients")["blocked_clients"])


def test_answers_come_in_order_errors_among_them(lab: Lab, server: Redis, namespace: str) -> None:
    key = namespace.encode()
    to = lab.connect(server.url)
    requests = [lab.count(key, b"%d" % i) for i in range(500)]
    requests[7] = lab.fail(key, b"OOPS not this one")
    replies = lab.exchange(to, *requests)
    assert isinstance(replies[7], ResponseError)
    assert str(replies[7]) == "OOPS not this one"
    assert replies[:7] + replies[8:] == [b"%d" % i for i in range(500) if i != 7]
    assert to.troubles == 0


def test_large_requests_and_answers(lab: Lab, server: Redis, namespace: str) -> None:
    to = lab.connect(server.url)
    words = [bytes([i]) * 3_000_000 for i in range(8)]
    assert lab.exchange(to, *(lab.count(namespace.encode(), word) for word in words)) == words


def test_tcp(lab: Lab) -> None:
    with contextlib.closing(Node()) as node:
        to = lab.connect(f"valkey://{node.address}/3")
        assert lab.exchange(to, lab.count(b"k")) == [b"x"]
        assert list(node.ask("INFO", "keyspace")) == ["db3"]


@pytest.mark.parametrize("fault", list(Fault))
def test_lost_connection_is_repeated(
    lab: Lab, own_server: Redis, proxy: Proxy, fault: Fault
) -> None:
    to = lab.connect(proxy.url)
    lab.exchange(to, lab.count(b"a"))
    proxy.strike(fault, at=1)
    assert lab.exchange(to, *(lab.count(b"k", b"%d" % i) for i in range(3))) == [b"0", b"1", b"2"]
    assert to.troubles == 1
    # Calls that were answered before the connection broke are not sent again.
    assert counted(own_server, b"k") == (3 if fault is Fault.LOST_REQUEST else 4)


def test_patience_ends(lab: Lab, own_server: Redis, proxy: Proxy) -> None:
    to = lab.connect(proxy.url)
    with proxy.away():
        start = time.monotonic()
        replies = lab.exchange(to, lab.count(b"k"), lab.count(b"k"), patience=0.3)
        assert time.monotonic() - start > 0.2
        assert all(isinstance(reply, ConnectionLostError) for reply in replies)
        assert replies[0] is not replies[1]
        assert "does not answer" in str(replies[0])
        assert isinstance(lab.exchange(to, lab.count(b"k"), patience=0)[0], ConnectionLostError)
    assert lab.exchange(to, lab.count(b"k")) == [b"x"]


def test_server_that_hangs(lab: Lab, own_server: Redis) -> None:
    to = lab.connect(own_server.url)
    lab.exchange(to, lab.count(b"k"))
    own_server.pause()
    try:
        start = time.monotonic()
        assert isinstance(lab.exchange(to, lab.count(b"k"), patience=0.3)[0], ConnectionLostError)
        assert time.monotonic() - start < 4.5, "not a whole time-out of the socket, which is 5 s"
        timer = threading.Timer(0.2, own_server.go_on)
        timer.start()
        assert lab.exchange(to, lab.count(b"k", b"late"), patience=20) == [b"late"]
        timer.join()
    finally:
        own_server.go_on()
    # The answer to the call that was given up is no other call's.
    assert lab.exchange(to, lab.count(b"k", b"next")) == [b"next"]


def test_deadline_is_for_the_last_byte(lab: Lab, own_server: Redis, proxy: Proxy) -> None:
    """A server that sends a byte now and then would never run into a socket's time-out."""
    to = lab.connect(f"{proxy.url}&socket_timeout=0.3")
    proxy.on_reply = lambda _: time.sleep(0.2)
    start = time.monotonic()
    replies = lab.exchange(to, *(lab.count(b"k") for _ in range(20)), patience=0)
    assert time.monotonic() - start < 3.5, "all of them take 4 s"
    assert replies[0] == b"x"
    assert isinstance(replies[-1], ConnectionLostError)


def test_library_is_loaded_again(lab: Lab, own_server: Redis) -> None:
    to = lab.connect(own_server.url)
    for lose in ("FUNCTION FLUSH", "kill"):
        if lose == "kill":
            own_server.kill()
            own_server.start()
        else:
            with own_server.client() as client:
                client.function_flush()
        assert lab.exchange(to, lab.count(b"k"), lab.count(b"k")) == [b"x", b"x"]


def test_passing_errors_are_waited_out(lab: Lab, own_server: Redis) -> None:
    to = lab.connect(own_server.url)
    with own_server.client() as client:
        client.config_set("min-replicas-to-write", 1)

        def is_refused() -> bool:  # a busy machine may take longer than that to connect
            reply = lab.exchange(to, lab.count(b"k"), patience=0.1)[0]
            assert isinstance(reply, ConnectionLostError)
            return "NOREPLICAS" in str(reply)

        wait_until(is_refused)
        timer = threading.Timer(0.2, client.config_set, ("min-replicas-to-write", 0))
        timer.start()
        assert lab.exchange(to, lab.count(b"k")) == [b"x"]
        timer.join()
    for error in (b"LOADING x", b"ASK 1 h:1", b"TRYAGAIN x", b"BUSY x", b"MASTERDOWN x"):
        reply = lab.exchange(to, lab.fail(b"k", error), patience=0.05)[0]
        assert isinstance(reply, ConnectionLostError)
    for error in (b"BUSYGROUP x", b"MISCONF x", b"ERR x"):
        assert isinstance(lab.exchange(to, lab.fail(b"k", error))[0], ResponseError)


@pytest.mark.parametrize(
    "answers",
    [
        [b"loading:1\r\naof_enabled:0\r\n", [], []],
        [b"loading:0\r\naof_enabled:1\r\n", [], [], b"the library", ResponseError("LOADING x")],
    ],
    ids=["at first", "restarted meanwhile"],
)
def test_a_server_that_reads_its_data_cannot_be_judged(
    lab: Lab, server: Redis, answers: list[Any]
) -> None:
    """Meanwhile it says that its appendonly is off, and confirms nothing."""
    to = lab.connect(server.url)
    to.durability = Durability()
    preparing: Any = to._prepare(to.node_of(b""), check_mode=True)
    left = iter(answers)

    def answer_all() -> None:
        for trip in preparing:
            for share in trip.shares:
                share.replies[:] = [next(left) for _ in share.commands]

    with pytest.raises(redis.ConnectionError, match="LOADING"):
        answer_all()


def test_wait(lab: Lab, server: Redis, namespace: str) -> None:
    to = lab.connect(server.url)
    keys = [f"{namespace}{i}".encode() for i in range(3)]
    with server.client() as client:
        assert lab.run(to.wait(keys, 0.01)) == []
        timer = threading.Timer(0.1, client.rpush, (keys[1], b"element"))
        timer.start()
        assert lab.run(to.wait(keys, 20)) == [b"element"]
        timer.join()
        client.set(keys[0], 1)
        with pytest.raises(ForeignKeyError, match="another type"):
            lab.run(to.wait(keys, 0.01))


def test_wait_longer_than_the_socket_may(lab: Lab, server: Redis, namespace: str) -> None:
    to = lab.connect(f"{server.url}&socket_timeout=0.1")
    start = time.monotonic()
    assert lab.run(to.wait([namespace.encode()], 0.4)) == []
    assert time.monotonic() - start > 0.35
    assert lab.exchange(to, lab.count(namespace.encode())) == [b"x"]


def test_wait_at_a_server_that_goes(lab: Lab, own_server: Redis) -> None:
    to = lab.connect(own_server.url)
    timer = threading.Timer(0.1, own_server.kill)
    timer.start()
    assert lab.run(to.wait([b"k"], 60)) == []
    timer.join()
    assert lab.run(to.wait([b"k"], 60)) == []


def test_durability(lab: Lab, own_server: Redis) -> None:
    with pytest.raises(ConfigurationError, match="its appendonly is no"):
        lab.connect(own_server.url, durability=Durability())
    replicas = lab.connect(
        own_server.url, durability=Durability(fsync=False, replicas=1, timeout=0.01)
    )
    reply = lab.run(replicas.exchange([lab.count(b"k")], 0.1, confirm=True))[0]
    assert isinstance(reply, ConnectionLostError)
    assert "not as safe" in str(reply)
    assert lab.exchange(replicas, lab.count(b"k")) == [b"x"]
    own_server.kill()
    own_server.options = ("--appendonly", "yes", "--appendfsync", "always")
    own_server.start()
    safe = lab.connect(own_server.url, durability=Durability())
    assert lab.run(safe.exchange([lab.count(b"a")] * 3, 10, confirm=True)) == [b"x"] * 3


def test_explained_errors(lab: Lab, server: Redis, own_server: Redis, namespace: str) -> None:
    to = lab.connect(own_server.url)
    explained = {
        "OOM command not allowed": (ServerError, "raise its maxmemory"),
        "WRONGTYPE Operation against": (ForeignKeyError, "rename or delete"),
        "NOPERM User u has no permissions to run the 'function|load' command": (
            ServerError,
            r"\+function\|load",
        ),
        "SOMETHING else": (ServerError, "SOMETHING else"),
    }
    for text, (kind, match) in explained.items():
        error = lab.exchange(to, lab.fail(b"k", text.encode()))[0]
        with pytest.raises(kind, match=match):
            raise to.explain(error, ["key"])


def test_client_with_one_connection(lab: Lab, server: Redis, namespace: str) -> None:
    """Neither does it starve us, nor we it."""
    key = namespace.encode()
    if lab.runner is None:
        client: Any = redis.Redis(unix_socket_path=server.socket, db=1, max_connections=1)
        to = lab.connect(client)
        with client.client() as mine:
            mine.ping()
            assert lab.exchange(to, lab.count(key)) == [b"x"]
            assert lab.run(to.wait([key], 0.01)) == []
        assert client.ping()
        client.close()
        return

    async def use() -> None:
        client = redis.asyncio.Redis(unix_socket_path=server.socket, db=1, max_connections=1)
        shared = await async_io.run(connect.connect_client(client, lab.library, lab.backend))
        async with client.client() as mine:
            await mine.ping()
            assert await async_io.run(shared.server.exchange([lab.count(key)], 1)) == [b"x"]
        assert await client.ping()
        await async_io.run(shared.close())
        await client.aclose()

    lab.runner.run(use())


def test_close_leaves_no_connections(lab: Lab, own_server: Redis) -> None:
    to, same = lab.connect(own_server.url), lab.connect(own_server.url)
    assert to is same
    lab.exchange(to, lab.count(b"k"))
    lab.run(to.wait([b"k"], 0.01))
    lab.run(lab.opened[0].close())
    lab.run(lab.opened[0].close())
    assert lab.exchange(same, lab.count(b"k")) == [b"x"]
    lab.run(lab.opened[1].close())
    wait_until(lambda: clients(own_server) == 0)


def test_replica_and_eviction(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Node()) as primary, contextlib.closing(Node()) as replica:
        replica.ask("REPLICAOF", "127.0.0.1", primary.port)
        with pytest.raises(ConfigurationError, match=f"primary is at 127.0.0.1:{primary.port}"):
            lab.connect(f"redis://{replica.address}")
        primary.ask("CONFIG SET", "maxmemory-policy", "allkeys-lru")
        with caplog.at_level(logging.WARNING, "phonon"):
            lab.connect(f"redis://{primary.address}")
        assert "maxmemory-policy allkeys-lru" in caplog.text


def test_sentinel(lab: Lab) -> None:
    with contextlib.closing(Watched(1)) as watched:
        with pytest.raises(ConfigurationError, match="watch no service 'other', but 'main'"):
            lab.connect(f"redis+sentinel://{watched.addresses}/other")
        with pytest.raises(ConfigurationError, match="no sentinel at this address"):
            lab.connect(f"redis+sentinel://{watched.primary.address}/main")
        to = lab.connect(f"redis+sentinel://{watched.addresses}/main")
        assert lab.exchange(to, lab.count(b"k", b"1")) == [b"1"]
        watched.fail_over()
        assert lab.exchange(to, lab.count(b"k", b"2"), patience=30) == [b"2"]
        assert int(watched.replica.ask("GET", "kn")) >= 1


def test_nobody_there(lab: Lab) -> None:
    for url in ("redis://127.0.0.1:1", "unix:///nowhere", "redis+sentinel://127.0.0.1:1/s"):
        with pytest.raises(ServerUnreachableError, match="no Redis at"):
            lab.connect(url)
    with pytest.raises(ServerUnreachableError, match="No such file: /nowhere"):
        lab.connect("rediss://127.0.0.1:1?ssl_ca_certs=/nowhere")


# Threads


@pytest.fixture
def threads() -> Iterator[Lab]:
    lab = Lab("threads")
    yield lab
    lab.close()


def test_exchange_now(threads: Lab, own_server: Redis) -> None:
    to = threads.connect(own_server.url)
    one = threads.count(b"k")
    assert sync_io.exchange_now(to, one) == b"x"  # start has left a connection
    large = b"y" * 1_000_000
    assert sync_io.exchange_now(to, threads.count(b"k", large)) == large
    assert sync_io.exchange_now(to, threads.fail(b"k", b"OOPS")) is None
    assert sync_io.exchange_now(to, one) == b"x"
    own_server.kill()
    own_server.start()
    assert sync_io.exchange_now(to, one) is None
    assert threads.exchange(to, one) == [b"x"]
    assert sync_io.exchange_now(to, one) == b"x"
    assert clients(own_server) == 1


def test_interrupts_mix_up_no_answers(
    threads: Lab, own_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They also hit destructors, and redis-py while it connects, which loses a socket then.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    to = threads.connect(own_server.url)

    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    interrupts = 0
    with alarm_handler(interrupt):
        for i in range(3000):
            word = b"%d" % i
            now = i % 2
            try:
                signal.setitimer(signal.ITIMER_REAL, (i % 97 + 1) * 3e-6)
                if now:
                    reply = sync_io.exchange_now(to, threads.count(b"k", word))
                else:
                    reply = threads.exchange(to, threads.count(b"k", word))[0]
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert reply in (word, None) if now else reply == word
            except Interrupt:
                interrupts += 1
    gc.collect()
    assert interrupts > 100
    assert threads.exchange(to, threads.count(b"k", b"last")) == [b"last"]


@pytest.mark.parametrize("hook", [True, False])
def test_forked_child_has_connections_of_its_own(
    threads: Lab, own_server: Redis, hook: bool
) -> None:
    to = threads.connect(own_server.url)
    threads.exchange(to, threads.count(b"k"))

    def ids(kind: str) -> bytes:
        request = Request(b"k", (b"CLIENT", b"ID"))
        if kind == "now" and (found := sync_io.exchange_now(to, request)) is not None:
            return b"%d" % found
        return b"%d" % threads.exchange(to, request)[0]

    before = ids("now")
    for kind in ("now", "exchange"):
        pid = os.fork()
        if not pid:
            code = 1
            with contextlib.suppress(BaseException):
                if hook:
                    connect.after_fork_in_child()
                good = ids(kind) != before and threads.exchange(to, threads.count(b"k")) == [b"x"]
                code = 0 if good else 2
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert ids("now") == before


def test_child_of_a_signal_handler_does_not_read_the_parents_answer(
    threads: Lab, own_server: Redis
) -> None:
    to = threads.connect(own_server.url)
    threads.exchange(to, threads.count(b"k"))
    parent, children = os.getpid(), []

    def fork(*_: object) -> None:
        pid = os.fork()
        if pid:
            children.append(pid)
            own_server.go_on()
        else:
            connect.after_fork_in_child()

    own_server.pause()
    code = 1
    with alarm_handler(fork):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            if threads.exchange(to, threads.count(b"k", b"mine")) == [b"mine"]:
                code = 0 if to.troubles == (os.getpid() != parent) else 3
        finally:
            if os.getpid() != parent:
                os._exit(code)
    assert code == 0
    assert os.waitpid(children[0], 0)[1] == 0


def test_close_ends_a_wait_of_another_thread(threads: Lab, server: Redis, namespace: str) -> None:
    to = threads.connect(server.url)
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(threads.run(to.wait([namespace.encode()], 60)))
    )
    waiting.start()
    with server.client() as client:
        wait_until(lambda: blocked(client))
    threads.run(to.close())
    waiting.join(5)
    assert found == [[]]


def test_many_threads(threads: Lab, server: Redis, namespace: str) -> None:
    to = threads.connect(server.url)
    wrong: list[Any] = []

    def work(number: int) -> None:
        for i in range(200):
            word = b"%d-%d" % (number, i)
            request = threads.count(namespace.encode(), word)
            reply = sync_io.exchange_now(to, request) or threads.exchange(to, request)[0]
            if reply != word:
                wrong.append((word, reply))

    started = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert wrong == []
    assert counted(server, namespace.encode()) == 3200


# Event loops


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(request.param)
    yield lab
    lab.close()


def run_async(lab: Lab, coroutine: Any) -> Any:
    assert lab.runner is not None
    return lab.runner.run(coroutine)


async def ask(lab: Lab, server: Server, word: bytes, patience: float = 10) -> Any:
    return (await async_io.run(server.exchange([lab.count(b"k", word)], patience)))[0]


def test_tasks_share_a_connection(loop: Lab, own_server: Redis) -> None:
    to = loop.connect(own_server.url)

    async def many() -> None:
        words = [b"%d" % i for i in range(1000)]
        assert await asyncio.gather(*(ask(loop, to, word) for word in words)) == words

    run_async(loop, many())
    assert clients(own_server) == 1


def test_cancelled_tasks_leave_no_answers_to_others(loop: Lab, own_server: Redis) -> None:
    to = loop.connect(own_server.url)

    async def cancel() -> None:
        for _ in range(20):
            tasks = [asyncio.create_task(ask(loop, to, b"%d" % i)) for i in range(50)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            replies = await asyncio.gather(*tasks, return_exceptions=True)
            for i, reply in enumerate(replies):
                if i % 2:
                    assert reply == b"%d" % i
                else:
                    assert isinstance(reply, asyncio.CancelledError)

    run_async(loop, cancel())
    assert to.troubles == 0
    assert clients(own_server) == 1


def test_cancelled_wait_takes_no_element(loop: Lab, own_server: Redis) -> None:
    to = loop.connect(own_server.url)

    async def cancel() -> None:
        task = asyncio.create_task(async_io.run(to.wait([b"list"], 60)))
        with own_server.client() as client:
            await asyncio.to_thread(wait_until, lambda: blocked(client))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, lambda: not blocked(client))
            client.rpush("list", "element")
            assert client.llen("list") == 1
        assert await async_io.run(to.wait([b"list"], 1)) == [b"element"]

    run_async(loop, cancel())


def test_impatient_task_does_not_cut_off_others(loop: Lab, own_server: Redis) -> None:
    to = loop.connect(own_server.url)

    async def both() -> None:
        own_server.pause()
        patient = asyncio.create_task(ask(loop, to, b"patient", 20))
        reply = await ask(loop, to, b"impatient", 0.1)
        assert isinstance(reply, ConnectionLostError)
        own_server.go_on()
        assert await patient == b"patient"
        assert await ask(loop, to, b"next") == b"next"

    own = Request(b"k", (b"CLIENT", b"ID"))
    before = loop.exchange(to, own)
    run_async(loop, both())
    assert loop.exchange(to, own) == before


def test_many_tasks_wait_for_one_attempt_to_connect(loop: Lab, own_server: Redis) -> None:
    to = loop.connect(own_server.url)

    async def many(patience: float) -> list[Any]:
        return await asyncio.gather(*(ask(loop, to, b"x", patience) for _ in range(500)))

    own_server.kill()
    assert all(isinstance(reply, ConnectionLostError) for reply in run_async(loop, many(0.1)))
    own_server.start()
    assert run_async(loop, many(10)) == [b"x"] * 500
    assert clients(own_server) == 1


def test_close_ends_what_is_under_way(loop: Lab, own_server: Redis) -> None:
    to = loop.connect(own_server.url)

    async def close() -> None:
        waiting = asyncio.create_task(async_io.run(to.wait([b"list"], 60)))
        await asyncio.sleep(0.1)
        own_server.pause()
        asking = asyncio.create_task(ask(loop, to, b"x", 0))
        await asyncio.sleep(0.05)
        await async_io.run(to.close())
        own_server.go_on()
        assert await waiting == []
        assert isinstance(await asking, ConnectionLostError)

    run_async(loop, close())
    wait_until(lambda: clients(own_server) == 0)
