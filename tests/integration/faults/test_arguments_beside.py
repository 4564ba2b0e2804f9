"""Arguments of what is beside the core: sinks, sources, jobs, figures, classes."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from phonon import ConflictFreeUpdate, Model, Process, metrics, tracing
from phonon.contrib.schedule import Turn, only_one
from phonon.contrib.worker import Worker
from phonon.errors import ConfigurationError
from phonon.fields import ID, Sum
from phonon.registry import Registry, configure
from phonon.sinks.sql import SqlTable, table_of, tokens_table
from phonon.sources.kafka import KafkaSource
from phonon.sources.streams import StreamSource

CONFIG = {"group.id": "g", "bootstrap.servers": "localhost:1"}


class Views(Model, name="views beside"):
    user: ID[str]
    n: Sum[int] = Sum()


def kafka(process: Any, config: Any = None, topics: Any = "t", **options: Any) -> KafkaSource:
    return KafkaSource(process, CONFIG if config is None else config, topics, **options)


def stream(process: Any, streams: Any = "s", group: Any = "g", **options: Any) -> StreamSource:
    return StreamSource(process, streams, group, **options)


def table(name: Any = "t", model: Any = Views, **options: Any) -> SqlTable:
    return SqlTable(sa.create_engine("sqlite://"), name, model, **options)


#: Each with the argument, and what cannot be meant.
CALLS: list[tuple[str, list[Any], Callable[[Process, Any], object]]] = [
    ("name", [None, 42, b"t", []], lambda _, bad: table(bad)),
    ("model", [42, "Views", [], int], lambda _, bad: table(model=bad)),
    ("metadata", [42, "m", {}], lambda _, bad: table(metadata=bad)),
    ("schema", [42, b"s", []], lambda _, bad: table(schema=bad)),
    ("children", [42, "c", []], lambda _, bad: table(children=bad)),
    ("name", [None, 42, []], lambda _, bad: table_of(Views, bad)),
    ("name", [None, 42, []], lambda _, bad: tokens_table(name=bad)),
    ("metadata", [42, "m"], lambda _, bad: tokens_table(bad)),
    ("process", [None, 5, "redis://x", Process], lambda _, bad: kafka(bad)),
    ("config", [42, "c", [], {}], kafka),
    ("topics", [42, [], [5], [""], b"t"], lambda p, bad: kafka(p, topics=bad)),
    ("process", [None, 5, "redis://x", Process], lambda _, bad: stream(bad)),
    ("streams", [42, [], [5], None], stream),
    ("group", [None, 42, b"g"], lambda p, bad: stream(p, group=bad)),
    ("claim_idle", [None, "1", -1, 0], lambda p, bad: stream(p, claim_idle=bad)),
    ("window", [None, "1", -1, 30], lambda p, bad: stream(p, window=bad)),
    ("max_entries", [0, "9", 2.5, None], lambda _, bad: Registry(max_entries=bad)),
    ("idle", ["9", -1, True], lambda _, bad: configure(idle=bad)),
    ("longest", ["9", -1, 0], lambda _, bad: configure(longest=bad)),
    ("process", [None, 5], lambda _, bad: only_one(bad, "job")),
    ("name", [None, 5], only_one),
    ("every", ["5", 0, -1, True], lambda p, bad: only_one(p, "job", every=bad)),
    ("process", [None, 5], lambda _, bad: Turn(bad, "job")),
    ("url", [5, b"redis://x"], lambda _, bad: Worker(bad)),
    ("process", [None, 5, "x"], lambda _, bad: metrics.read(bad)),
    ("process", [None, 5, "x"], lambda _, bad: metrics.PrometheusCollector(bad)),
    ("process", [None, 5, "x"], lambda _, bad: metrics.instrument(bad)),
    ("process", [None, 5, "x"], lambda _, bad: tracing.instrument(bad)),
    (
        "aliases",
        [None, 5, "former", [5]],
        lambda _, bad: type("Row", (ConflictFreeUpdate,), {}, name="row beside", aliases=bad),
    ),
]
#: What both sources have.
OF_SOURCES: list[tuple[str, list[Any]]] = [
    ("batch_size", [0, -1, 2.5, "9", None]),
    ("poll_timeout", [0, -1, "9", None]),
    ("sessions", [5, "cache", []]),
    ("on_poison", [5, "print"]),
    ("dead_letters", [5, b"t"]),
]


@pytest.mark.parametrize("make_source", [kafka, stream])
@pytest.mark.parametrize(("argument", "values"), OF_SOURCES)
def test_an_argument_of_a_source_that_cannot_be_meant(
    process: Process, argument: str, values: list[Any], make_source: Callable[..., object]
) -> None:
    for bad in values:
        with pytest.raises(ConfigurationError, match=argument):
            make_source(process, **{argument: bad})


@pytest.mark.parametrize(("argument", "values", "call"), CALLS)
def test_an_argument_that_cannot_be_meant(
    process: Process, argument: str, values: list[Any], call: Callable[[Process, Any], object]
) -> None:
    for bad in values:
        with pytest.raises(ConfigurationError, match=argument):
            call(process, bad)
