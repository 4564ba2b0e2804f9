"""Spans of executions, through OpenTelemetry's API (extra ``opentelemetry``).

An execution happens long after its messages, and often for many traces together. So it is a root
span with a link to the span of each message.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from phonon.errors import ConfigurationError
from phonon.settings import check_has, check_owner

if TYPE_CHECKING:
    from phonon.process import BaseProcess

__all__ = ["instrument"]

#: The most links of one execution: the specification's default limit for a span.
MOST_LINKS = 128
#: The number of resources whose messages' spans are kept: the latest ones.
MOST_RESOURCES = 65536
#: Seconds by which a difference of two readings of the clock may be rounded.
CLOCK_ERROR = 1e-6


def instrument(*processes: "BaseProcess", tracer_provider: Any = None) -> None:
    """Make a span of each execution, with links to the spans in which its updates were made.

    Links lead to updates that were made in this process, within a span, after the call of
    `instrument`: there are no links to messages that other processes have merged, or that a
    collection of models has taken. A retry has the same links. The span is made when `execute`
    has ended, so spans made in there are not its children. Without an SDK in the program nothing
    is recorded.

    Args:
        processes: The processes.
        tracer_provider: The provider of the tracer; None for the global one.

    Raises:
        ConfigurationError: The extra is not installed.

    Example:
        >>> from phonon import tracing
        >>> tracing.instrument(process)  # doctest: +SKIP
    """
    try:
        from opentelemetry import trace as api  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "OpenTelemetry's spans need its API: pip install 'phonon[opentelemetry]'"
        ) from error
    if tracer_provider is not None:
        remedy = "a TracerProvider of OpenTelemetry's, or leave the argument out"
        check_has("tracer_provider", tracer_provider, ["get_tracer"], remedy)
    tracer = api.get_tracer("phonon", tracer_provider=tracer_provider)
    for engine in [check_owner(process) for process in processes]:
        _Tracing(api, tracer, engine)


class _TracedUpdate(NamedTuple):
    """An update that was made.

    Attributes:
        cls: The update's class.
        at: When it was made, by the monotonic clock.
        span: The context of the span in which it was made.
    """

    cls: type
    at: float
    span: Any


class _Tracing:
    """The spans of messages that were not executed yet, of one process."""

    def __init__(self, api: Any, tracer: Any, engine: Any) -> None:
        self._api = api
        self._tracer = tracer
        self._namespace = engine.options.namespace
        # Reentrant: a signal handler or a finalizer may make an update at any moment.
        self._lock = threading.RLock()
        self._known: OrderedDict[str, list[_TracedUpdate]] = OrderedDict()
        engine.trace = self.made
        measures = engine.identity.measures
        measures.on_left = self.left
        measures.on_execution = self.executed

    def made(self, update: Any) -> None:
        """Note the span in which an update was made, if there is one."""
        context = self._api.get_current_span().get_span_context()
        if not context.is_valid:
            return
        with self._lock:
            known = self._known.setdefault(update.resource_id, [])
            if len(known) < MOST_LINKS:
                known.append(_TracedUpdate(type(update), time.monotonic(), context))
            if len(self._known) > MOST_RESOURCES:
                self._known.popitem(last=False)

    def left(self, resource: str) -> None:
        """Forget a session that another process executes."""
        with self._lock:
            self._known.pop(resource, None)

    def executed(
        self, resource: str, cls: type, seconds: float, error: BaseException | None
    ) -> None:
        """Make the span of an execution that has ended. After success, drop its messages' spans."""
        # Updates that were made while it ran belong to the next session.
        begun = time.monotonic() - seconds + CLOCK_ERROR
        with self._lock:
            known = self._known.get(resource, ())
            rest = [made for made in known if made.cls is not cls or made.at > begun]
            spans = [made.span for made in known if made.cls is cls and made.at <= begun]
            if error is None and rest:
                self._known[resource] = rest
            elif error is None:
                self._known.pop(resource, None)
        # An exporter's error must not affect the execution.
        with contextlib.suppress(Exception):
            # One link for each span, even if it had several messages.
            once = {(span.trace_id, span.span_id): span for span in spans}
            self._record(resource, cls, seconds, error, list(once.values()))

    def _record(
        self,
        resource: str,
        cls: type,
        seconds: float,
        error: BaseException | None,
        messages: list[Any],
    ) -> None:
        api = self._api
        end = time.time_ns()
        span = self._tracer.start_span(
            f"execute {cls.__qualname__}",
            # A root span: the caller's span may belong to the last message only.
            context=api.set_span_in_context(api.INVALID_SPAN),
            links=[api.Link(context) for context in messages],
            start_time=end - int(seconds * 1e9),
            attributes={
                "phonon.namespace": self._namespace,
                "phonon.class": f"{cls.__module__}.{cls.__qualname__}",
                "phonon.resource": resource,
            },
        )
        if error is not None:
            span.record_exception(error)
            span.set_status(api.StatusCode.ERROR, type(error).__name__)
        span.end(end)
