"""One who only looks needs the rights that docs/operations.md names, and no others."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from phonon import Admin, ConflictFreeUpdate, Process, RetryPolicy
from phonon.errors import ServerError
from support.nodes import Node
from support.world import wait_until

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
SECRET = "sEcReT"  # noqa: S105 - of a server that lives as long as the test


class Kept(ConflictFreeUpdate):
    """Adds up."""

    def execute(self) -> None:
        """Write nothing."""


class Failing(ConflictFreeUpdate):
    """Fails."""

    def execute(self) -> None:
        """Raise an error."""
        raise ValueError("no")


def documented() -> list[str]:
    found = re.search(r"^ACL SETUSER viewer (.+?)\n```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].replace("\\\n", " ").split()


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def test_the_viewer_sees_everything_and_changes_nothing(node: Node) -> None:
    node.ask("ACL SETUSER", "viewer", "reset", *documented(), f">{SECRET}")
    with Process(url=f"redis://{node.address}/0") as process:
        update = Kept(process, "a", doc={"n": 1})
        lock = process.lock("x")
        lock.acquire()
        with Admin(f"redis://viewer:{SECRET}@{node.address}/0") as admin:
            assert [p.id for p in admin.processes()] == [process.id]
            assert [s.resource for s in admin.sessions()] == [update.resource_id]
            assert admin.oldest_sessions(5)[0].bytes
            assert [found.name for found in admin.locks()] == ["x"]
            assert [*admin.batches(), *admin.acts(), *admin.sources()] == []
            assert admin.resource(update.resource_id).partials == 1
            assert [p.doc for p in admin.content(update.resource_id)] == [{"n": 1}]
            subjects = {f.subject: f.level for f in admin.examine()}
            assert subjects["permissions"] == "note"
            with pytest.raises(ServerError, match=r"nothing was done: .* \+zrem"):
                admin.break_lock("x", lock.token or 0)
            with pytest.raises(ServerError, match=r"grant .* \+xadd"):
                admin.expire(process.id)
        assert lock.owned()


@pytest.mark.parametrize("forbidden", ["hdel", "xadd", "sadd"])
def test_an_act_that_would_end_halfway_is_not_begun(node: Node, forbidden: str) -> None:
    node.ask(
        "ACL SETUSER", "operator", "reset", "on", "~*", "&*", "+@all", f"-{forbidden}", f">{SECRET}"
    )
    url, once = f"redis://{node.address}/0", RetryPolicy(attempts=1)
    with Process(url=url, retry=once, heartbeat_interval=0.1) as process:
        with pytest.raises(ValueError, match="no"):
            Failing(process, "a", doc={"n": 1}).end_session()
        with node.client() as client, Admin(f"redis://operator:{SECRET}@{node.address}/0") as admin:
            (letter,) = admin.batches("parked")

            def letters() -> list[str]:
                return sorted(str(key) for key in client.scan_iter(match="*:dead:*"))

            wait_until(lambda: admin.processes()[0].executes)
            before = letters()
            for act in (admin.replay, admin.discard):
                with pytest.raises(ServerError, match=rf"grant .*\+{forbidden}"):
                    act(letter.resource, letter.token)
            assert before == letters() != []
