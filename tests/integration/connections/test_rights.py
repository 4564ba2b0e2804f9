"""The rights of the server's user: the least that Phonon needs, and the errors with less."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phonon import Process
from phonon._core.identity import ALSO_SENT
from phonon._protocol import library
from phonon.errors import ServerError
from support.both import APIS, Api, got, until
from support.nodes import Node

PAGE = Path(__file__).parents[3] / "docs" / "guarantees.md"
SECRET = "sEcReT"  # noqa: S105 - of a server that lives as long as the test
#: Commands of connections: redis-py's greeting, the database, Phonon's look at the server.
OF_CONNECTIONS = {"fcall", "function|load", "info", "select", "client|setinfo"}
#: For `Durability` only, for clusters only, and to know the server's limits.
OPTIONAL = {"wait", "waitaof", "cluster|slots", "config|get"}


def documented() -> list[str]:
    """The rules of the user in the documentation."""
    found = re.search(r"^ACL SETUSER phonon (.+?)\n```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{PAGE} does not say which rights Phonon needs"
    return found[1].replace("\\\n", " ").split()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


@pytest.fixture
def url(node: Node) -> Iterator[str]:
    node.ask("ACL SETUSER", "phonon", "reset", *documented(), f">{SECRET}")
    node.ask("ACL LOG", "RESET")
    node.ask("FLUSHALL")
    yield f"redis://phonon:{SECRET}@{node.address}/0"
    node.ask("ACL DELUSER", "phonon")


@pytest.fixture
def namespace() -> str:
    return "phonon"  # for which the documentation gives the rights


def test_the_documentation_names_all_commands() -> None:
    granted = {rule[1:] for rule in documented() if rule.startswith("+")}
    of_steps = {command.lower() for command in library.default().commands}
    also = {command.decode().lower() for command in ALSO_SENT}
    assert granted == of_steps | also | OF_CONNECTIONS | OPTIONAL
    rules = " ".join(f"+{command.lower()}" for command in sorted(library.of_operators()))
    assert f"Operators need more: `{rules}`" in " ".join(PAGE.read_text().split())


@pytest.mark.parametrize("api", APIS[:2], ids=lambda api: api.name)
def test_the_least_rights_are_enough(api: Api, url: str, node: Node, namespace: str) -> None:
    kind = api.tally()

    async def test() -> None:
        options: dict[str, Any] = {"url": url, "namespace": namespace, "heartbeat_interval": 0.1}
        made = api.process(**options), api.process(**options)
        async with api.enter(made[0]) as one, api.enter(made[1]) as other:
            cache = api.cache()
            async with api.enter(one.batch()):
                for n in range(200):
                    update = kind(one, n % 9, doc={"n": 1}, init_cache=False)
                    await got(cache.set(n % 9, update))
            for _ in range(70):  # enough to merge some
                update = kind(other, 1, doc={"n": 1}, init_cache=False)
                await got(update.cache())
            await got(cache.expire_all())
            await got(update.end_session())
            lock, again = one.lock("x"), other.lock("x", lease=5.0)
            await got(lock.acquire())
            waiting = api.begin(again.acquire, timeout=10)
            await until(lambda: got(lock.waiters()))
            await got(lock.release())
            await waiting
            await got(again.release())
            async with api.enter(one.semaphore("s", 2)):
                pass
            meeting = await got(one.create_reference("meeting", parties=2))
            await got((await got(other.create_reference("meeting"))).dereference())
            await got(meeting.dereference())

    api.run(test)
    assert sum(entry.doc["n"] for entry in kind.written) == 270
    assert node.ask("ACL LOG") == []


@pytest.mark.parametrize("command", [*library.default().commands, "BLMPOP", "FCALL"])
def test_a_command_that_is_forbidden_is_named_at_the_start(
    command: str, url: str, node: Node, namespace: str
) -> None:
    name = command.lower()
    node.ask("ACL SETUSER", "phonon", f"-{name}")
    with pytest.raises(ServerError, match=rf"ACL SETUSER <user> \+{name}$"):
        Process(url=url, namespace=namespace)
    with node.client() as client:
        assert list(client.scan_iter()) == [], "nothing was written"


def test_all_that_are_missing_are_named(url: str, node: Node, namespace: str) -> None:
    node.ask("ACL SETUSER", "phonon", "-hincrby", "-lrem")
    with pytest.raises(ServerError, match=r"may not run hincrby, lrem, .* \+hincrby \+lrem$"):
        Process(url=url, namespace=namespace)
