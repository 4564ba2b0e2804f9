"""Placement never matters: the same messages come to the same records, whoever has them."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.world import Redis, wait_until

WORKER = """
import json, sys
from phonon import Model, Process
from phonon.fields import *
class Readings(Model, name="test_placement"):
    sensor: ID[str]
    at: Timestamp[int] = Timestamp()
    total: Sum[float] = Sum()
    spread: Stats[float] = Stats()
    taken: Diff[int] = Diff()
    names: ListAppend[str] = ListAppend()
    kinds: SetAppend[str] = SetAppend()
    by_kind: Counter[str] = Counter()
    last: Latest[str] = Latest()
    first: First[str] = First()
    recent: Window[str] = Window(3)
    different: Distinct[str] = Distinct()
    count: Count = Count()
    def on_complete(self):
        shown = {name: getattr(self, name) for name in self.fields()}
        shown["kinds"] = sorted(self.kinds)
        shown["by_kind"] = sorted(self.by_kind.items())
        row = [repr(value) for value in shown.values()]
        with open(sys.argv[2], "a") as file:
            file.write(json.dumps([self.sensor, self.token, row]) + "\\n")
process = Process(url=sys.argv[1], namespace=sys.argv[3], heartbeat_interval=0.25)
records = process.collect(Readings)
print("ready", flush=True)
for line in sys.stdin:
    messages = json.loads(line)
    with process.batch():
        assert not records.add_many(messages)
    print("stored", flush=True)
process.stop()
"""


def messages() -> list[dict[str, Any]]:
    rng = random.Random(7)  # noqa: S311 - repeatable, no secret
    return [
        {
            "sensor": f"sensor{rng.randrange(5)}",
            "at": rng.randrange(50),
            "total": rng.uniform(-1, 1) * 10 ** rng.randrange(-12, 12),
            "spread": rng.gauss(0, 1),
            "taken": rng.randrange(5),
            "names": rng.choice("abc"),
            "kinds": rng.choice("xyz"),
            "by_kind": {rng.choice("xyz"): rng.randrange(9)},
            "last": rng.choice("pqr"),
            "first": rng.choice("pqr"),
            "recent": f"item{rng.randrange(99)}",
            "different": f"item{rng.randrange(99)}",
        }
        for _ in range(400)
    ]


def records(server: Redis, namespace: str, folder: Path, workers: int, kills: int) -> list[Any]:
    """Deal messages out to processes, kill some once they have acknowledged; return the records."""
    out = folder / namespace
    command = [sys.executable, "-W", "error", "-c", WORKER, server.url, str(out), namespace]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    crew = [start() for _ in range(workers)]
    try:
        for worker in crew:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        dealt = messages()
        random.Random(workers).shuffle(dealt)  # noqa: S311 - repeatable, no secret
        living = list(crew)
        for at in range(0, len(dealt), 20):
            worker = living[at // 20 % len(living)]
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(json.dumps(dealt[at : at + 20]) + "\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == "stored\n"
            if kills and at and at % 100 == 0:
                kills -= 1
                worker.kill()
                living.remove(worker)
        for worker in living:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait(30)
        if living != crew:
            # The others may have stopped before they could notice a death: somebody has to come.
            crew.append(start())

        def found() -> list[Any]:
            lines = out.read_text().splitlines() if out.exists() else []
            return sorted((sensor, row) for sensor, _, row in map(json.loads, lines))

        # The last process writes the data that was left to it before it stops.
        return list(wait_until(lambda: found() if len(found()) >= 5 else None))
    finally:
        for worker in crew:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                assert stream is not None
                stream.close()


@pytest.mark.slow
def test_the_same_messages_come_to_the_same_records(
    server: Redis, namespace: str, tmp_path: Path
) -> None:
    alone = records(server, namespace + "-1", tmp_path, workers=1, kills=0)
    assert len(alone) == 5
    assert records(server, namespace + "-2", tmp_path, workers=2, kills=0) == alone
    assert records(server, namespace + "-5", tmp_path, workers=5, kills=2) == alone
