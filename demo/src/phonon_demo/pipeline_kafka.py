"""The part of a pipeline's worker that reads from Kafka."""

import signal
import threading
from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer

from phonon import Process
from phonon.sources.kafka import KafkaSource
from phonon_demo.pipeline import GROUP, Plan, keeping_what_fails

#: A dead member of the group is missed soon. A mock cluster waits for three seconds for the first
#: members of a group, in which they must not be given up on.
QUICK = {"session.timeout.ms": 4000, "heartbeat.interval.ms": 200, "log_level": 2}
#: Of programs that let the client commit by itself: how often, ms.
COMMIT_INTERVAL = 1000


def loop(
    plan: Plan, process: Process, views: Any, batch_size: int
) -> Callable[[Callable[[Any, Any], None]], None]:
    """Return what reads messages and hands each to a function."""
    config = {
        "bootstrap.servers": plan.broker,
        "group.id": GROUP,
        "auto.offset.reset": "earliest",
        **QUICK,
    }
    if plan.without == "offsets":
        return lambda handle: _unchecked(plan, process, views, batch_size, config, handle)
    source = KafkaSource(
        process, config, plan.topic, batch_size=batch_size, poll_timeout=0.1, sessions=views
    )
    return lambda handle: source.run(lambda m: handle(m.key(), m.value()))


def _unchecked(
    plan: Plan,
    process: Process,
    views: Any,
    batch_size: int,
    config: dict[str, Any],
    handle: Callable[[Any, Any], None],
) -> None:
    """Read as other programs do: the client commits by itself what was stored."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    more = {"auto.commit.interval.ms": COMMIT_INTERVAL, "enable.auto.offset.store": False}
    consumer: Any = Consumer({**config, **more})
    consumer.subscribe([plan.topic])
    while not stop.is_set():
        messages = [m for m in consumer.consume(batch_size, 0.1) if m.error() is None]
        with keeping_what_fails(), process.batch():
            for message in messages:
                handle(message.key(), message.value())
        for message in messages:
            try:
                consumer.store_offsets(message)
            except Exception:  # noqa: BLE001, S112 - it is not this consumer's any more
                continue
    consumer.close()
    with keeping_what_fails():
        views.expire_all()
