"""The plan of a run, which each worker gets as JSON on its command line."""

from dataclasses import dataclass

#: The consumer group of the workers.
GROUP = "phonon-demo"
#: Seconds between two heartbeats of a worker: short, so that a takeover can be watched.
HEARTBEAT = 0.5


@dataclass(frozen=True)
class Plan:
    """The settings of a worker.

    Attributes:
        aggregation: The name of the aggregation, see `phonon_demo.aggregations`.
        url: The URL of Phonon's server.
        namespace: Phonon's namespace, made for this run.
        source: ``"streams"`` or ``"kafka"``.
        broker: The addresses of Kafka's servers; for streams, the URL of their server.
        topic: The topic, or the stream.
        database: The database, as SQLAlchemy's URL.
        max_entries: The most keys in a worker's collection.
        heartbeat: Seconds between two heartbeats.
        updates: Whether the worker makes updates instead of records.
    """

    aggregation: str
    url: str
    namespace: str
    source: str
    broker: str
    topic: str
    database: str
    max_entries: int = 10_000
    heartbeat: float = HEARTBEAT
    updates: bool = False
