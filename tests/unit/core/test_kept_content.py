"""A session's last partial, if nothing else is in the batch, is executed without being decoded."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from phonon import Process, Update
from phonon._core.codec import UpdateCodec


class Visits(Update, name="test.KeptVisits"):
    executed: list[tuple[Any, list[str], int | None]] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, process: Any, key: Any, pages: list[str], **options: Any) -> None:
        self.pages = pages
        super().__init__(process, key, **options)

    def state(self) -> dict[str, Any]:
        return {"pages": self.pages}

    def merge(self, other: "Visits") -> None:
        self.pages += other.pages

    def reset_states(self) -> None:
        self.pages.clear()

    def execute(self) -> None:
        self.executed.append((self, list(self.pages), self.token))


@pytest.fixture(autouse=True)
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    Visits.executed.clear()
    seen: list[bytes] = []
    read = UpdateCodec.records

    def spy(self: UpdateCodec, resource: str, partials: Sequence[bytes], local: Any) -> Any:
        seen.extend(partials)
        return read(self, resource, partials, local)

    monkeypatch.setattr(UpdateCodec, "records", spy)
    return seen


def test_what_only_one_process_had_is_not_decoded(process: Process, decoded: list[bytes]) -> None:
    """Not even if `reset_states` empties a list in place."""
    update = Visits(process, "a", ["x", "y"], init_cache=False)
    update.end_session()
    ((instance, pages, token),) = Visits.executed
    assert (instance, pages, decoded) == (update, ["x", "y"], [])
    assert token
    assert update.token is None
    assert not update.has_unsent()


def test_what_is_stored_already_is_decoded(process: Process, decoded: list[bytes]) -> None:
    update = Visits(process, "a", ["x"])
    update.pages += ["y"]
    update.end_session()
    assert [pages for _, pages, _ in Visits.executed] == [["x", "y"]]
    assert len(decoded) == 2


def test_what_is_new_since_then_is_not_executed_too(
    process: Process, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update has taken more in between its last partial and the execution."""
    update = Visits(process, "a", ["x"], init_cache=False)
    begin = Visits.begin_again

    def late(self: Visits, content: Any, token: int) -> bool:
        worker = threading.Thread(target=lambda: self.pages.append("late"))
        worker.start()
        worker.join()
        return begin(self, content, token)

    monkeypatch.setattr(Visits, "begin_again", late)
    update.end_session()
    ((instance, pages, _),) = Visits.executed
    assert instance is not update
    assert (pages, update.pages, update.has_unsent(), len(decoded)) == (["x"], ["late"], True, 1)


@pytest.mark.parametrize("value", [[["nested"]], [{"a": 1}]])
def test_what_is_nested_is_decoded(
    process: Process, decoded: list[bytes], value: list[Any]
) -> None:
    Visits(process, "a", list(value), init_cache=False).end_session()
    assert [pages for _, pages, _ in Visits.executed] == [value]
    assert len(decoded) == 1
