"""When a run is over: all is stored, and nobody has anything of a dead worker to take over."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from phonon.admin import Admin
from phonon_demo import pool
from phonon_demo.pool import Pool, WorkerError
from support.world import Make, Redis


def test_a_run_is_not_over_while_a_dead_worker_is_listed(
    make: Make, server: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "TIMEOUT", 0.2)
    living, dead = make(), make()  # both are listed with the number of this program
    with Admin(server.url, namespace=namespace) as admin:
        one: Any = SimpleNamespace(is_alive=True, pid=os.getpid(), kill=lambda: None)
        workers = Pool([one])
        with pytest.raises(WorkerError, match=r"the messages are stored, and the processes"):
            workers.wait(admin)
        dead.stop()
        workers.wait(admin)
        with pytest.raises(WorkerError, match="the messages are not stored"):
            workers.wait(admin, lambda: False)
    living.stop()
