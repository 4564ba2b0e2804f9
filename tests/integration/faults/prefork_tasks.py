"""The tasks of a Celery worker; see `prefork_app`."""

import os

import prefork_app
from celery import Celery

app = Celery("prefork_tasks", broker=os.environ["PREFORK_BROKER"])
app.conf.worker_prefetch_multiplier = 1
app.conf.broker_connection_retry_on_startup = True


@app.task(name="count")
def count(record: str) -> None:
    """Handle a message."""
    prefork_app.count(record)
    with open(os.environ["PREFORK_DONE"], "a") as file:  # noqa: PTH123 - in one call
        file.write(f"{os.getpid()}\n")
