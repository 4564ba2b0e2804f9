"""Programs that were written for the models of the original run with its imports."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

import phonon.connections
import phonon.fields
import phonon.model
import phonon.registry
from phonon import Process
from phonon.errors import ConfigurationError
from support.world import Redis


class Message:
    """A broker's message, as of NSQ."""

    def __init__(self) -> None:
        self.finished = 0

    def finish(self) -> None:
        self.finished += 1


class Session(phonon.model.Model, name="original_session"):
    id: Any = phonon.fields.ID()
    impressions: Any = phonon.fields.Sum()
    stock: Any = phonon.fields.Diff(int)
    seen: Any = phonon.fields.ListAppend()
    tags: Any = phonon.fields.SetAppend()
    latest: Any = phonon.fields.WindowedList(window_length=2)

    completed: ClassVar[list["Session"]] = []

    def on_complete(self, msg: Any) -> None:  # type: ignore[override]  # it has arguments of its own
        self.completed.append(self)
        if msg is not None:
            msg.finish()


@pytest.fixture
def connected(server: Redis, namespace: str) -> Iterator[Process]:
    with phonon.connections.connect(url=server.url, namespace=namespace) as process:
        yield process
    Session.completed.clear()


def test_the_original_program(connected: Process) -> None:
    phonon.registry.configure(max_entries=100)
    messages = [Message(), Message()]
    phonon.registry.register(
        Session(id="a", impressions=1, stock=2, seen=["x"], tags={"t"}, latest=[(1, "one")]),
        messages[0],
    )
    phonon.registry.register(
        Session(id="a", impressions=2, stock=3, seen=["y"], latest=[(3, "c"), (2, "b")]),
        messages[1],
    )
    assert connected is phonon.connections.connect(), "there is one connection"
    connected.stop()
    (session,) = Session.completed
    assert (session.id, session.impressions, session.stock) == ("a", 3, -5)
    assert (session.seen, session.tags, session.latest) == (["x", "y"], {"t"}, ["c", "b"])
    assert [message.finished for message in messages] == [0, 1], "that of the last one"


def test_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phonon.connections, "_process", None)
    with pytest.raises(ConfigurationError, match="connect"):
        phonon.registry.register(Session(id="a"))
