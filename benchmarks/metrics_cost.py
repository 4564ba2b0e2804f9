"""Measures the cost of counting and exporting to durable ingest: ratios in one run.

Three ways take turns: counters that do nothing, counters, and counters with both exporters (an
OpenTelemetry SDK, and Prometheus scraping every second). CPU time of this process
is measured, so that other work on the machine plays a smaller part, and each round's ways are
compared with each other, in changing order. The median is shown with the middle half of rounds::

    python benchmarks/metrics_cost.py
"""

import itertools
import statistics
import threading
import time
import timeit
from typing import Any

import prometheus_client
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from common import Count
from phonon import Process, metrics
from phonon._core.measures import Measures
from phonon.embedded import start

ROUNDS = 21
BATCHES, MESSAGES, KEYS = 100, 500, 200


class Nothing(Measures):
    """Counts nothing."""

    def add_stored(self, partials: int, size: int) -> None:
        """Do nothing."""

    def end(self, sessions: int, *, opened: int = 0) -> None:
        """Do nothing."""

    def execution(self, class_name: str, seconds: float, *, failed: bool, times: int = 1) -> None:
        """Do nothing."""

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Do nothing."""


def ingest(process: Process) -> float:
    """Return messages a second of CPU time, stored durably in batches."""
    begun = time.process_time()
    for _ in range(BATCHES):
        with process.batch():
            for i in range(MESSAGES):
                Count(process, i % KEYS, doc={"n": 1})
    return BATCHES * MESSAGES / (time.process_time() - begun)


def scrape(process: Process, stop: threading.Event) -> None:
    """Ask for the exposition every second."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics.PrometheusCollector(process))
    while not stop.wait(1.0):
        prometheus_client.generate_latest(registry)


def one(url: str, way: str) -> float:
    """Measure one way once."""
    with Process(url=url) as process:
        stop = threading.Event()
        threads = []
        if way == "nothing":
            process.engine.identity.measures = Nothing()
        if way == "exported":
            provider = MeterProvider([InMemoryMetricReader()])
            metrics.instrument(process, meter_provider=provider)
            threads.append(threading.Thread(target=scrape, args=(process, stop)))
        for thread in threads:
            thread.start()
        try:
            return ingest(process)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def main() -> None:
    """Measure, and print ratios."""
    server = start(None)
    try:
        url = f"unix://{server.socket_path}"
        found: dict[str, list[float]] = {"nothing": [], "counted": [], "exported": []}
        for way in found:
            one(url, way)  # warm up
        for number in range(ROUNDS):
            ways = list(found)
            for way in ways[number % 3 :] + ways[: number % 3]:
                found[way].append(one(url, way))
    finally:
        server.close()
    base = statistics.median(found["nothing"])
    for way, rates in found.items():
        costs = [free / rate for free, rate in zip(found["nothing"], rates, strict=True)]
        low, median, high = statistics.quantiles(costs, n=4) if way != "nothing" else (1, 1, 1)
        print(
            f"{way:9} {statistics.median(rates):9,.0f} messages a CPU second, {median:.3f} of the "
            f"CPU time of counting nothing ({low:.3f} to {high:.3f})"
        )
    counter: Any = itertools.count()
    each = min(timeit.repeat(lambda: next(counter), number=1_000_000, repeat=3)) * 1000
    print(f"the counter of messages, which runs in all three: {each:.0f} ns a message, a lambda's")
    print(f"call included; a message takes {1e9 / base:,.0f} ns")


if __name__ == "__main__":
    main()
