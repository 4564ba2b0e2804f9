"""An update that is made without a process, for a unit test of the user's own merge and execute."""

import asyncio
from typing import Any

import pytest

from phonon import ConflictFreeUpdate, LruCache, Update
from phonon.aio import AsyncConflictFreeUpdate
from phonon.errors import ConfigurationError

written: list[tuple[Any, dict[str, int]]] = []


class Visits(ConflictFreeUpdate):
    def execute(self) -> None:
        written.append((self._id, dict(self.doc)))


class AsyncVisits(AsyncConflictFreeUpdate):
    async def execute(self) -> None:
        written.append((self._id, dict(self.doc)))


@pytest.fixture(autouse=True)
def _empty() -> None:
    written.clear()


def test_it_merges_and_executes() -> None:
    visits = Visits(None, "ada", doc={"n": 1})
    visits.merge(Visits(None, "ada", doc={"n": 2}))
    visits.execute()
    assert written == [("ada", {"n": 3})]


def test_it_refreshes_as_in_a_cache() -> None:
    visits, other = Visits(None, "ada", doc={"n": 1}), Visits(None, "ada", doc={"n": 2})
    visits.refresh(other)
    assert visits.doc == {"n": 3}
    assert not visits.is_expired()
    with pytest.raises(ConfigurationError, match="'bob'"):
        visits.refresh(Visits(None, "bob"))


def test_a_cache_merges_it() -> None:
    cache: LruCache[Visits] = LruCache()
    assert cache.set("ada", Visits(None, "ada", doc={"n": 1})) is True
    assert cache.set("ada", Visits(None, "ada", doc={"n": 2})) is False
    found = cache.get("ada")
    assert found is not None
    assert found.doc == {"n": 3}
    with pytest.raises(ConfigurationError, match="without a process"):
        cache.expire("ada")


@pytest.mark.parametrize("call", ["cache", "end_session", "force_expiry"])
def test_what_needs_the_server_says_so(call: str) -> None:
    with pytest.raises(ConfigurationError, match="give a Process as the first argument"):
        getattr(Visits(None, "ada", doc={"n": 1}), call)()


def test_what_cannot_be_stored_is_refused_all_the_same() -> None:
    with pytest.raises(TypeError, match=r"Visits\.doc\['n'\]"):
        Visits(None, "ada", doc={"n": object()})


def test_for_tasks() -> None:
    visits = AsyncVisits(None, "ada", doc={"n": 1})
    visits.merge(AsyncVisits(None, "ada", doc={"n": 2}))
    asyncio.run(visits.execute())
    assert written == [("ada", {"n": 3})]
    with pytest.raises(ConfigurationError, match="without a process"):
        asyncio.run(visits.end_session())


def test_another_object_is_no_process() -> None:
    with pytest.raises(ConfigurationError, match="process is a Process, not 'shop'"):
        Visits("shop", "ada")  # type: ignore[arg-type]


def test_the_base_class_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"make a subclass with merge\(other\)"):
        Update(None, "ada", doc={"n": 1}).take()


def test_a_doc_that_does_not_add_up_says_what_to_do() -> None:
    with pytest.raises(TypeError, match="give it a dict of numbers"):
        Visits(None, "ada", doc=5).merge(Visits(None, "ada", doc=6))
