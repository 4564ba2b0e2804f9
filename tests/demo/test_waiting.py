"""When a run is over: all is stored, and nobody has anything of a dead worker to take over."""

from types import SimpleNamespace
from typing import Any

import pytest

from phonon_demo import pool
from phonon_demo.errors import WorkerError
from support.world import Make


def test_a_dead_worker_does_not_count_for_one_that_starts(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is not over while a dead worker is listed and its replacement is not."""
    monkeypatch.setattr(pool, "TIMEOUT", 0.2)
    observer, _dead = make(), make()
    replacement = SimpleNamespace(is_alive=True, process="")
    workers: Any = pool.Pool([])
    workers.workers = [replacement]
    broker: Any = SimpleNamespace(stored=lambda _: 10)
    with pytest.raises(WorkerError, match="2 processes are listed, of which 2 live"):
        pool.wait_until_stored(broker, observer, workers, 10)
    replacement.process = "an id"
    pool.wait_until_stored(broker, observer, workers, 10)
