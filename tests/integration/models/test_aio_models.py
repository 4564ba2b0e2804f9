"""Models in tasks: the same as in threads, to be awaited."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import pytest

from phonon import Model
from phonon.aio import AsyncProcess
from phonon.errors import ConfigurationError, InvalidMessageError
from phonon.fields import ID, Count, Counter, Sum
from support.both import until
from support.world import Make, Redis


class Views(Model, name="test_aio_views"):
    user: ID[str]
    views: Sum[int] = Sum()
    pages: Counter[str] = Counter()

    done: ClassVar[list["Views"]] = []

    async def on_complete(self) -> None:
        await asyncio.sleep(0)
        self.done.append(self)


class Many(Model, name="test_aio_many"):
    id: ID[int]
    hits: Count = Count()

    done: ClassVar[list[int]] = []

    @classmethod
    async def on_complete_many(cls, records: Sequence[Self]) -> Any:
        await asyncio.sleep(0)
        cls.done.append(len(records))


class Plain(Model, name="test_aio_plain"):
    id: ID[int]
    hits: Count = Count()

    done: ClassVar[list["Plain"]] = []

    def on_complete(self) -> None:
        self.done.append(self)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for model in (Views, Many, Plain):
        model.done.clear()


def run(
    server: Redis, namespace: str, main: Callable[[AsyncProcess], Awaitable[None]], **options: Any
) -> None:
    async def work() -> None:
        async with AsyncProcess(url=server.url, namespace=namespace, **options) as process:
            await main(process)

    asyncio.run(work())


def test_messages_come_to_one_record(server: Redis, namespace: str) -> None:
    async def main(process: AsyncProcess) -> None:
        views = process.collect(Views)
        await views.add("ada", views=1)
        stored = await views.read("ada")
        assert stored is not None
        assert stored.views == 1
        async with process.batch():
            await views.add("ada", views=2, pages={"/": 1})
            await views.add("bob", 5)
            with pytest.raises(InvalidMessageError):
                await views.add("ada", views="x")  # type: ignore[arg-type]  # what is wrong with it
        rejected = await views.add_many([{"user": "ada", "views": 4}, {"user": 1}])
        assert [row for row, _ in rejected] == [1]
        await views.expire("ada")
        assert Views.done == [Views("ada", 7, {"/": 1})]
        await views.expire_all()
        assert len(Views.done) == 2

    run(server, namespace, main)


def test_a_task_has_a_batch_of_its_own(server: Redis, namespace: str) -> None:
    async def main(process: AsyncProcess) -> None:
        views = process.collect(Views)
        mine, theirs = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            await mine.wait()
            async with process.batch():
                await views.add("bob", views=2)
            stored = await views.read("bob")
            assert stored is not None, "the block has ended"
            theirs.set()

        task = asyncio.create_task(work())
        async with process.batch():
            await views.add("ada", views=1)
            mine.set()
            await theirs.wait()
            assert await views.read("ada") is None, "this block has not"
        await task
        assert await views.read("ada") is not None

    run(server, namespace, main)


def test_records_complete_together_and_in_threads(server: Redis, namespace: str) -> None:
    async def main(process: AsyncProcess) -> None:
        many = process.collect(Many)
        await many.add_many({"id": i} for i in range(20))
        await many.expire_all()
        assert Many.done == [20]
        plain = process.collect(Plain, idle=0.1)
        await plain.add(3)
        await until(lambda: Plain.done)
        assert Plain.done[0].hits == 1

    run(server, namespace, main)


def test_threads_and_tasks_share_records(server: Redis, namespace: str, make: Make) -> None:
    plain = make().collect(Plain)
    plain.add(1)

    async def main(process: AsyncProcess) -> None:
        there = process.collect(Plain)
        await there.add(1)
        plain.expire(1)
        assert not Plain.done

    run(server, namespace, main)
    assert [record.hits for record in Plain.done] == [2]


def test_arguments_that_no_message_has(server: Redis, namespace: str) -> None:
    async def main(process: AsyncProcess) -> None:
        views: Any = process.collect(Views)
        with pytest.raises(TypeError, match=r"^add\(\) takes from 0 to 3 positional"):
            await views.add("ada", 1, {}, 5)
        with pytest.raises(InvalidMessageError, match=r"add_many\(\) takes whole messages"):
            await views.add({"user": "ada"})
        with pytest.raises(ConfigurationError, match="put it into a list"):
            await views.add_many({"user": "ada"})

    run(server, namespace, main)


def test_a_table_in_a_block_that_is_not_durable_stays_here(server: Redis, namespace: str) -> None:
    polars = pytest.importorskip("polars")

    async def main(process: AsyncProcess) -> None:
        views = process.collect(Views)
        async with process.batch(durable=False):
            for _ in range(3):
                assert (
                    await views.add_table(polars.DataFrame({"user": ["ada"], "views": [1]})) == []
                )
            await views.add("ada", views=10)
        assert await views.read("ada") is None
        await views.expire_all()
        assert [record.views for record in Views.done] == [13]

    run(server, namespace, main)


def test_a_batch_that_fails_leaves_nothing_in_its_records(server: Redis, namespace: str) -> None:
    async def main(process: AsyncProcess) -> None:
        views = process.collect(Views)
        async with process.batch(durable=False):
            await views.add("ada", views=4)
        with pytest.raises(ZeroDivisionError):
            async with process.batch():
                await views.add("ada", views=1)
                raise ZeroDivisionError
        async with process.batch():
            await views.add("ada", views=2)
        await views.expire_all()
        assert [record.views for record in Views.done] == [6]

    run(server, namespace, main)
