"""APScheduler runs on every machine, and one of them writes the report."""

import os
from pathlib import Path

from apscheduler.schedulers.blocking import BlockingScheduler

from phonon import Process
from phonon.contrib.schedule import only_one

process = Process(heartbeat_interval=1)


@only_one(process, "report", every=1)
def report() -> None:
    """Write the report."""
    with Path(os.environ["REPORT"]).open("a") as file:
        file.write(f"{os.getpid()}\n")


scheduler = BlockingScheduler()
scheduler.add_job(report, "interval", seconds=1)
scheduler.start()
