"""Lists the files that a call goes through, in order, and counts Phonon's functions that it calls.

It counts calls of Python functions and generators of the package in all threads, with
`sys.setprofile`; a generator that goes on after a ``yield`` counts once more. To compare versions,
run it on both: ``PYTHONPATH=<checkout>/src python benchmarks/paths.py``.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import phonon
from phonon import ConflictFreeUpdate, LruCache, Process

if __name__ == "__main__":  # a class of `__main__` would be unknown to the other process
    import paths

    paths.main()
    sys.exit()

ROOT = f"{Path(phonon.__file__).parent}/"
#: Seconds between the heartbeats of processes that stay; so long that none falls into a path.
SELDOM = 25
#: Seconds between the heartbeats where a death is to be noticed.
OFTEN = 0.25
OPTIONS: dict[str, Any] = {"url": "embedded://", "namespace": "paths"}
#: The function with which a takeover begins, in this version and before.
TAKEOVER = ("take_over", "_take_over")


class Tally(ConflictFreeUpdate):
    """Counts, and writes nothing."""

    executed = 0

    def execute(self) -> None:
        """Note that it was executed."""
        Tally.executed += 1
        RECORDER.stop()


class Recorder:
    """Counts the calls of a path, by file; `sys.setprofile` calls it."""

    def __init__(self) -> None:
        self.paths: dict[str, dict[str, int]] = {}
        self._files: dict[str, int] | None = None
        self._waiting: dict[str, int] | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See a call."""
        del argument
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT):
            return
        if self._waiting is not None and code.co_name in TAKEOVER:
            self._files, self._waiting = self._waiting, None
        if self._files is not None:
            name = code.co_filename[len(ROOT) :]
            self._files[name] = self._files.get(name, 0) + 1

    def start(self, title: str, *, takeover: bool = False) -> None:
        """Begin a path: now, or when a takeover begins."""
        files: dict[str, int] = {}
        self.paths[title] = files
        self._files, self._waiting = (None, files) if takeover else (files, None)

    def stop(self) -> None:
        """End the path."""
        self._files = self._waiting = None

    def record(self, title: str, action: Callable[[], Any]) -> None:
        """Record an action."""
        self.start(title)
        action()
        self.stop()


RECORDER = Recorder()


def main() -> None:
    """Record the five paths, and print them."""
    threading.setprofile(RECORDER)  # for threads that begin from now on
    sys.setprofile(RECORDER)
    with Process(**OPTIONS, heartbeat_interval=SELDOM) as process:
        process.create_reference("warm").dereference()
        RECORDER.record("dereference()", process.create_reference("r").dereference)
        in_a_cache(process)
        a_lock(process)
    a_takeover()
    sys.setprofile(None)
    for title, files in RECORDER.paths.items():
        print(f"\n{title}: {len(files)} files, {sum(files.values())} calls")
        for name, calls in files.items():
            print(f"  {name:<28}{calls:>5}")


def in_a_cache(process: Process) -> None:
    """Record a message that is merged, and the end of a batch."""
    cache: LruCache[Tally] = LruCache()
    cache.set("a", Tally(process, "a", doc={"n": 1}))
    more = Tally(process, "a", doc={"n": 1}, init_cache=False)
    RECORDER.record("LruCache.set, merged", lambda: cache.set("a", more))
    with process.batch():
        for i in range(10):
            cache.set(f"b{i}", Tally(process, f"b{i}", doc={"n": 1}))
        RECORDER.start("the end of a batch of ten new keys")
    RECORDER.stop()
    cache.expire_all()


def a_lock(process: Process) -> None:
    """Record a wait for a lock that another process holds, and releases."""
    with Process(**OPTIONS, heartbeat_interval=SELDOM) as other:
        taken, wanted = other.lock("l"), process.lock("l")
        assert taken.acquire()
        release = threading.Timer(0.2, taken.release)
        release.start()
        RECORDER.record("waiting for a lock, and its release", wanted.acquire)
        release.join()
        wanted.release()


VICTIM = """
import sys
from paths import OFTEN, OPTIONS, Tally
from phonon import Process
Tally(Process(**OPTIONS, heartbeat_interval=OFTEN), "left", doc={"n": 1})
print("ready", flush=True)
sys.stdin.read()
"""


def a_takeover() -> None:
    """Record a takeover of one session, from the death's announcement to its execution."""
    victim = subprocess.Popen(  # noqa: S603 - the text above
        [sys.executable, "-c", VICTIM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
    )
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    Tally.executed = 0
    with Process(**OPTIONS, heartbeat_interval=OFTEN):
        RECORDER.start("a takeover of one session", takeover=True)
        victim.kill()
        victim.communicate()
        end = time.monotonic() + 60
        while not Tally.executed:
            assert time.monotonic() < end, "no process takes over"
            time.sleep(0.01)
    RECORDER.stop()
