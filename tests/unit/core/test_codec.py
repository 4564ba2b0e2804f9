"""Updates become partials, and partials become updates."""

import asyncio
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

from phonon import ConflictFreeUpdate, ExactSerializer, LruCache, Update
from phonon._core import classes, codec
from phonon._core.codec import UpdateCodec
from phonon.aio import AsyncUpdate
from phonon.errors import ConfigurationError, NotStorableError, UndecodableError, UnknownClassError


class FakeEngine:
    """As much of an engine as an update needs that is not sent anywhere."""

    is_async = False
    most_bytes = 1 << 30
    messages = itertools.count()

    def __init__(self, public: Callable[[], Any]) -> None:
        self.identity = types.SimpleNamespace(generation=object())
        self.messages = itertools.count()
        self.trace = None
        self.merged = 0
        self.outbox = types.SimpleNamespace(full=False, unsent=[])
        self.members = types.SimpleNamespace(held={})
        self.sessions = types.SimpleNamespace(watch=lambda *_: None)
        self.prefixes: dict[Any, str] = {}
        self.batches: set[Any] = set()
        self.durable_batches: set[Any] = set()
        self.batch = None
        self.caches: set[Any] = set()
        self.stripes = [threading.RLock()]
        self.codec = UpdateCodec(ExactSerializer(), public, self.is_async)
        self.members.join = lambda _: None

    def run(self, _: Any) -> list[BaseException]:
        return []


class FakeProcess:
    BLOCKING_TIMEOUT = 1.0

    def __init__(self) -> None:
        self._engine = FakeEngine(lambda: self)

    @property
    def engine(self) -> FakeEngine:
        return self._engine


@pytest.fixture
def process() -> Any:
    return FakeProcess()


class Visits(Update):
    def __init__(self, process: Any, key: Any, pages: Any = (), **options: Any) -> None:
        self.pages = list(pages)
        super().__init__(process, key, init_cache=False, **options)

    def state(self) -> dict[str, Any]:
        return {"pages": self.pages}

    def reset_states(self) -> None:
        self.pages = []

    def merge(self, other: Any) -> None:
        self.pages += other.pages

    def execute(self) -> None:
        pass


class Sum(ConflictFreeUpdate):
    def execute(self) -> None:
        pass


def partial_of(update: Update) -> bytes:
    partial = update.take()
    assert partial is not None
    return partial


def forged(partial: bytes, **changes: Any) -> bytes:
    """Return a partial with other content."""
    layout, name, serializer, body = msgpack.unpackb(partial)
    content = ExactSerializer().loads(body)
    for at, field in enumerate(("_id", "database", "collection", "spec", "doc", "state")):
        content[at] = changes.get(field, content[at])
    return bytes(msgpack.packb([layout, name, serializer, ExactSerializer().dumps(content)]))


# Partials


def test_a_partial_comes_back_as_it_was(process: Any) -> None:
    update = Visits(process, (1, "x"), ["a"], database="d.b", spec={"k": 1}, doc={"n": {"m": [1]}})
    resource = update.resource_id
    copy = process.engine.codec.decode(resource, partial_of(update), "key")
    assert (copy._id, copy.database, copy.collection) == ((1, "x"), "d.b", "test")
    assert (copy.spec, copy.doc, copy.pages) == ({"k": 1}, {"n": {"m": [1]}}, ["a"])
    assert (copy.resource_id, copy.process()) == (resource, process)
    assert update.take() is None, "it is empty"


@pytest.mark.parametrize("length", [10, 300, 70_000])
def test_partials_of_any_length_are_msgpack(process: Any, length: int) -> None:
    partial = partial_of(Sum(process, 1, doc={"s": "x" * length}, init_cache=False))
    layout, name, serializer, _ = msgpack.unpackb(partial)
    assert (layout, name, serializer) == (1, f"{__name__}.Sum", "x1")
    assert process.engine.codec.decode("test.test.1", partial, "key").doc == {"s": "x" * length}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_id": 2}, r"belongs to another resource, '2'"),
        ({"database": "other"}, "belongs to another resource"),
        ({"database": 7}, "does not hold an update's content"),
        ({"state": {"execute": 1}}, r"Visits.state\(\) does not name: 'execute'"),
        ({"state": {"__class__": 1}}, "does not name: '__class__'"),
        ({"state": {"_engine_": 1}}, "does not name: '_engine_'"),
        ({"state": {"token": 1}}, "does not name: 'token'"),
        ({"state": {"resource_id": "x"}}, "does not name: 'resource_id'"),
        ({"state": {"pages": [], "more": 1}}, "does not name: 'more'"),
        ({"state": {1: 2}}, "does not name: 1"),
    ],
)
def test_what_is_forged_is_not_decoded(process: Any, changes: Any, words: str) -> None:
    partial = forged(partial_of(Visits(process, 1, ["a"])), **changes)
    with pytest.raises(UndecodableError, match=words):
        process.engine.codec.decode("test.test.1", partial, "key")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"\xff" * 9,
        b"\x94\x01\xa3\xff\xfe\xfd\xa2x1\xc4\x00",
        msgpack.packb([1, 5, "x1", b""]),
        msgpack.packb([1, f"{__name__}.Sum", "x1", "text"]),
        msgpack.packb([1, f"{__name__}.Sum", "x1", b"\xff\xff"]),
        b"\xdd\xff\xff\xff\xff" * 100_000,
        b"\x94" + b"\xdd\x00\x0f\xff\xff" * 400 + b"\x00" * 5000,
    ],
)
def test_junk_is_undecodable_and_takes_no_memory(process: Any, data: bytes) -> None:
    with pytest.raises((UndecodableError, UnknownClassError), match=r"'r' in the key"):
        process.engine.codec.decode("r", data, "the key")


def test_records_are_merged_class_by_class(process: Any) -> None:
    updates: list[Any] = [
        Visits(process, 1, ["a"]),
        Sum(process, 1, doc={"n": 1}, init_cache=False),
        Visits(process, 1, ["b"]),
        Sum(process, 1, doc={"n": 2}, init_cache=False),
    ]
    partials = [partial_of(update) for update in updates]
    records = process.engine.codec.records("test.test.1", partials, updates[0])
    instances: list[Any] = [record.begin(n) for n, record in enumerate(records)]
    first, second = instances
    assert first is updates[0], "the update that ended the session executes"
    assert (first.pages, first.token, second.doc) == (["a", "b"], 0, {"n": 3})
    for record in records:
        record.finish()
    assert (first.token, second.token) == (None, None)
    merged = process.engine.codec.merge("test.test.1", partials)
    assert len(merged) == 2


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (1, TypeError, r"merge\(\) returned 1"),
        (StopIteration(), RuntimeError, r"merge\(\) has raised StopIteration"),
        (KeyError("x"), KeyError, "x"),
    ],
)
def test_what_merge_should_not_do(process: Any, result: Any, error: Any, words: str) -> None:
    class Odd(Sum, name="test.Odd"):
        def merge(self, other: Any) -> Any:
            del other
            if isinstance(result, Exception):
                raise result
            return result

    updates = [Odd(process, 1, doc={"n": n}, init_cache=False) for n in (1, 2)]
    partials = [partial_of(update) for update in updates]
    with pytest.raises(error, match=words):
        process.engine.codec.records("test.test.1", partials, None)
    assert process.engine.codec.merge("test.test.1", partials) == partials, "left as they are"
    classes.forget(Odd)


def test_a_merge_that_returns_something_has_not_merged(process: Any) -> None:
    class Lazy(Sum, name="test.Lazy"):
        def merge(self, other: Any) -> Any:
            return asyncio.sleep(0, other)

    cache: LruCache[Lazy] = LruCache()
    cache.set(1, Lazy(process, 1, doc={"n": 1}, init_cache=False))
    late = Lazy(process, 1, doc={"n": 2}, init_cache=False)
    with pytest.raises(TypeError, match="it changes self and returns None"):
        cache.set(1, late)
    assert late.has_unsent()
    classes.forget(Lazy)


def test_a_state_that_stops_an_iteration_is_an_ordinary_failure(process: Any) -> None:
    update = Sum(process, 1, doc={"n": 1}, init_cache=False)

    def state() -> dict[str, Any]:
        raise StopIteration

    update.state = state  # type: ignore[method-assign]  # it breaks later on
    with pytest.raises(RuntimeError, match=r"state\(\) has raised StopIteration"):
        update.take()
    assert update.has_unsent()


def test_a_refused_partial_is_unsent_again(process: Any) -> None:
    update = Sum(process, 1, doc={"n": 1}, init_cache=False)
    partial = partial_of(update)
    update.refresh(Sum(process, 1, doc={"n": 10}, init_cache=False))
    update.put_back(partial)
    assert update.doc == {"n": 11}
    assert process.engine.codec.decode("test.test.1", partial_of(update), "k").doc == {"n": 11}


# The caller's data


def test_one_dict_refilled_for_each_message(process: Any) -> None:
    cache: LruCache[Sum] = LruCache()
    message: dict[str, Any] = {}
    for n in range(10):
        message.clear()
        message.update(n=n, nested={"m": 1}, tags=["x"])
        cache.set(n % 3, Sum(process, n % 3, doc=message, init_cache=False))
    found = [cache.get(key).doc for key in range(3)]  # type: ignore[union-attr]  # it is there
    assert [doc["n"] for doc in found] == [18, 12, 15]
    assert [doc["nested"] for doc in found] == [{"m": 4}, {"m": 3}, {"m": 3}]
    assert message == {"n": 9, "nested": {"m": 1}, "tags": ["x"]}


@pytest.mark.parametrize(
    "doc",
    [{"a": [1]}, [1, [2]], {"a": {"b": {"c": [1]}}}, {1, 2}, {"k": (1, [2])}, {(1, 2): [3]}],
)
def test_changes_of_the_callers_do_not_reach_the_record(process: Any, doc: Any) -> None:
    before = repr(doc)
    update = Sum(process, 1, spec=doc, doc=doc, init_cache=False)
    assert repr(update.doc) == repr(update.spec) == before
    assert update.doc is not doc
    stack = [doc]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
            value["changed"] = 1
        elif isinstance(value, list):
            stack += value
            value.append(0)
        elif isinstance(value, tuple):
            stack += value
        elif isinstance(value, set):
            value.add(0)
    assert repr(update.doc) == repr(update.spec) == before


def test_what_cannot_be_stored_is_refused_in_the_constructor(process: Any) -> None:
    for options in ({"doc": {"x": object()}}, {"spec": {1: {2: object()}}}, {"doc": object()}):
        with pytest.raises(NotStorableError, match=r"Sum\.(doc|spec)"):
            Sum(process, 1, init_cache=False, **options)
    with pytest.raises(NotStorableError, match=r"Visits\.pages\[1\]"):
        Visits(process, 1, ["a", object()])


# Keys


def test_an_update_of_another_record_or_class_is_not_merged(process: Any) -> None:
    cache: LruCache[Any] = LruCache()
    entry = Sum(process, 1, doc={"n": 1}, init_cache=False)
    cache.set("k", entry)
    other = Sum(process, 2, doc={"n": 2}, init_cache=False)
    for wrong in (other, Visits(process, 1, ["a"])):
        with pytest.raises(ConfigurationError, match="one key for each record and class"):
            cache.set("k", wrong)
        with pytest.raises(ConfigurationError, match="cannot be merged"):
            entry.refresh(wrong)
        assert wrong.has_unsent()
    assert entry.doc == {"n": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"database": 3}, "database is a str, not 3"),
        ({"collection": ["x"]}, "collection is a str"),
        ({"soft_session": "1"}, "soft_session is a number of seconds, not '1'"),
        ({"hard_session": float("nan")}, "hard_session is a number of seconds, not nan"),
    ],
)
def test_arguments_are_checked(process: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Sum(process, 1, init_cache=False, **options)


def test_a_process_is_a_process() -> None:
    with pytest.raises(ConfigurationError, match="process is a Process, not 'redis"):
        Sum("redis://localhost", 1)  # type: ignore[arg-type]  # it is refused


@pytest.mark.parametrize("most", [0, "9", 2.5, None])
def test_a_cache_has_a_whole_number_of_entries(most: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_entries"):
        LruCache(max_entries=most)


# Classes


def make(name: str | None = None) -> type[Update]:
    class Made(Sum, name=name):
        pass

    return Made


def test_two_living_classes_of_one_name_are_refused() -> None:
    first = make()
    with pytest.raises(ConfigurationError, match=r"class Made\(\.\.\., name="):
        make()
    second = make("second")
    assert classes.find("second") is second
    with pytest.raises(ConfigurationError, match="two classes are called 'second'"):
        make("second")
    assert classes.find(f"{__name__}.make.<locals>.Made") is first
    classes.forget(second)
    classes.forget(first)


def test_the_name_of_a_class_that_is_gone_may_be_used_again() -> None:
    make("again")
    classes.forget(make("again"))


def test_a_module_may_be_loaded_again() -> None:
    text = "from phonon import ConflictFreeUpdate\nclass Row(ConflictFreeUpdate): pass"
    found: list[Any] = []
    for _ in range(2):
        namespace: dict[str, Any] = {"__name__": "test_reloaded"}
        exec(text, namespace)  # noqa: S102 - what reload() does
        found.append(namespace["Row"])
    first, second = found
    assert first is not second
    assert classes.find("test_reloaded.Row") == second
    classes.forget(second)


@pytest.mark.filterwarnings("ignore:Row is defined in the script")
def test_the_script_has_one_name_in_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from phonon import ConflictFreeUpdate\nclass Row(ConflictFreeUpdate): pass"
    for name in ("__main__", "__mp_main__"):
        for spec, expected in ((None, "__main__"), (types.SimpleNamespace(name="app.w"), "app.w")):
            module = types.ModuleType(name)
            module.__spec__ = spec  # type: ignore[assignment]  # as much as is looked at
            monkeypatch.setitem(sys.modules, name, module)
            exec(text, module.__dict__)  # noqa: S102 - as runpy does
            assert classes.name_of(module.Row) == f"{expected}.Row"
            classes.forget(module.Row)


@pytest.mark.parametrize("name", ["", 3])
def test_a_name_is_text(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="a str, not"):
        make(name)


def test_methods_that_would_never_run_are_refused() -> None:
    async def coroutine(*_: Any) -> None:
        pass

    def generator(*_: Any) -> Iterator[None]:
        yield

    async def stream(*_: Any) -> Any:
        yield

    for name in ("merge", "state", "execute"):
        for method in (coroutine, generator, stream):
            with pytest.raises(TypeError, match=rf"Bad\.{name} "):
                type("Bad", (Sum,), {name: method})
    type("Good", (AsyncUpdate,), {"execute": coroutine, "__qualname__": "f.<locals>.Good"})
    with pytest.raises(TypeError, match="has a yield in it"):
        type("Bad", (AsyncUpdate,), {"execute": stream})
    with pytest.raises(TypeError, match="nothing awaits it"):
        type("Bad", (AsyncUpdate,), {"merge": coroutine})


def test_the_codec_knows_what_it_can_execute(process: Any) -> None:
    class Later(AsyncUpdate, name="test.Later"):
        pass

    known = UpdateCodec(ExactSerializer(), lambda: process, is_async=False)
    assert known.can_execute(f"{__name__}.Sum")
    assert not known.can_execute("test.Later")
    assert not known.can_execute("nobody's")
    assert UpdateCodec(ExactSerializer(), lambda: process, is_async=True).can_execute("test.Later")
    partial = partial_of(Sum(process, 1, doc={"n": 1}, init_cache=False))
    known.check("test.test.1", partial)
    header = codec._header(Later, ExactSerializer())
    with pytest.raises(UnknownClassError, match="no event loop"):
        known.check("test.test.1", header + partial[len(codec._header(Sum, ExactSerializer())) :])
    classes.forget(Later)
