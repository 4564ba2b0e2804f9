"""Metrics of processes, for Prometheus and OpenTelemetry (extras of those names).

A process counts all the time, once for a list of operations and not for each. An exporter reads the
counters on request, so it does not slow down the work. Labels are bounded: a class or an outcome,
never a key.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from phonon.errors import ConfigurationError
from phonon.settings import check_has, check_owner

if TYPE_CHECKING:
    from phonon.process import BaseProcess

__all__ = ["METRICS", "Metric", "PrometheusCollector", "instrument", "read"]


class Metric(NamedTuple):
    """The name and the meaning of one metric.

    Attributes:
        name: The name in Prometheus, with unit and without ``_total``.
        otel: The name in OpenTelemetry.
        kind: ``"counter"``, ``"gauge"`` or ``"histogram"``.
        unit: The unit, as OpenTelemetry writes it.
        text: The description.
        labels: The names of the labels.
        read: Returns the values by label values, given the process's parts.
    """

    name: str
    otel: str
    kind: str
    unit: str
    text: str
    labels: tuple[str, ...]
    read: Callable[[Any], dict[tuple[str, ...], Any]]


def _metric(
    name: str,
    unit: str,
    text: str,
    read: str | Callable[[Any], Any],
    *,
    kind: str = "counter",
    labels: tuple[str, ...] = (),
) -> Metric:
    """Return a metric.

    Args:
        name: Its name in OpenTelemetry, without ``phonon.``.
        unit: The unit.
        text: The description.
        read: An attribute of `Measures`, or a function of the process's parts, which with labels
            returns the values by label values.
        kind: The kind.
        labels: The names of the labels.
    """

    def values(engine: Any) -> dict[tuple[str, ...], Any]:
        found: Any = read(engine) if callable(read) else getattr(engine.identity.measures, read)
        return found if labels else {(): found}

    prometheus = name.replace(".duration", "_seconds").replace(".size", "_bytes").replace(".", "_")
    return Metric(f"phonon_{prometheus}", f"phonon.{name}", kind, unit, text, labels, values)


#: All metrics. A dashboard and alerts that use them are in ``ops/``.
METRICS = (
    _metric(
        "messages",
        "{message}",
        "Updates made, and messages that collections of models took",
        "made",
    ),
    _metric(
        "messages.merged",
        "{message}",
        "Updates that were merged into another one here, in caches; collections do not count them",
        lambda engine: engine.merged,
    ),
    _metric(
        "partials.stored",
        "{partial}",
        "Partials that the server has taken: messages divided by these is the merge ratio",
        "stored",
    ),
    _metric("partials.stored.size", "By", "The size of these partials", "stored_bytes"),
    _metric(
        "sessions.opened",
        "{session}",
        "Sessions that this process has joined, or opened and ended in one operation",
        "opened",
    ),
    _metric(
        "sessions.ended", "{session}", "Sessions that this process has left, or ended", "ended"
    ),
    _metric(
        "memberships",
        "{resource}",
        "Resources of which this process is a member",
        lambda engine: len(engine.members.held),
        kind="gauge",
    ),
    _metric(
        "executions",
        "{execution}",
        "Calls of execute, or one for each record of execute_many",
        lambda engine: dict(engine.identity.measures.executed),
        labels=("class", "outcome"),
    ),
    _metric(
        "execute.duration",
        "s",
        "The durations of these calls",
        lambda engine: {(c,): h for c, h in list(engine.identity.measures.seconds.items())},
        kind="histogram",
        labels=("class",),
    ),
    _metric(
        "batch.partials",
        "{partial}",
        "The numbers of partials of executed batches",
        "batch_partials",
        kind="histogram",
    ),
    _metric("batch.retries", "{batch}", "Failed batches that are tried again", "retries"),
    _metric(
        "batches.parked", "{batch}", "Batches that were parked after too many attempts", "parked"
    ),
    _metric(
        "backlog",
        "{entry}",
        "Unfinished work in the outbox: updates to store, sessions to end, batches to retry",
        lambda engine: engine.outbox.size,
        kind="gauge",
    ),
    _metric(
        "takeover.resources",
        "{resource}",
        "Resources that were taken over from dead processes",
        "reaped",
    ),
    _metric(
        "takeover.batches",
        "{batch}",
        "Batches that were taken over from dead processes",
        "reaped_batches",
    ),
    _metric(
        "leases.lost",
        "{lease}",
        "The times that this process was declared dead, or the server lost its data",
        lambda engine: len(engine.identity.former),
    ),
    _metric("locks.lost", "{lock}", "Locks that were lost while they were held", "lost_locks"),
    _metric(
        "lock.wait.duration",
        "s",
        "The times that callers waited for locks that they got",
        "lock_wait",
        kind="histogram",
    ),
    _metric(
        "lock.hold.duration", "s", "The times that locks were held", "lock_hold", kind="histogram"
    ),
    _metric(
        "calls",
        "{call}",
        "Calls that were answered, since the last change of identity",
        lambda engine: sum(lane.answered for lane in engine.identity.lanes),
    ),
    _metric(
        "operations",
        "{operation}",
        "Operations that these calls carried: divided by the calls, the operations of one",
        lambda engine: sum(lane.answered_operations for lane in engine.identity.lanes),
    ),
    _metric(
        "round_trips",
        "{round_trip}",
        "The times that requests were sent and answers awaited, reads of state included",
        lambda engine: engine.driver.server.round_trips,
    ),
    _metric(
        "call.failures",
        "{attempt}",
        "Attempts at calls that were not answered, and repeated",
        lambda engine: engine.driver.server.troubles,
    ),
)


def read(process: "BaseProcess") -> dict[str, Any]:
    """Return all numeric metrics of a process by name, and by labels if they have some."""
    check_owner(process)
    found: dict[str, Any] = {}
    for metric in METRICS:
        if metric.kind != "histogram":
            values = metric.read(process.engine)
            found[metric.name] = values if metric.labels else values[()]
    return found


class PrometheusCollector:
    """Exports the counters of processes to Prometheus.

    Args:
        processes: The processes of this interpreter. One that has stopped keeps its last figures.

    Raises:
        ConfigurationError: The extra is not installed.

    Example:
        >>> import prometheus_client
        >>> prometheus_client.REGISTRY.register(PrometheusCollector(process))  # doctest: +SKIP
    """

    def __init__(self, *processes: "BaseProcess") -> None:
        try:
            from prometheus_client import core  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                "Prometheus's metrics need prometheus-client: pip install 'phonon[prometheus]'"
            ) from error
        for process in processes:
            check_owner(process)
        self._core = core
        self._processes = processes

    def describe(self) -> Iterable[Any]:
        """Return the metrics without values, so that registering reads no counter."""
        return [self._family(metric) for metric in METRICS]

    def collect(self) -> Iterator[Any]:
        """Yield the metrics, added up over the processes of each namespace."""
        for metric in METRICS:
            family = self._family(metric)
            for labels, value in _sums(metric, self._processes).items():
                if metric.kind == "histogram":
                    counts, total = value
                    family.add_metric(labels, counts, total)
                else:
                    family.add_metric(labels, value)
            yield family

    def _family(self, metric: Metric) -> Any:
        kinds = {
            "counter": self._core.CounterMetricFamily,
            "gauge": self._core.GaugeMetricFamily,
            "histogram": self._core.HistogramMetricFamily,
        }
        return kinds[metric.kind](metric.name, metric.text, labels=["namespace", *metric.labels])


def _sums(metric: Metric, processes: Iterable["BaseProcess"]) -> dict[tuple[str, ...], Any]:
    """Add a metric up over processes, because ids change and would be unbounded labels."""
    sums: dict[tuple[str, ...], Any] = {}
    for process in processes:
        engine = process.engine
        for labels, value in metric.read(engine).items():
            key = engine.options.namespace, *labels
            if metric.kind == "histogram":
                buckets, total = sums.get(key, ([], 0.0))
                sums[key] = _added(buckets, value), total + value.total
            else:
                sums[key] = sums.get(key, 0) + value
    return sums


def _added(buckets: list[tuple[str, int]], histogram: Any) -> list[tuple[str, int]]:
    """Return a histogram's buckets in Prometheus's form, each including all lower ones."""
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    before = [count for _, count in buckets] or [0] * len(bounds)
    sums = itertools.accumulate(histogram.counts)
    return [(bound, count + more) for bound, count, more in zip(bounds, before, sums, strict=True)]


def instrument(*processes: "BaseProcess", meter_provider: Any = None) -> None:
    """Export the counters of processes to OpenTelemetry, through its API.

    Without an SDK in the program this does nothing. Call it once, with all processes.

    Args:
        processes: The processes.
        meter_provider: The provider of the meter; None for the global one.

    Raises:
        ConfigurationError: The extra is not installed.
    """
    try:
        from opentelemetry import metrics as api  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "OpenTelemetry's metrics need its API: pip install 'phonon[opentelemetry]'"
        ) from error
    for process in processes:
        check_owner(process)
    if meter_provider is not None:
        remedy = "a MeterProvider of OpenTelemetry's, or leave the argument out"
        check_has("meter_provider", meter_provider, ["get_meter"], remedy)
    meter = api.get_meter("phonon", meter_provider=meter_provider)
    histograms: dict[str, Any] = {}

    for metric in METRICS:
        make: Any = meter.create_observable_counter
        if metric.kind == "histogram":
            made = meter.create_histogram(metric.otel, metric.unit, metric.text)
            histograms[_SOURCES[metric.name]] = made
            continue
        if metric.kind == "gauge":
            make = meter.create_observable_gauge
        make(
            metric.otel, [_observing(metric, processes, api.Observation)], metric.unit, metric.text
        )

    for process in processes:
        engine = process.engine
        engine.identity.measures.on_observe = _recording(histograms, engine.options.namespace)


def _observing(
    metric: Metric, processes: Sequence["BaseProcess"], observation: Any
) -> Callable[[Any], Iterator[Any]]:
    names = ["phonon.namespace", *(f"phonon.{label}" for label in metric.labels)]

    def observe(_: Any) -> Iterator[Any]:
        for labels, value in _sums(metric, processes).items():
            yield observation(value, dict(zip(names, labels, strict=True)))

    return observe


def _recording(histograms: dict[str, Any], namespace: str) -> Callable[[str, float, str], object]:
    def record(name: str, value: float, class_name: str) -> None:
        labels = {"phonon.namespace": namespace}
        if class_name:
            labels["phonon.class"] = class_name
        histograms[name].record(value, labels)

    return record


#: The attributes of `Measures` that histograms read.
_SOURCES = {
    "phonon_execute_seconds": "seconds",
    "phonon_batch_partials": "batch_partials",
    "phonon_lock_wait_seconds": "lock_wait",
    "phonon_lock_hold_seconds": "lock_hold",
}
