"""Which files a call goes through, in order, and how many functions of Phonon it calls.

It counts calls of Python functions and generators in the package, in all threads, with
`sys.setprofile`; a generator that goes on after a `yield` counts once more. Run it on two versions
of the package to compare them: ``PYTHONPATH=<checkout>/src python benchmarks/paths.py``.
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import phonon
from phonon import ConflictFreeUpdate, LruCache, Process

ROOT = str(Path(phonon.__file__).parent)
#: Seconds between two heartbeats of the process that takes over. A death takes four to be noticed.
BEAT = 0.1


class Tally(ConflictFreeUpdate):
    """Counts, and writes nothing."""

    executed = 0

    def execute(self) -> None:
        """Note that it was executed."""
        Tally.executed += 1


class Path_:  # noqa: N801 - `Path` is pathlib's
    """Records calls while it is on.

    Attributes:
        files: The files, in the order in which they were first called.
        calls: How many calls there were.
    """

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.calls = 0
        self.on = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See a call; `sys.setprofile` calls this."""
        del argument
        name = frame.f_code.co_filename
        if self.on and event == "call" and name.startswith(ROOT):
            self.calls += 1
            short = name[len(ROOT) + 1 :]
            self.files[short] = self.files.get(short, 0) + 1

    def record(self, action: Callable[[], Any]) -> None:
        """Record the calls of an action, of all threads."""
        self.on = True
        try:
            action()
        finally:
            self.on = False


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


def show(title: str, path: Path_) -> None:
    """Print one path."""
    print(f"\n{title}: {len(path.files)} files, {path.calls} calls")
    for name, calls in path.files.items():
        print(f"  {name:<28}{calls:>5}")


def main() -> None:
    """Record the five paths."""
    path = Path_()
    threading.setprofile(path)  # threads that begin from now on
    sys.setprofile(path)
    paths: list[tuple[str, Path_]] = []

    def record(title: str, action: Callable[[], Any]) -> None:
        path.files, path.calls = {}, 0
        path.record(action)
        kept = Path_()
        kept.files, kept.calls = path.files, path.calls
        paths.append((title, kept))

    options: dict[str, Any] = {"url": "embedded://", "namespace": "paths"}
    with Process(**options, heartbeat_interval=400) as process:
        for warm in (True, False):
            references = [process.create_reference(f"r{i}") for i in range(1)]
            if warm:
                references[0].dereference()
                continue
            record("dereference()", references[0].dereference)

        cache: LruCache[Tally] = LruCache()
        cache.set("a", Tally(process, "a", doc={"n": 1}))
        more = Tally(process, "a", doc={"n": 1}, init_cache=False)
        record("LruCache.set, merged", lambda: cache.set("a", more))

        batch = process.batch()
        with batch:
            for i in range(10):
                cache.set(f"b{i}", Tally(process, f"b{i}", doc={"n": 1}))
            path.files, path.calls = {}, 0
            path.on = True
        path.on = False
        kept = Path_()
        kept.files, kept.calls = path.files, path.calls
        paths.append(("the end of a batch of 10 new keys", kept))

        with Process(**options, heartbeat_interval=400) as other:
            taken = other.lock("l")
            assert taken.acquire()
            wanted = process.lock("l")
            threading.Timer(0.2, taken.release).start()
            record("waiting for a lock, and its release", wanted.acquire)
            wanted.release()
        cache.expire_all()
    takeover(path, record, options | {"namespace": "paths-2", "heartbeat_interval": BEAT})
    for title, found in paths:
        show(title, found)


def takeover(
    path: Path_, record: Callable[[str, Callable[[], Any]], None], options: dict[str, Any]
) -> None:
    """Record how one session of a dead process is taken over."""
    del path
    dead = Process(**options)
    Tally(dead, "left", doc={"n": 1})
    stop_heart(dead)
    Tally.executed = 0
    with Process(**options):
        record("a takeover of one session", lambda: wait_until(lambda: Tally.executed))


def stop_heart(process: Any) -> None:
    """Have a process beat no more, as if it were dead."""
    heart = process.engine.heartbeat
    heart.stopping = True
    heart.wake()
    wait_until(lambda: not process.engine._workers["heartbeat"].is_alive())  # noqa: SLF001 - dead


if __name__ == "__main__":
    main()
