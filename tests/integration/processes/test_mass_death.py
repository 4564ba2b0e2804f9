"""Half of all processes die at the same moment, and the others take over what they have left."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from phonon.aio import AsyncConflictFreeUpdate, AsyncProcess
from support.world import Redis, key_for

HERE = Path(__file__)
#: Processes that die, and as many that survive.
COUNT = 200
#: Seconds between two beats; for a machine with two cores.
BEAT = 3.0
#: Heartbeat intervals within which all is taken over, after the deaths: five, and one beat.
PROMISED = 6
#: Seconds that a machine with other things to do may add.
SLACK = 30.0
#: Calls that a death may cost all survivors together. Each call is about one partition, of which
#: there are 16; survivors share what is left after an interval. Some 110 to 210 were seen.
CALLS = 400


class Sums(AsyncConflictFreeUpdate, name="mass-death"):
    written: list[Any] = []  # noqa: RUF012 - for all of them

    async def execute(self) -> None:
        self.written.append(self._id)


async def make(url: str, namespace: str) -> list[AsyncProcess]:
    """Make processes, a few at a time."""
    made = []
    for _ in range(COUNT):
        process = AsyncProcess(url=url, namespace=namespace, heartbeat_interval=BEAT)
        made.append(await process.__aenter__())
    return made


async def hold(url: str, namespace: str) -> None:
    """Be many processes, each of which has a lock, a membership and data; then wait for the end."""
    processes = await make(url, namespace)
    for i, process in enumerate(processes):
        await process.lock(f"lock{i}").acquire()
        await process.create_reference("all")
        update = Sums(process, i, doc={"n": 1}, init_cache=False)
        await update.cache()
    sys.stdout.write(json.dumps([process.id for process in processes]) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def report(text: str) -> None:
    """Say what was measured, to whoever runs this with ``-s``."""
    sys.stdout.write(f"\n{text}\n")


def applied(server: Redis) -> int:
    """Return how many calls of lanes the server has carried out."""
    with server.client() as client:
        stats = client.info("commandstats")
    return int(stats["cmdstat_fcall"]["calls"])


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_half_of_all_processes_die(own_server: Redis, namespace: str) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        command = [sys.executable, str(HERE), own_server.url, namespace]
        path = os.pathsep.join([str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
        doomed = subprocess.Popen(  # noqa: ASYNC220 - at the start
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            survivors = await make(own_server.url, namespace)
            assert doomed.stdout is not None
            line = await loop.run_in_executor(None, doomed.stdout.readline)
            dead = json.loads(line)
            before = applied(own_server)
            begun = time.monotonic()
            await asyncio.sleep(BEAT)
            idle = (applied(own_server) - before) / (time.monotonic() - begun)
        finally:
            doomed.kill()
            doomed.communicate()
        begun, before = time.monotonic(), applied(own_server)
        with own_server.client() as client:
            listed = survivors[0].heartbeat_hash_name
            while (
                len(Sums.written) < COUNT
                or client.zcard(listed) > COUNT
                or client.exists(*(key_for(survivors[0], "lock", f"lock{i}") for i in range(COUNT)))
            ):
                await asyncio.sleep(0.05)
                assert time.monotonic() - begun < PROMISED * BEAT + SLACK, (
                    f"{len(Sums.written)} written, {client.zcard(listed) - COUNT} dead are listed"
                )
        took = time.monotonic() - begun
        calls = applied(own_server) - before - idle / 2 * took
        report(f"{took / BEAT:.1f} beats, {calls / COUNT:.0f} calls a death; {idle:.0f}/s idle")
        assert sorted(Sums.written) == list(range(COUNT)), "each once"
        assert not set(dead) & {process.id for process in survivors}, (
            "no survivor was declared dead"
        )
        assert calls / COUNT < CALLS
        await asyncio.gather(*(process.stop() for process in survivors))

    asyncio.run(test())


if __name__ == "__main__":
    asyncio.run(hold(*sys.argv[1:]))
