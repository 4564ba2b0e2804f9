"""The driver of asyncio, with real lanes on real servers."""

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
import uvloop

from phonon._core.flows import (
    CALLER_GONE,
    EXECUTING,
    FLUSH,
    AwaitMail,
    Branch,
    Execute,
    Flow,
    FlowRun,
    Job,
    Outcome,
    Read,
    Send,
    Sleep,
    Wait,
    call,
    single,
)
from phonon._protocol.library import default
from phonon._transport import async_io
from phonon._transport.asyncio import AsyncDriver
from phonon._transport.server import after_fork_in_child
from phonon.errors import ConfigurationError, ConnectionLostError, ForkedError, ServerError
from support import operations as ops
from support.drivers import Identity, async_server, calls_of, partials, send
from support.proxy import Fault, Proxy
from support.world import Redis


class Lab:
    """A driver with its lanes, and the flows whose callers have gone."""

    def __init__(
        self, path: str, namespace: str, retry_timeout: float = 10.0, **options: Any
    ) -> None:
        self.identity = Identity(namespace)
        self.server = async_server(path)
        self.driver = AsyncDriver(
            self.server, default(), self.identity, retry_timeout=retry_timeout, **options
        )
        self.identity.deliver = self.driver.deliver
        self.detached: list[FlowRun] = []
        self.ready: list[FlowRun] = []
        self.driver.on_detached = self.detached.append
        self.driver.on_ready = self.ready.append

    async def begin(self, process: bytes) -> None:
        await async_io.run(self.server.start())
        opening = self.identity.opening(process)
        replies = await async_io.run(self.server.exchange(opening, 5))
        self.identity.lanes = self.identity.opened(process, replies)

    async def append(self, name: bytes, partial: bytes = b"x") -> Any:
        return await self.driver.run(single(self.identity.append(name, partial)))

    async def reborn(self, process: bytes) -> None:
        steps = self.identity.rebirth(process)
        requests = next(steps)
        with contextlib.suppress(StopIteration):
            while True:
                replies = await async_io.run(self.server.exchange(requests, 5))
                requests = steps.send(replies)

    async def catch_up(self) -> list[Any]:
        await until(lambda: all(self.driver.detached_ready(run) for run in self.detached))
        results = [self.driver.resume(run) for run in self.detached]
        await asyncio.sleep(0)
        assert {id(run) for run in self.ready} == {id(run) for run in self.detached}
        self.detached.clear()
        self.ready.clear()
        return results

    async def close(self) -> None:
        await self.driver.close()
        await async_io.run(self.server.close())
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], Any], timeout: float = 20.0) -> Any:  # noqa: ASYNC109
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still not so after {timeout} s"
        await asyncio.sleep(0.002)
    return found


Test = Callable[[Lab], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, namespace: str) -> Run:
    """Runs a test in an event loop, with a lab."""

    @contextlib.asynccontextmanager
    async def lab_at(path: str, **options: Any) -> AsyncIterator[Lab]:
        lab = Lab(path, namespace, **options)
        try:
            await lab.begin(b"p1")
            yield lab
        finally:
            await lab.close()

    async def main(path: str, test: Test, **options: Any) -> None:
        async with lab_at(path, **options) as lab:
            await asyncio.wait_for(test(lab), 60)

    def run_test(path: str, test: Test, **options: Any) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main(path, test, **options))

    return run_test


@pytest.fixture
def proxy(own_server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(own_server.socket)
    yield proxy
    proxy.close()


def is_idle(lab: Lab) -> bool:
    return not any(lane.has_work for lane in lab.identity.lanes) and not lab.driver._pumps


# Sending


def test_answers_come_in_order(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        names = [b"r%d" % (i % 50) for i in range(2000)]
        sent = [lab.identity.append(name, b"%d" % i) for i, name in enumerate(names)]
        answers = await lab.driver.run(send(sent))
        assert all(answer == 1 or answer >= 64 for answer in answers)
        for i in range(50):
            found = partials(server, lab.identity, b"r%d" % i)
            assert found == [b"%d" % j for j in range(i, 2000, 50)]
        assert await lab.driver.run(send(())) == []
        assert is_idle(lab)

    run(server.socket, test)


def test_a_thousand_tasks_cost_as_much_as_ten(run: Run, own_server: Redis) -> None:
    async def test(lab: Lab) -> None:
        for count in (10, 200, 1000):
            before = calls_of(own_server)
            await asyncio.gather(*[lab.append(b"same") for _ in range(count)])
            assert calls_of(own_server) - before <= 1 + count // 256
        before = calls_of(own_server)
        await asyncio.gather(*[lab.append(b"r%d" % (i % 100)) for i in range(1000)])
        assert calls_of(own_server) - before <= 16
        assert len(partials(own_server, lab.identity, b"same")) == 1210

    run(own_server.socket, test)


def test_an_operation_that_fails_has_its_own_error(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        with server.client() as client:
            client.set(lab.identity.key("members", b"foreign"), "x")
        sent = [lab.identity.append(name, b"x") for name in (b"foreign", b"good")]
        bad, good = await lab.driver.run(send(sent))
        assert isinstance(bad, ServerError)
        assert good == 1

    run(server.socket, test)


@pytest.mark.parametrize("seed", range(3))
def test_answers_that_are_lost(run: Run, own_server: Redis, proxy: Proxy, seed: int) -> None:
    async def test(lab: Lab) -> None:
        proxy.at_random(seed, 0.1)
        names = [b"r%d" % i for i in range(6)]

        async def work(name: bytes) -> None:
            for _ in range(30):
                await lab.append(name)

        await asyncio.gather(*[work(name) for name in names * 2])
        proxy.plan()
        for name in names:
            assert len(partials(own_server, lab.identity, name)) == 60
        assert is_idle(lab)

    run(proxy.socket, test)


def test_a_caller_does_not_wait_for_ever(run: Run, own_server: Redis, proxy: Proxy) -> None:
    async def test(lab: Lab) -> None:
        await lab.append(b"r")
        lab.driver.retry_timeout = 0.2
        proxy.strike(Fault.LOST_REPLY, gone=True)
        with pytest.raises(ConnectionLostError, match="nothing local is lost"):
            await lab.append(b"r", b"kept")
        begun = time.monotonic()
        several = [lab.append(b"r", b"more"), lab.append(b"s", b"more")]
        results = await asyncio.gather(*several, return_exceptions=True)
        assert all(isinstance(result, ConnectionLostError) for result in results)
        assert time.monotonic() - begun < 8
        assert len(lab.detached) == 3
        assert all(run.caller_gone for run in lab.detached)
        assert isinstance(lab.driver.resume(lab.detached[0]), asyncio.Task)
        lab.driver.retry_timeout = 20
        proxy.back()
        assert await lab.catch_up() == [1, 1, 1]
        assert partials(own_server, lab.identity, b"r") == [b"x", b"kept", b"more"]
        assert await lab.append(b"r") == 1

    run(proxy.socket, test)


def test_the_server_is_full(run: Run, own_server: Redis) -> None:
    async def test(lab: Lab) -> None:
        names = [b"r%d" % i for i in range(40)]
        await lab.driver.run(send([ops.join(*lab.identity.place(name)) for name in names]))
        with own_server.client() as client:
            client.config_set("maxmemory", 1)
            mixed = []
            for name in names:
                mixed += [
                    ops.leave(*lab.identity.place(name)),
                    lab.identity.append(b"n" + name, b"x"),
                ]
            answers = await lab.driver.run(send(mixed))
            assert answers[::2] == [[3, 0, 1]] * 40
            assert all(isinstance(answer, ServerError) for answer in answers[1::2])
            client.config_set("maxmemory", 0)
            keys = [lab.identity.key("partials", b"n" + name) for name in names]
            assert client.exists(*keys) == 0

    run(own_server.socket, test)


def test_rebirths_all_the_time(run: Run, own_server: Redis) -> None:
    async def test(lab: Lab) -> None:
        async def work(name: bytes) -> None:
            for i in range(60):
                sent = [
                    lab.identity.append(name, b"%d" % i),
                    lab.identity.append(b"2" + name, b"x"),
                ]
                await lab.driver.run(send(sent))

        tasks = [asyncio.create_task(work(b"r%d" % i)) for i in range(5)]
        number = 1
        while not all(task.done() for task in tasks):
            number += 1
            await lab.reborn(b"p%d" % number)
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
        for i in range(5):
            found = Counter(partials(own_server, lab.identity, b"r%d" % i))
            assert found == Counter(b"%d" % j for j in range(60))
            assert len(partials(own_server, lab.identity, b"2r%d" % i)) == 60
        assert number > 3

    run(own_server.socket, test)


def test_a_background_flow_is_told_that_there_is_no_answer(
    run: Run, own_server: Redis, proxy: Proxy
) -> None:
    async def test(lab: Lab) -> None:
        told: list[Any] = []

        def flow() -> Flow[None]:
            try:
                yield Send((lab.identity.append(b"r", b"x"),))
            except ConnectionLostError as error:
                told.append(error)
            told.append((yield Branch(single(lab.identity.append(b"r", b"y")))))

        lab.driver.retry_timeout = 0.1
        proxy.gone()
        worker = lab.driver.spawn(flow(), "background")
        assert not worker.is_current()
        await worker.join(20)
        assert not worker.is_alive()
        assert isinstance(told[0], ConnectionLostError)
        assert isinstance(told[1].error, ConnectionLostError)
        assert len(lab.detached) == 1
        proxy.back()
        assert await lab.catch_up() == [1]
        assert partials(own_server, lab.identity, b"r") == [b"x", b"y"]

    run(proxy.socket, test)


def test_the_heartbeat_does_not_wait_for_its_own_rebirth(run: Run, own_server: Redis) -> None:
    async def test(lab: Lab) -> None:
        await lab.append(b"r")
        fence = lab.identity.everywhere("fence", b"p1")
        await async_io.run(lab.server.exchange(fence, 5))
        told: list[Any] = []

        def flow() -> Flow[None]:
            for _ in range(2):
                try:
                    yield Send((lab.identity.append(b"r", b"x"),), first=True)
                except ConnectionLostError as error:
                    told.append(error)

        await lab.driver.spawn(flow(), "background").join(8)
        assert len(told) == 2

    run(own_server.socket, test)


# Callers that are cancelled


def effects(lab: Lab) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Effects that wait, and their results for a flow whose caller has gone."""
    job = Job(lambda: time.sleep(0.2))
    alarm = lab.driver.signal()
    request = lab.identity.library.request("survey", lab.identity.partitions.prefixes[0])
    return {
        "Send": (lambda: Send((lab.identity.append(b"r", b"effect"),)), [1]),
        "Read": (lambda: Read((request,)), [[b"p1"]]),
        "Sleep": (lambda: Sleep(60), None),
        "AwaitMail": (lambda: AwaitMail(0, "p1/1", 60), False),
        "Wait": (lambda: Wait(alarm, 60), False),
        "Execute": (lambda: Execute((job,)), None),
    }


@pytest.mark.parametrize("name", ["Send", "Read", "Sleep", "AwaitMail", "Wait", "Execute"])
def test_a_cancelled_flow_goes_on(run: Run, own_server: Redis, proxy: Proxy, name: str) -> None:
    async def test(lab: Lab) -> None:
        gate = lab.driver.signal()

        def flow(effect: Any) -> Flow[Any]:
            yield Send((lab.identity.append(b"r", b"first"),))
            yield Wait(gate, 20)
            found = yield effect
            gone = yield CALLER_GONE
            yield Send((lab.identity.append(b"r", b"last"),))
            return found, gone

        for pause in (0.05, 0, 0.0005, 0.001, 0.002):
            make, result = effects(lab)[name]
            task = asyncio.create_task(lab.driver.run(flow(make())))
            await until(lambda: partials(own_server, lab.identity, b"r"))
            with proxy.stalled() if pause == 0.05 else contextlib.nullcontext():
                gate.set()
                await asyncio.sleep(pause)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            assert task.cancelled() or pause < 0.05
            if lab.detached:
                begun = time.monotonic()
                ((found, gone),) = await lab.catch_up()
                assert found == result
                assert gone or pause < 0.05
                assert time.monotonic() - begun < 5
            assert partials(own_server, lab.identity, b"r")[-1] == b"last"
            with own_server.client() as client:
                client.delete(lab.identity.key("partials", b"r"))

    run(proxy.socket, test)


def test_a_branch_of_a_cancelled_flow_goes_on_once(
    run: Run, own_server: Redis, proxy: Proxy
) -> None:
    async def test(lab: Lab) -> None:
        gate, told = lab.driver.signal(), []

        def branch() -> Flow[None]:
            told.append((yield Send((lab.identity.append(b"r", b"branch"),))))

        def flow() -> Flow[None]:
            yield Send((lab.identity.append(b"r", b"first"),))
            yield Wait(gate, 20)
            told.append((yield Branch(branch())).error)

        task = asyncio.create_task(lab.driver.run(flow()))
        await until(lambda: partials(own_server, lab.identity, b"r"))
        with proxy.stalled():
            gate.set()
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
        await lab.catch_up()
        assert sorted(map(type, told), key=str) == [list, ConnectionLostError]
        assert [1] in told
        assert partials(own_server, lab.identity, b"r") == [b"first", b"branch"]

    run(proxy.socket, test)


def test_a_flow_that_is_cancelled_before_anything_was_sent_ends(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        undone: list[str] = []

        def flow() -> Flow[None]:
            try:
                yield Sleep(60)
            except asyncio.CancelledError:
                undone.append("yes")
                raise

        task = asyncio.create_task(lab.driver.run(flow()))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert undone == ["yes"]
        assert not lab.detached

    run(server.socket, test)


def test_many_cancellations(run: Run, own_server: Redis) -> None:
    async def test(lab: Lab) -> None:
        chance = random.Random(7)  # noqa: S311 - a test's schedule
        acknowledged: list[bytes] = []
        tried: list[bytes] = []

        async def one(partial: bytes) -> None:
            tried.append(partial)
            await lab.append(b"same", partial)
            acknowledged.append(partial)

        for i in range(300):
            tasks = [asyncio.create_task(one(b"%d-%d" % (i, j))) for j in range(5)]
            await asyncio.sleep(chance.choice([0, 0, 0.0002, 0.0005]))
            for task in tasks:
                if chance.random() < 0.5:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await lab.catch_up()
        found = Counter(partials(own_server, lab.identity, b"same"))
        assert set(found.values()) == {1}
        assert set(acknowledged) <= set(found) <= set(tried)
        assert len(acknowledged) < len(tried)
        assert is_idle(lab)

    run(own_server.socket, test)


# Other effects


def test_reading(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        with server.client() as client:
            client.delete(lab.identity.partitions.prefixes[1] + b"lanes")
            client.set(lab.identity.partitions.prefixes[1] + b"lanes", "foreign")

        def flow() -> Flow[Any]:
            return (yield Read(lab.identity.everywhere("survey")[:2]))

        good, bad = await lab.driver.run(flow())
        assert good == [b"p1"]
        assert isinstance(bad, ServerError)

    run(server.socket, test)


def test_signals(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        alarm = lab.driver.signal()

        def flow(seconds: float) -> Flow[Any]:
            return (yield Wait(alarm, seconds))

        assert not await lab.driver.run(flow(0.01))
        alarm.set()
        assert await lab.driver.run(flow(10))
        assert not await lab.driver.run(flow(0.01))
        waiting = asyncio.create_task(lab.driver.run(flow(10)))
        await asyncio.sleep(0.02)
        threading.Thread(target=alarm.set).start()
        assert await waiting

    run(server.socket, test)


def test_a_flow_without_a_caller_does_not_pause(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        def flow() -> Flow[Any]:
            yield Sleep(60)
            mail = yield AwaitMail(0, "p1/1", 60)
            yield FLUSH
            return (yield CALLER_GONE), mail

        def outer() -> Flow[Any]:
            return (yield Branch(flow()))

        assert await lab.driver.run(outer()) == Outcome((True, False))

    run(server.socket, test)


def raises(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def generator_function() -> Iterator[int]:
    yield 1


def test_executing(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        async def double() -> int:
            await asyncio.sleep(0)
            assert EXECUTING.get()
            return 2

        def maybe(function: Callable[[], Any]) -> Any:
            return function()

        async def cancels() -> None:
            raise asyncio.CancelledError("its own")

        async def exits() -> None:
            raise SystemExit(3)

        error = KeyError("mine")
        assert await lab.driver.run(call(double)) == Outcome(2)
        assert await lab.driver.run(call(partial(maybe, double))) == Outcome(2)
        assert await lab.driver.run(call(EXECUTING.get)) == Outcome(True)
        assert not EXECUTING.get()
        assert await lab.driver.run(call(raises(error))) == Outcome(error=error)
        for stop in (KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
            assert await lab.driver.run(call(raises(stop))) == Outcome(error=stop)
        outcome = await lab.driver.run(call(raises(StopIteration(7))))
        assert "StopIteration" in str(outcome.error)
        outcome = await lab.driver.run(call(generator_function))
        assert "never ran" in str(outcome.error)
        outcome = await lab.driver.run(call(cancels))
        assert isinstance(outcome.error, asyncio.CancelledError)
        outcome = await lab.driver.run(call(exits))
        assert isinstance(outcome.error, SystemExit)

    run(server.socket, test)


def test_so_much_runs_at_a_time_and_what_that_runs_needs_no_place(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        running = most = 0

        async def inner() -> str:
            await asyncio.sleep(0.005)
            return "inner"

        async def outer() -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            outcome = await lab.driver.run(call(inner))
            running -= 1
            return outcome.value

        jobs = [Job(outer) for _ in range(10)]

        def flow() -> Flow[None]:
            while any(job.outcome is None for job in jobs):
                yield Execute([job for job in jobs if job.outcome is None])

        await lab.driver.run(flow())
        assert [job.outcome for job in jobs] == [Outcome("inner")] * 10
        assert most == 3

    run(server.socket, test, max_concurrent=3)


def test_a_slice_of_execution(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        jobs = [Job(lambda: asyncio.sleep(0.03)) for _ in range(8)]

        def flow() -> Flow[int]:
            rounds = 0
            while any(job.outcome is None for job in jobs):
                yield Execute([job for job in jobs if job.outcome is None])
                rounds += 1
            return rounds

        assert 2 <= await lab.driver.run(flow()) <= 9

    run(server.socket, test, slice=0.05)


# Mail


async def wait_for_mail(lab: Lab, waiter: str, seconds: float = 20.0) -> tuple[bool, float]:
    def flow() -> Flow[Any]:
        return (yield AwaitMail(0, waiter, seconds))

    begun = time.monotonic()
    return bool(await lab.driver.run(flow())), time.monotonic() - begun


def post(server: Redis, lab: Lab, *waiters: str) -> None:
    prefix = lab.identity.partitions.prefixes[0]
    with server.client() as client:
        client.rpush(prefix + b"mailbox:" + lab.identity.lanes[0].process, *waiters)


@pytest.mark.parametrize("colocated", [True, False])
def test_mail(run: Run, own_server: Redis, colocated: bool) -> None:
    async def test(lab: Lab) -> None:
        lab.server.colocated = colocated  # as a cluster's
        waiting = {f"p1/{i}": asyncio.create_task(wait_for_mail(lab, f"p1/{i}")) for i in range(5)}
        with own_server.client() as client:
            await until(lambda: client.info("clients")["blocked_clients"] == 1)
        for waiter, task in reversed(waiting.items()):
            assert not task.done()
            post(own_server, lab, waiter)
            assert (await asyncio.wait_for(task, 5))[0]
        assert (await wait_for_mail(lab, "p1/9", 0.05))[0] is False
        other = asyncio.create_task(wait_for_mail(lab, "p1/7"))
        post(own_server, lab, "p1/8", "p1/", "p1/7")
        assert (await other)[0]
        woken, took = await wait_for_mail(lab, "p1/8")
        assert woken
        assert took < 5
        several = [asyncio.create_task(wait_for_mail(lab, f"p1/{i}")) for i in range(3)]
        await asyncio.sleep(0.02)
        await lab.reborn(b"p2")
        assert all(woken for woken, _ in await asyncio.gather(*several))

    run(own_server.socket, test)


def test_waiting_for_mail_at_a_server_that_is_gone(run: Run, own_server: Redis) -> None:
    async def test(lab: Lab) -> None:
        own_server.kill()
        woken, took = await wait_for_mail(lab, "p1/1", 0.3)
        assert not woken
        assert 0.2 < took < 10

    run(own_server.socket, test)


# Loops, the end, forks


def test_another_event_loop_is_refused(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        def elsewhere() -> None:
            asyncio.run(lab.append(b"r"))

        with pytest.raises(ConfigurationError, match="another event loop"):
            await asyncio.to_thread(elsewhere)
        assert await lab.append(b"r") == 1

    run(server.socket, test)


def test_loops_side_by_side(run: Run, own_server: Redis) -> None:
    def loop(number: int) -> None:
        async def main() -> None:
            lab = Lab(own_server.socket, f"loop{number}")
            await lab.begin(b"p1")
            await asyncio.gather(*[lab.append(b"same") for _ in range(300)])
            assert len(partials(own_server, lab.identity, b"same")) == 300
            await lab.close()

        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    errors: list[BaseException] = []
    threads = [threading.Thread(target=loop, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors


def test_nothing_goes_on_after_the_end(run: Run, own_server: Redis, proxy: Proxy) -> None:
    """`Lab.close` checks that no task is left, whatever was under way."""

    async def test(lab: Lab) -> None:
        proxy.gone()
        waiting = [asyncio.create_task(lab.append(b"r")) for _ in range(3)]
        waiting.append(asyncio.create_task(wait_for_mail(lab, "p1/1")))
        waiting.append(asyncio.create_task(lab.driver.run(call(lambda: asyncio.sleep(60)))))
        lab.driver.spawn(call(lambda: asyncio.sleep(60)), "worker")
        await asyncio.sleep(0.1)
        waiting[0].cancel()
        await lab.driver.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert isinstance(results[1], ConnectionLostError)
        with pytest.raises(RuntimeError, match="was stopped"):
            lab.driver.spawn(call(list), "late")

    run(proxy.socket, test)


def test_a_forked_child_is_refused(run: Run, server: Redis) -> None:
    async def test(lab: Lab) -> None:
        await lab.append(b"r")
        child = os.fork()
        if not child:
            status = 1
            try:
                lab.driver.after_fork_in_child()
                after_fork_in_child()
                with pytest.raises(ForkedError):
                    lab.append(b"r").send(None)
                status = 0
            except BaseException:  # noqa: BLE001 - pytest must not go on here
                traceback.print_exc()
            finally:
                os._exit(status)
        assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
        assert await lab.append(b"r") == 1

    run(server.socket, test)


def test_an_interrupt_ends_the_loop_and_nothing_is_acknowledged_in_vain(
    own_server: Redis, namespace: str
) -> None:
    acknowledged: list[bytes] = []

    async def main() -> None:
        lab = Lab(own_server.socket, namespace)
        await lab.begin(b"p1")
        try:
            for i in range(1_000_000):
                await lab.append(b"same", b"%d" % i)
                acknowledged.append(b"%d" % i)
        finally:
            await lab.close()

    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        asyncio.run(main())
    found = partials(own_server, Identity(namespace), b"same")
    assert found[: len(acknowledged)] == acknowledged
    assert 0 <= len(found) - len(acknowledged) <= 1
