"""Celery: a report in parts, which survives its workers, and a task that runs one at a time."""

import os
import time
from pathlib import Path

from celery import Celery

from phonon.contrib.celery import setup

app = Celery("reports", broker=os.environ["BROKER_URL"])
phonon = setup(app, heartbeat_interval=1)
FOLDER = Path(os.environ["FOLDER"])


@app.task(acks_late=True, reject_on_worker_lost=True)
def part(report: str, number: int, parties: int) -> None:
    """Do a part. The worker that does the last part sends the task that publishes the report."""
    with (FOLDER / "begun").open("a") as file:
        file.write(f"{number} {os.getpid()}\n")
    time.sleep(0.2)
    phonon.join(report, number, parties=parties, then=publish.s(report))


@app.task
@phonon.exactly_once
def publish(report: str) -> None:
    """Publish a report whose parts are all done."""
    with (FOLDER / "published").open("a") as file:
        file.write(f"{report}\n")


@app.task
@phonon.one_at_a_time
def rebuild(index: str) -> None:
    """Rebuild an index. A second task about the same index is ignored meanwhile."""
    with (FOLDER / "rebuilt").open("a") as file:
        file.write(f"{index}\n")
    time.sleep(1)
