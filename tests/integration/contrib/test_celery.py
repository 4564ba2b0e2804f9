"""Celery with prefork workers, some of which are killed: each task counts once."""

import os
import signal
from collections import Counter
from pathlib import Path

import celery
import pytest

from support.programs import broker_url, lines_of, new_table, program, rows, wait_for_line
from support.world import Redis, wait_until

pytestmark = pytest.mark.slow
PREFORK = ("--pool", "prefork", "--concurrency", "2", "--without-mingle", "--without-gossip")


def is_stored(server: Redis, page: str) -> bool:
    """Return whether a page has data in an open session."""
    with server.client(1) as redis:
        return any(redis.scan_iter(f"*partials:*{page}"))


def client(server: Redis) -> celery.Celery:
    return celery.Celery(broker=broker_url(server), set_as_current=False)


def pending(server: Redis) -> int:
    """Return how many tasks are not acknowledged."""
    with server.client(2) as redis:
        return int(redis.llen("celery")) + int(redis.hlen("unacked"))


def test_each_task_counts_once_though_a_worker_is_killed(own_server: Redis, tmp_path: Path) -> None:
    database = new_table(tmp_path / "views.db", "views", "page")
    pages = [f"/{i % 5}" for i in range(200)]
    with (
        client(own_server) as app,
        program(
            "celery",
            *("--app", "celery_views", "worker", *PREFORK),
            server=own_server,
            tmp_path=tmp_path,
            DATABASE=database,
        ) as worker,
    ):
        for page in pages[:100]:
            app.send_task("celery_views.viewed", (page,))
        wait_until(lambda: len(worker.children()) >= 2 and pending(own_server) < 80, 60)
        os.kill(worker.children()[0], signal.SIGKILL)
        for page in pages[100:]:
            app.send_task("celery_views.viewed", (page,))
        wait_until(lambda: pending(own_server) == 0, 60)
        # The same delivery once more, as a broker does that has not seen the acknowledgement.
        app.send_task("celery_views.viewed", ("/twice",), task_id="the same")
        app.send_task("celery_views.viewed", ("/twice",), task_id="the same")
        wait_until(lambda: pending(own_server) == 0, 60)
        worker.stop()
    # A warm shutdown leaves nothing but what the killed one had, and that is another's by now or
    # the next one's.
    with program(
        "celery",
        *("--app", "celery_views", "worker", *PREFORK),
        server=own_server,
        tmp_path=tmp_path,
        DATABASE=database,
    ) as worker:
        with client(own_server) as app:
            app.send_task("celery_views.viewed", ("/last",))
        expected = {**Counter(pages), "/twice": 1}
        wait_until(lambda: rows(database, "views").items() >= expected.items(), 90)
        # On its way from the queue to a worker a task is nowhere for a moment.
        wait_until(lambda: is_stored(own_server, "/last"))
        worker.stop()
    assert rows(database, "views") == expected | {"/last": 1}


def test_a_join_survives_its_workers_and_one_of_a_kind_runs(
    own_server: Redis, tmp_path: Path
) -> None:
    with (
        client(own_server) as app,
        program(
            "celery",
            *("--app", "celery_reports", "worker", *PREFORK),
            server=own_server,
            tmp_path=tmp_path,
            FOLDER=str(tmp_path),
        ) as worker,
    ):
        for number in range(6):
            app.send_task("celery_reports.part", ("november", number, 6))
        wait_for_line(tmp_path / "begun")
        os.kill(int(lines_of(tmp_path / "begun")[0].split()[1]), signal.SIGKILL)
        wait_for_line(tmp_path / "published")
        wait_until(lambda: pending(own_server) == 0, 30)
        assert lines_of(tmp_path / "published") == ["november"]
        assert len(lines_of(tmp_path / "begun")) > 6  # the killed one's part was done again

        for _ in range(2):
            app.send_task("celery_reports.rebuild", ("users",))
        app.send_task("celery_reports.rebuild", ("pages",))
        wait_for_line(tmp_path / "rebuilt", 2)
        wait_until(lambda: pending(own_server) == 0, 30)
        worker.stop()  # when what runs has ended
    assert sorted(lines_of(tmp_path / "rebuilt")) == ["pages", "users"]
