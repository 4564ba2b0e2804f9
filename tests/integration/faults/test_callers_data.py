"""Objects that a caller passes stay the caller's, and are not shared."""

from collections import Counter
from typing import Any

import pytest

from phonon import LruCache, Process, RetryPolicy, SignedPickleSerializer, Update
from support.both import APIS, Api, got
from support.samples import Tally
from support.world import Make, Redis


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
@pytest.mark.parametrize("in_batch", [True, False])
def test_one_dict_for_all(api: Api, in_batch: bool, server: Redis, namespace: str) -> None:
    """With a merge that changes `doc` in place, ada and bob had 512 each."""

    def merge(self: Any, other: Any) -> None:
        for page, n in other.doc.items():
            self.doc[page] = self.doc.get(page, 0) + n

    Views, one = api.tally(), {"/home": 1}  # noqa: N806 - a class
    Views.merge = merge

    async def played() -> None:
        process = api.process(url=server.url, namespace=namespace)
        if api.is_async:
            await process.start()
        cache = api.cache()

        async def handle() -> None:
            for record in ["ada"] * 10 + ["bob"]:
                await got(cache.set(record, Views(process, record, doc=one)))

        if in_batch:
            async with api.enter(process.batch()):
                await handle()
        else:
            await handle()
        await got(process.stop())

    api.run(played)
    assert one == {"/home": 1}
    totals: dict[Any, int] = {}
    for entry in Views.written:
        totals[entry.record] = totals.get(entry.record, 0) + entry.doc["/home"]
    assert totals == {"ada": 10, "bob": 1}


@pytest.mark.parametrize(
    "make_doc",
    [
        lambda n: {"n": n},
        lambda n: {"nested": {"n": n}},
        lambda n: {"list": [n]},
        lambda n: {"deep": [{"n": {n}}]},
        lambda n: [n],
    ],
)
@pytest.mark.parametrize("argument", ["doc", "spec", "attribute", "_id"])
def test_one_object_that_is_refilled_for_each_message(
    make: Make, argument: str, make_doc: Any
) -> None:
    class Kept(Update, name=f"kept {argument}"):
        attribute: Any = None

        def __init__(self, process: Process, name: str, **options: Any) -> None:
            self.attribute = options.pop("attribute", None)
            super().__init__(process, options.pop("_id", name), **options)

        def state(self) -> dict[str, Any]:
            return {"attribute": self.attribute}

        def merge(self, _: Any) -> None:
            raise AssertionError

        def execute(self) -> None:
            written.append(getattr(self, argument))

    process, written = make(), list[Any]()
    value = make_doc(1)
    expected = [make_doc(1), make_doc(2)]
    cache: LruCache[Kept] = LruCache()
    cache.set(1, Kept(process, "one", **{argument: value}, init_cache=False))
    value.clear()
    value.update(make_doc(2)) if isinstance(value, dict) else value.extend(make_doc(2))
    cache.set(2, Kept(process, "two", **{argument: value}, init_cache=False))
    value.clear()
    cache.expire_all()
    assert written == expected


def test_an_update_that_was_merged_is_not_changed_with_the_other(make: Make) -> None:
    class Listing(Tally, name="a listing"):
        def merge(self, other: Any) -> None:
            for name, values in other.doc.items():
                self.doc.setdefault(name, []).extend(values)

    process = make()
    given = {"x": [1]}
    entry = Listing(process, "record", doc={}, init_cache=False)
    entry.cache()
    entry.refresh(Listing(process, "record", doc=given, init_cache=False))
    entry.refresh(Listing(process, "record", doc={"x": [2]}, init_cache=False))
    assert entry.doc == {"x": [1, 2]}
    assert given == {"x": [1]}


def test_arguments_of_a_callback_are_those_of_the_call(process: Process) -> None:
    seen: list[Any] = []
    arguments = [1]

    def change_and_see(n: int) -> None:
        arguments.append(2)
        seen.append(n)

    process.create_reference("resource").dereference(change_and_see, args=arguments)
    assert seen == [1]


def test_the_list_that_execute_many_is_given_may_be_changed(make: Make) -> None:
    class Many(Tally, name="many that are sorted"):
        @classmethod
        def execute_many(cls, updates: Any) -> None:
            for update in sorted(updates, key=lambda update: update._id):
                if update._id == "bad" and len(updates) == 1:
                    updates.clear()
                    raise ValueError
                if update._id != "bad":
                    Tally.execute(update)
            if len(updates) > 1:
                updates.clear()
                cls.written.clear()
                raise ValueError  # all of it was rolled back

    process = make(retry=RetryPolicy(attempts=1))
    cache: LruCache[Many] = LruCache()
    for record in ("good", "bad", "better"):
        cache.set(record, Many(process, record, doc={"n": 1}, init_cache=False))
    with pytest.raises(ExceptionGroup) as caught:
        cache.expire_all()
    assert len(caught.value.exceptions) == 1
    assert Many.docs() == {"good": {"n": 1}, "better": {"n": 1}}


def test_objects_of_a_signed_serializer(make: Make) -> None:
    process = make(serializer=SignedPickleSerializer("key" * 16))
    value = {"n": Counter(x=1)}
    update = Tally(process, "record", doc=value, init_cache=False)
    value["n"]["x"] = 2
    assert update.doc == {"n": Counter(x=1)}
