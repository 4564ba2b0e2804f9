"""A worker process. A program that uses Phonon looks like this.

It reads messages, merges them in a collection, and writes one record for each key and session. On
SIGTERM and SIGINT it stores the batch in hand, ends its sessions and leaves.
`phonon_demo.pool` starts it as ``python -m phonon_demo.worker <plan>``.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa

from phonon import LruCache, Process
from phonon.sinks import SqlTable
from phonon_demo.aggregations import AGGREGATIONS
from phonon_demo.plan import GROUP, Plan

P = TypeVar("P", bound=Plan)

#: Messages that are stored together.
BATCH = 500
#: A function that handles a message, given its key and its value.
Handle = Callable[[Any, Any], object]


class CountedTable(SqlTable):
    """A table that counts the records written to it."""

    written = 0

    def write(self, records: Sequence[Any]) -> None:
        """Write records, and count them."""
        super().write(records)
        self.written += len(records)


def work(plan: Plan) -> None:
    """Read, merge and write until a signal comes."""
    aggregation = AGGREGATIONS[plan.aggregation]
    engine = sa.create_engine(plan.database)
    sink: Any = CountedTable(engine, aggregation.table, aggregation.model)
    with Process(
        url=plan.url, namespace=plan.namespace, heartbeat_interval=plan.heartbeat
    ) as process:
        handle: Handle
        if plan.updates:
            from phonon_demo.updates import FlightUpdate, flight  # noqa: PLC0415 - the older way

            sink = FlightUpdate
            sink.engine = engine
            updates: LruCache[FlightUpdate] = LruCache(plan.max_entries)
            sessions: Any = updates

            def handle(key: Any, value: Any) -> None:
                name, doc = key.decode(), flight(json.loads(value))
                updates.set(name, FlightUpdate(process, name, doc=doc))
        else:
            records: Any = process.collect(aggregation.model, plan.max_entries, sink=sink)
            sessions = records

            def handle(key: Any, value: Any) -> None:
                records.add(key.decode(), *aggregation.values(json.loads(value)))

        say(process.id)
        read(plan, process, sessions, handle)
    engine.dispose()
    say(json.dumps({"sessions": sink.written}))


def read(plan: Plan, process: Process, sessions: Any, handle: Handle) -> None:
    """Hand each message to a function, and store its data. Each message counts once."""
    if plan.source == "kafka":
        from phonon.sources.kafka import KafkaSource  # noqa: PLC0415 - an extra

        KafkaSource(
            process, kafka_config(plan), plan.topic,
            batch_size=BATCH, poll_timeout=0.1, sessions=sessions,
        ).run(lambda message: handle(message.key(), message.value()))  # fmt: skip
        return
    from phonon.sources.streams import StreamSource  # noqa: PLC0415 - only for this source

    StreamSource(
        process, plan.topic, GROUP,
        batch_size=BATCH, poll_timeout=0.1, claim_idle=4 * plan.heartbeat, sessions=sessions,
    ).run(lambda entry: handle(entry.fields[b"key"], entry.fields[b"value"]))  # fmt: skip


def kafka_config(plan: Plan) -> dict[str, Any]:
    """Return the client's configuration, with which the group notices a dead member soon."""
    return {
        "bootstrap.servers": plan.broker,
        "group.id": GROUP,
        "auto.offset.reset": "earliest",
        "session.timeout.ms": 4000,
        "heartbeat.interval.ms": 200,
        "log_level": 2,
    }


def say(line: str) -> None:
    """Write a line for the program that has started this worker."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def end_with_the_parent() -> None:
    """End soon after the end of the program that has started this worker."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def main(work: Callable[[P], None], plan: type[P]) -> None:
    """Work with the plan on the command line."""
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    work(plan(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main(work, Plan)
