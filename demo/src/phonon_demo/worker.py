"""A worker process. A program that uses Phonon looks like this.

It reads messages from a stream, merges them in a collection, and writes one record for each key
and session. On SIGTERM and SIGINT it stores the batch in hand, ends its sessions and leaves.
`phonon_demo.pool` starts it as a process of its own.
"""

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from phonon import Process, metrics
from phonon.sinks import SqlTable
from phonon.sources.streams import StreamEntry, StreamSource
from phonon_demo.rows import JOBS

#: The consumer group of the workers.
GROUP = "phonon-demo"
#: Messages that are stored together.
BATCH = 500


@dataclass(frozen=True)
class Plan:
    """The settings of a worker.

    Attributes:
        url: The URL of the server, which has the stream and Phonon's data.
        namespace: Phonon's namespace, made for this run.
        stream: The stream.
        database: The database, as SQLAlchemy's URL.
        job: The name of the job, see `phonon_demo.models`.
        max_entries: The most keys in a worker's collection.
        heartbeat: Seconds between two heartbeats: few, so that a takeover can be watched.
    """

    url: str
    namespace: str
    stream: str
    database: str
    job: str = "aircraft"
    max_entries: int = 10_000
    heartbeat: float = 0.5


def work(plan: Plan) -> int:
    """Read, merge and write until a signal comes. Each message counts once.

    Returns:
        The number of sessions written.
    """
    job = JOBS[plan.job]
    engine = sa.create_engine(plan.database)
    table = SqlTable(engine, job.table, job.model)
    with Process(plan.url, namespace=plan.namespace, heartbeat_interval=plan.heartbeat) as process:
        records: Any = process.collect(job.model, plan.max_entries, sink=table)

        def handle(entry: StreamEntry) -> None:
            records.add(entry.fields[b"key"].decode(), *json.loads(entry.fields[b"value"]))

        StreamSource(
            process, plan.stream, GROUP,
            batch_size=BATCH, poll_timeout=0.1, claim_idle=4 * plan.heartbeat, sessions=records,
        ).run(handle)  # fmt: skip
        written = written_by(process)
    engine.dispose()
    return written


def written_by(process: Any) -> int:
    """Return how many sessions a process has written."""
    return sum(metrics.read(process)["phonon_executions"].values())
