"""Values of wrong types, passed for each argument of each public callable.

What cannot be meant is a `ConfigurationError` where it is passed. The table says which of the
values each argument takes; a new argument has to be entered there.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from phonon import (
    Admin,
    ConflictFreeUpdate,
    Durability,
    LruCache,
    Model,
    Process,
    RetryPolicy,
    connections,
    metrics,
    testing,
    tracing,
)
from phonon.aio.sinks import AsyncSqlTable
from phonon.errors import ConfigurationError, PhononError
from phonon.fields import ID, Sum
from phonon.registry import configure
from phonon.sinks import SqlTable, table_of, tokens_table
from phonon.web import create_app
from support.world import Redis

THING = object()
VALUES: dict[str, Any] = {
    "None": None,
    "42": 42,
    "bytes": b"x",
    "empty": "",
    "-1": -1,
    "nan": math.nan,
    "inf": math.inf,
    "True": True,
    "object": THING,
    "list": [],
    "dict": {},
    "text": "zz",
}
EVERY = " ".join(VALUES)
TEXT = "empty text"
FLAG = "True"
SECONDS = "42"
TOKEN, LATEST, NO_TOKEN = {"token": "42 -1"}, {"token": "None 42 -1"}, {"token": "None"}
HASHABLE = "None 42 bytes empty -1 nan inf True object text"


class Views(Model, name="views of wrong types"):
    user: ID[str]
    n: Sum[int] = Sum()

    def on_complete(self) -> None:
        """Write nothing."""


class Tally(ConflictFreeUpdate, name="tally of wrong types"):
    def execute(self) -> None:
        """Write nothing."""


class Call(NamedTuple):
    """A public callable.

    Attributes:
        function: The callable, given a process and an `Admin`.
        good: Arguments that it takes.
        takes: The values that are fine, by argument, for each argument that is tried.
    """

    function: Callable[[Process, Admin], Callable[..., Any]]
    good: dict[str, Any]
    takes: dict[str, str]


def method(name: str, /, **takes: str) -> Call:
    return Call(lambda process, _: getattr(process, name), {}, takes)


def of_admin(name: str, good: dict[str, Any] | None = None, /, **takes: str) -> Call:
    return Call(lambda _, admin: getattr(admin, name), good or {}, takes)


def of_reference(name: str, /, **takes: str) -> Call:
    return Call(lambda process, _: getattr(process.create_reference("r"), name), {}, takes)


def plain(
    function: Callable[..., Any], good: dict[str, Any] | None = None, /, **takes: str
) -> Call:
    return Call(lambda *_: function, good or {}, takes)


def of_collection(name: str, good: dict[str, Any] | None = None, /, **takes: str) -> Call:
    return Call(lambda process, _: getattr(process.collect(Views), name), good or {}, takes)


def connect(hosts: Any) -> None:
    """Connect nowhere if there is no host: there may be a server of somebody's."""
    if hosts is not None:
        connections.connect(hosts)


def tally(process: Process) -> Callable[..., Tally]:
    def make(**given: Any) -> Tally:
        options: dict[str, Any] = {"process": process, "_id": "x", "init_cache": False} | given
        return Tally(**options)

    return make


def lab(server: Any) -> None:
    """Start no server."""
    if server is not None:
        testing.Lab(server)


def lost_answers(process: Any, answers: Any = 1) -> None:
    with testing.lose_answers(process, answers):
        """Nothing."""


def paused(process: Any) -> None:
    with testing.pause(process):
        """Nothing."""


def exact(**options: Any) -> None:
    """Check nothing: what is wrong has to be told before a server is started."""
    good: dict[str, Any] = {"update": print, "messages": [1], "read": dict, "expected": {}}
    testing.assert_exact(**good | {"processes": "none"} | options)


SQL: dict[str, Any] = {"engine": sa.create_engine("sqlite://"), "name": "t", "model": Views}
TABLE = {"name": TEXT, "model": "None", "metadata": "None", "schema": f"None {TEXT}"}
CALLS: dict[str, Call] = {
    "batch": Call(
        lambda process, _: process.batch,
        {"dedupe": "d", "messages": []},
        {"messages": "list dict", "message_id": "None", "window": "42", "dedupe": TEXT},
    ),
    "batch without dedupe": method(
        "batch", messages="", message_id="None", window="", durable=FLAG, dedupe=f"None {TEXT}"
    ),
    "collect": Call(
        lambda process, _: process.collect,
        {"model": Views},
        {
            "model": "",
            "max_entries": "42",
            "idle": "None 42",
            "longest": "None 42",
            "largest": "None 42",
            "ignore_unknown": FLAG,
            "sink": "None",
        },
    ),
    "create_reference": Call(
        lambda process, _: process.create_reference,
        {"resource": "r"},
        {"resource": TEXT, "block": FLAG, "parties": "None 42"},
    ),
    "lock": Call(
        lambda process, _: process.lock,
        {"lock_key": "l"},
        {
            "lock_key": TEXT,
            "block": FLAG,
            "shared": FLAG,
            "reentrant": FLAG,
            "lease": "None 42",
            "on_lost": "None",
            "timeout": "None 42 -1 inf",
        },
    ),
    "semaphore": Call(
        lambda process, _: process.semaphore,
        {"name": "s", "places": 2},
        {"name": TEXT, "places": "42", "block": FLAG, "timeout": "None 42 -1 inf"},
    ),
    "source": Call(
        lambda process, _: process.source, {"name": "s"}, {"name": TEXT, "position": "None 42"}
    ),
    "registry": method("get_registry", registry_key="None"),
    "dereference": of_reference(
        "dereference", callback="None", args="None list", kwargs="None dict", block="None True"
    ),
    "wait": Call(
        lambda process, _: process.create_reference("r", parties=1).wait,
        {},
        {"timeout": "None 42 -1 inf"},
    ),
    "reference's lock": of_reference("lock", block="None True", shared=FLAG, lease="None 42"),
    "Tally": Call(
        lambda process, _: tally(process),
        {},
        {"database": TEXT, "collection": TEXT, "init_cache": FLAG, "block": FLAG},
    ),
    "LruCache": plain(LruCache, max_entries="42"),
    "LruCache.get": plain(LruCache().get, key=HASHABLE),
    "add_many": of_collection("add_many", rows="list"),
    "add_record": of_collection(
        "add_record", {"record": Views("ada", n=1)}, arguments="None list", named="None dict"
    ),
    "Collection.get": of_collection("get", key=HASHABLE),
    "RetryPolicy": plain(
        RetryPolicy, attempts="42", first_delay="42", longest_delay="42", jitter="", crashes="42"
    ),
    "Durability": plain(Durability, fsync=FLAG, replicas="42", timeout="42"),
    "configure": plain(configure, max_entries="42", idle="None 42", longest="None 42"),
    "connect": plain(connect, hosts="None"),
    "SqlTable": plain(SqlTable, SQL, engine="", children="None dict", **TABLE),
    "AsyncSqlTable": plain(
        AsyncSqlTable,
        SQL | {"engine": create_async_engine("sqlite+aiosqlite://")},
        engine="",
        children="None dict",
        **TABLE,
    ),
    "table_of": plain(
        table_of,
        {"model": Views, "name": "t"},
        model="",
        name=TEXT,
        metadata="None",
        schema=f"None {TEXT}",
    ),
    "tokens_table": plain(tokens_table, metadata="None", name=TEXT),
    "create_app": plain(
        create_app,
        url=f"None {TEXT}",
        namespace=TEXT,
        hosts="None",
        timeout="42 inf",
        **NO_TOKEN,
    ),
    "metrics.instrument": plain(metrics.instrument, meter_provider="None"),
    "tracing.instrument": plain(tracing.instrument, tracer_provider="None"),
    "acts": of_admin("acts", most="42"),
    "batches": of_admin("batches", state="None list", prefix=TEXT),
    "oldest_sessions": of_admin(
        "oldest_sessions", {"most": 5}, most="42", older="None 42", prefix=TEXT
    ),
    "sessions": of_admin("sessions", older="None 42", prefix=TEXT),
    "locks": of_admin("locks", prefix=TEXT),
    "Admin.lock": of_admin("lock", {"name": "l"}, name=TEXT, semaphore=FLAG),
    "break_lock": of_admin(
        "break_lock", {"name": "l", "token": 5}, name=TEXT, semaphore=FLAG, **TOKEN
    ),
    "content": of_admin("content", {"resource": "r"}, resource=TEXT, **LATEST),
    "replay": of_admin("replay", {"resource": "r", "token": 5}, resource=TEXT, **TOKEN),
    "discard": of_admin("discard", {"resource": "r", "token": 5}, resource=TEXT, **TOKEN),
    "expire": of_admin("expire", {"process": "p"}, process=TEXT),
    "resource": of_admin("resource", {"name": "r"}, name=TEXT),
    "Clock": plain(testing.Clock, client=""),
    "Lab": plain(lab, server="None"),
    "kill": plain(testing.kill, process=""),
    "pause": plain(paused, process=""),
    "lose_answers": plain(lost_answers, process=""),
    "assert_mergeable": plain(
        testing.assert_mergeable,
        {"kind": Tally, "messages": [{}, {}]},
        kind="",
        messages="",
        rounds="42",
    ),
    "assert_exact": plain(exact, update="", read="", clear=""),
}


@pytest.fixture
def admin(server: Redis, namespace: str) -> Iterator[Admin]:
    with Admin(server.url, namespace=namespace) as admin:
        yield admin


def used(result: Any) -> None:
    """Go through what is only looked up when it is iterated over."""
    if inspect.isgenerator(result):
        list(result)


@pytest.mark.parametrize("name", CALLS)
def test_a_value_of_a_wrong_type_is_told_where_it_is_passed(
    process: Process, admin: Admin, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a text is a fine folder for an embedded server
    call = CALLS[name]
    function = call.function(process, admin)
    for argument, fine in call.takes.items():
        for kind, value in VALUES.items():
            where, refused = f"{name}({argument}={kind})", ""
            try:
                used(function(**call.good | {argument: value}))
            except ConfigurationError as error:
                refused = str(error)
                assert kind not in fine.split(), where
            except (PhononError, LookupError):  # there is none of that name, say
                assert kind in fine.split(), where
            except Exception as error:  # noqa: BLE001 - to name the argument
                pytest.fail(f"{where} is {error!r}")
            else:
                assert kind in fine.split(), where
            assert not refused or argument in refused, where
