"""The runbook, walked: each trouble is found by a command, said in words, and ended."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phonon import ConflictFreeUpdate, Process
from phonon.cli.app import phonon
from support.world import Redis, wait_until

SCRIPT = Path(__file__).parents[3] / "examples" / "troubles.py"

pytestmark = pytest.mark.slow


class Drill:
    """A trouble under way, and an operator with a shell."""

    def __init__(self, server: Redis, trouble: str) -> None:
        self.where = ["--url", server.url, "--namespace", "drill"]
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), trouble, *self.where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def tell(self) -> None:
        """The events that the script waits for: the trouble happens, or the database is back."""
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def run(self, command: str, *words: Any) -> Result:
        return CliRunner().invoke(phonon, [command, *self.where, *map(str, words)])

    def rows(self, command: str, *words: Any) -> list[dict[str, Any]]:
        return [json.loads(row) for row in self.run(command, "--json", *words).stdout.splitlines()]

    def problems(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for finding in self.rows("doctor"):
            if finding["level"] != "ok":
                subject = finding["subject"]
                found[subject] = f"{found.get(subject, '')} {finding['text']}".strip()
        return found

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def drill(own_server: Redis) -> Iterator[Callable[[str], Drill]]:
    drills: list[Drill] = []

    def begin(trouble: str) -> Drill:
        drills.append(Drill(own_server, trouble))
        return drills[-1]

    yield begin
    for each in drills:
        each.close()


def worker(server: Redis) -> Process:
    return Process(url=server.url, namespace="drill", heartbeat_interval=0.25)


def test_a_killed_process(own_server: Redis, drill: Callable[[str], Drill]) -> None:
    found = drill("killed-process")
    found.tell()
    found.popen.wait()
    wait_until(lambda: "are late" in found.problems().get("processes", ""))
    (row,) = found.rows("ps")
    assert (row["memberships"], row["locks"]) == (5, 1)

    class Total(ConflictFreeUpdate, name="trouble-total"):
        def execute(self) -> None:
            pass

    with worker(own_server):
        wait_until(lambda: [r["state"] for r in found.rows("ps")] == ["alive"])
        assert found.rows("locks") == found.rows("sessions") == []


def test_a_stuck_lock(drill: Callable[[str], Drill]) -> None:
    found = drill("stuck-lock")
    (lock,) = wait_until(lambda: [r for r in found.rows("locks") if r["waiting"]])
    assert "holds" in found.run("locks", "reports").stdout
    token = lock["holders"][0]["token"]
    assert found.run("unlock", "reports", token, "--yes").exit_code == 0
    assert found.line() == "the waiter has got the lock"


def test_a_poison_batch(drill: Callable[[str], Drill]) -> None:
    found = drill("poison")
    assert "amount is no number" in found.problems()["dead letters"]
    listed = found.run("batches", "--state", "parked")
    assert listed.exit_code == 1
    (batch,) = found.rows("batches")
    shown = found.run("show", batch["resource"], batch["token"])
    assert "'amount': 'poison'" in shown.stdout
    assert found.run("discard", batch["resource"], batch["token"], "--yes").exit_code == 0
    assert "dead letters" not in found.problems()
    assert [act["act"] for act in found.rows("log")] == ["discard"]


def test_an_unknown_class(own_server: Redis, drill: Callable[[str], Drill]) -> None:
    found = drill("unknown-class")
    with worker(own_server):
        found.tell()
        found.popen.wait()
        text = wait_until(lambda: found.problems().get("unknown classes"))
        assert "trouble-forgotten, which no live process can execute" in text
        (batch,) = found.rows("batches", "--state", "waiting-for-class")
        assert batch["class_name"] == "trouble-forgotten"

        class Forgotten(ConflictFreeUpdate, name="trouble-forgotten"):
            def execute(self) -> None:
                pass

        wait_until(lambda: found.rows("batches") == [])
        assert "unknown classes" not in found.problems()


def test_a_full_backlog(drill: Callable[[str], Drill]) -> None:
    found = drill("full-backlog")
    text = wait_until(lambda: found.problems().get("backlog"))
    assert "has a backlog of 1," in text
    (batch, *_) = found.rows("batches", "--state", "retrying", "--limit", "1")
    assert batch["error"] == "ConnectionError: the database does not answer"
    found.tell()  # the database is back
    wait_until(lambda: found.rows("batches", "--limit", "1") == [])
    wait_until(lambda: "backlog" not in found.problems())


def test_a_server_that_evicts(own_server: Redis, drill: Callable[[str], Drill]) -> None:
    found = drill("eviction")
    assert "allkeys-lru" in found.problems()["eviction"]
    (finding,) = [f for f in found.rows("doctor") if f["subject"] == "eviction"]
    command = finding["remedy"].split(",")[0].split()
    with own_server.client() as client:
        client.execute_command(*command)
    assert "eviction" not in found.problems()
