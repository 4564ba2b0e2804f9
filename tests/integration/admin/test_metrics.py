"""Metrics: counted once, exported by conventions, and named in the dashboard as they are."""

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import prometheus_client
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from phonon import (
    Admin,
    ConflictFreeUpdate,
    LruCache,
    Model,
    Process,
    RetryPolicy,
    metrics,
    tracing,
)
from phonon._core.measures import Measures
from phonon.fields import ID, Sum
from phonon.metrics import METRICS, PrometheusCollector
from support.world import Make, Redis, wait_until

OPS = Path(__file__).parents[3] / "ops"


class Counted(ConflictFreeUpdate):
    """Fails if its record says so."""

    def execute(self) -> None:
        if str(self._id).startswith("bad"):
            raise OSError("no database")


class Seen(Model):
    user: ID[str]
    views: Sum[int] = Sum()

    def on_complete(self) -> None:
        pass


def work(process: Process) -> None:
    """Two messages merged, one session ended, one batch parked, a lock taken."""
    cache: LruCache[Counted] = LruCache()
    for _ in range(3):
        cache.set("good", Counted(process, "good", doc={"n": 1}, init_cache=False))
    cache.expire_all()
    with pytest.raises(OSError, match="no database"):
        Counted(process, "bad", doc={"n": 1}).end_session()
    with process.lock("x"):
        pass


def exposition(*processes: Process) -> tuple[str, dict[str, float]]:
    registry = prometheus_client.CollectorRegistry()
    registry.register(PrometheusCollector(*processes))
    text = prometheus_client.generate_latest(registry).decode()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return text, {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_what_is_counted(make: Make, namespace: str) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    work(process)
    found = metrics.read(process)
    assert found["phonon_messages"] == 4
    assert found["phonon_partials_stored"] == 2, "three messages were merged into one partial"
    assert found["phonon_partials_stored_bytes"] > 50
    assert found["phonon_messages_merged"] == 2
    assert found["phonon_sessions_opened"] == found["phonon_sessions_ended"] == 2
    name = f"{Counted.__module__}.Counted"
    assert found["phonon_executions"] == {(name, "ok"): 1, (name, "failed"): 1}
    assert found["phonon_batches_parked"] == 1
    assert found["phonon_calls"] > 0
    assert found["phonon_backlog"] == found["phonon_locks_lost"] == 0


def test_prometheus(make: Make, namespace: str) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    work(process)
    text, values = exposition(process)
    label = f'namespace="{namespace}"'
    assert values[f"phonon_messages_total{{{label}}}"] == 4
    assert values[f"phonon_batches_parked_total{{{label}}}"] == 1
    name = f"{Counted.__module__}.Counted"
    assert values[f'phonon_executions_total{{class="{name}",{label},outcome="ok"}}'] == 1
    assert values[f'phonon_execute_seconds_count{{class="{name}",{label}}}'] == 2
    assert values[f"phonon_batch_partials_count{{{label}}}"] == 2
    assert values[f'phonon_batch_partials_bucket{{le="1.0",{label}}}'] == 2
    assert values[f"phonon_lock_wait_seconds_count{{{label}}}"] == 1
    assert values[f"phonon_lock_hold_seconds_count{{{label}}}"] == 1
    assert "good" not in text, "no key is a label"
    assert process.id not in text, "nor an id, which changes"


def test_sessions_opened(make: Make) -> None:
    process = make()

    def opened() -> Any:
        return metrics.read(process)["phonon_sessions_opened"]

    reference = process.create_reference("a")
    assert opened() == 1
    process.create_reference("a")
    assert opened() == 1, "it is a member already"
    with process.batch():
        Counted(process, "b", doc={"n": 1})
        Counted(process, "c", doc={"n": 1})
    assert opened() == 3
    assert metrics.read(process)["phonon_memberships"] == 3
    reference.dereference()
    assert (opened(), metrics.read(process)["phonon_sessions_ended"]) == (3, 1)
    update = Counted(process, "d", doc={"n": 1})
    update.end_session()
    update.doc = {"n": 2}
    update.end_session()
    assert (opened(), metrics.read(process)["phonon_sessions_ended"]) == (5, 3)


def test_messages_of_collections_are_counted(make: Make) -> None:
    process = make()
    seen = process.collect(Seen, max_entries=100, idle=30, longest=60)

    def messages() -> Any:
        return metrics.read(process)["phonon_messages"]

    with process.batch():
        for _ in range(5):
            seen.add("a", views=1)
        assert messages() == 5
        rejected = seen.add_many([{"user": "b", "views": 1}] * 7 + [{"user": "b", "vews": 1}])
        assert len(rejected) == 1
        assert messages() == 12, "those that are rejected are not taken"
        seen.add_table(pl.DataFrame({"user": ["a", "a", "b"], "views": [1, 2, 3]}))
        assert messages() == 15
    assert metrics.read(process)["phonon_partials_stored"] == 2


def test_what_a_source_brings_is_stored(make: Make) -> None:
    process = make(partitions=2)
    source = process.source("s")
    messages = [(offset, f"good-{offset % 5}") for offset in range(10)]
    with source.batch(messages, offset=lambda message: message[0]) as batch:
        for _, key in batch:
            Counted(process, key, doc={"n": 1})
    found = metrics.read(process)
    stored, size = found["phonon_partials_stored"], found["phonon_partials_stored_bytes"]
    assert 5 <= stored <= 10
    assert size > 20 * stored
    assert found["phonon_sessions_opened"] == 5


@pytest.mark.parametrize("updates", [1, 20, 600])
def test_operations_and_round_trips(make: Make, updates: int) -> None:
    process = make(partitions=1, heartbeat_interval=30)
    for n in range(3):  # connections are there, and what happens once has happened
        Counted(process, f"first-{n}", doc={"n": 1})
    before = metrics.read(process)
    with process.batch():
        for n in range(updates):
            Counted(process, f"good-{n}", doc={"n": 1})
    after = metrics.read(process)
    told = {
        name: after[f"phonon_{name}"] - before[f"phonon_{name}"]
        for name in ("operations", "calls", "round_trips")
    }
    # Background work of the process may come in between.
    assert updates <= told["operations"] <= updates + 20
    assert updates / 256 <= told["calls"] <= 20 + updates / 100
    assert told["calls"] <= told["round_trips"] <= told["calls"] + 50


def test_an_execution_is_linked_to_the_spans_of_its_messages(make: Make) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.instrument(process, tracer_provider=provider)
    tracer = provider.get_tracer("test")
    cache: LruCache[Counted] = LruCache()
    spans = []
    for _ in range(2):
        with tracer.start_as_current_span("message") as span:
            spans.append(span.get_span_context().span_id)
            cache.set("good", Counted(process, "good", doc={"n": 1}, init_cache=False))
            cache.set("good", Counted(process, "good", doc={"n": 1}, init_cache=False))
    with tracer.start_as_current_span("another"):
        cache.set("other", Counted(process, "other", doc={"n": 1}, init_cache=False))
        cache.expire("good")
    with pytest.raises(OSError, match="no database"):
        Counted(process, "bad", doc={"n": 1}).end_session()
    Counted(process, "good", doc={"n": 1}).end_session()
    found = [s for s in exporter.get_finished_spans() if s.name == "execute Counted"]
    first, failed, second = found
    assert [link.context.span_id for link in first.links] == spans
    assert first.parent is None
    assert first.attributes is not None
    assert first.attributes["phonon.resource"] == "test.test.good"
    assert first.status.is_ok
    assert not failed.status.is_ok
    assert [event.name for event in failed.events] == ["exception"]
    assert not failed.links
    assert not second.links, "those of the session before are gone"
    cache.expire_all()
    assert len(exporter.get_finished_spans()[-1].links) == 1


def test_what_is_made_while_a_session_is_executed_belongs_to_the_next(make: Make) -> None:
    process = make()
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.instrument(process, tracer_provider=provider)
    made: list[Any] = []

    class Following(ConflictFreeUpdate):
        def execute(self) -> None:
            if not made:
                with provider.get_tracer("test").start_as_current_span("message"):
                    made.append(Following(process, "good", doc={"n": 1}, init_cache=False))

    Following(process, "good", doc={"n": 1}).end_session()
    made[0].end_session()
    found = [s for s in exporter.get_finished_spans() if s.name.startswith("execute")]
    assert [len(span.links) for span in found] == [0, 1]


def test_a_session_that_others_execute_takes_its_links_along(make: Make) -> None:
    one, other = make(), make()
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.instrument(one, tracer_provider=provider)
    theirs = Counted(other, "good", doc={"n": 1})
    with provider.get_tracer("test").start_as_current_span("message"):
        ours = Counted(one, "good", doc={"n": 1})
    ours.end_session()
    theirs.end_session()
    Counted(one, "good", doc={"n": 1}).end_session()
    (span,) = [s for s in exporter.get_finished_spans() if s.name == "execute Counted"]
    assert not span.links


def test_processes_are_added_up(make: Make, namespace: str) -> None:
    processes = [make(), make()]
    for process in processes:
        Counted(process, "good", doc={"n": 1})
    _, values = exposition(*processes)
    assert values[f'phonon_messages_total{{namespace="{namespace}"}}'] == 2


def test_opentelemetry(make: Make, namespace: str) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    reader = InMemoryMetricReader()
    metrics.instrument(process, meter_provider=MeterProvider([reader]))
    work(process)
    data: Any = reader.get_metrics_data()
    found = {m.name: m for m in data.resource_metrics[0].scope_metrics[0].metrics}
    assert found.keys() >= {m.otel for m in METRICS} - {"phonon.lock.hold.duration"}
    (point,) = found["phonon.messages"].data.data_points
    assert point.value == 4
    assert dict(point.attributes) == {"phonon.namespace": namespace}
    durations = found["phonon.execute.duration"].data.data_points
    assert sum(p.count for p in durations) == 2
    assert found["phonon.execute.duration"].unit == "s"


def test_operators_are_told(server: Redis, make: Make, namespace: str) -> None:
    process = make(retry=RetryPolicy(attempts=1), heartbeat_interval=0.1)
    work(process)
    with Admin(server.url, namespace=namespace) as admin:

        def told() -> Any:
            (found,) = admin.processes()
            return found.counters if found.counters.get("parked") else None

        counters = wait_until(told)
        assert (counters["messages"], counters["stored"], counters["parked"]) == (4, 2, 1)


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bphonon_\w+", expression))


def test_the_dashboard_and_the_alerts_use_names_that_exist(make: Make) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    work(process)
    text, values = exposition(process)
    known = {key.partition("{")[0] for key in values}
    known |= set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    dashboard = json.loads((OPS / "grafana-dashboard.json").read_text())
    shown: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            shown |= names_in(target["expr"])
    alerts = (OPS / "prometheus-alerts.yml").read_text()
    alerted: set[str] = set()
    for expression in re.findall(r"expr: (.*)", alerts):
        alerted |= names_in(expression)
    assert len(shown) > 10
    assert alerted
    assert shown | alerted <= known
    for name in re.findall(r"- alert: (\w+)", alerts):
        assert name.startswith("Phonon")


def test_a_signal_handler_may_count_while_its_thread_counts() -> None:
    measures = Measures()
    with measures._lock:
        measures.add("parked")
        measures.end(1)
    assert measures.figures()["parked"] == 1
