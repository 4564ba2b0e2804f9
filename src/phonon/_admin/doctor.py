"""Finds the problems of a server, a namespace and a host, and names the remedies."""

import resource
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Literal, NamedTuple

from redis.exceptions import ResponseError

from phonon._admin.inspector import Inspector
from phonon._admin.namespace import Namespace
from phonon._admin.pages import Walk, next_page
from phonon._admin.records import BatchState, BatchStatus, LockStatus, ProcessStatus
from phonon._core.shown import counted
from phonon._protocol.library import Request
from phonon._transport.steps import Steps

Level = Literal["ok", "note", "problem"]

#: Seconds that a ping may take.
SLOW, VERY_SLOW = 0.005, 0.05
SKEW = 1.0
LONG = 3600.0
#: The share of its memory that a server may use, and files that a host should allow.
FULL = 0.8
FILES = 1024
#: The most entries of a listing that are read, and keys among which foreign ones are looked for.
MOST = 1000
SCANS, SCANNED = 20, 500
PINGS = 7


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        level: ``"ok"``, ``"note"`` or ``"problem"``.
        subject: The subject of the check, in a word or two.
        text: The result.
        remedy: The remedy; empty if none is needed.
    """

    level: Level
    subject: str
    text: str
    remedy: str = ""


class Doctor:
    """Examines a server and a namespace.

    Args:
        namespace: The namespace.
        inspector: Reads its content.
    """

    def __init__(self, namespace: Namespace, inspector: Inspector) -> None:
        self._namespace = namespace
        self._inspector = inspector

    def examine(self) -> Steps[list[Finding]]:
        """Return the findings.

        Raises:
            PhononError: The server does not answer.
        """
        info = yield from self._command(b"INFO", b"everything")
        if isinstance(info, ResponseError):
            info = yield from self._command(b"INFO")
        facts = _facts(info) if isinstance(info, bytes) else {}
        found = list(_server(facts))
        if not facts:
            text = f"INFO is refused to this user ({info})"
            found.append(Finding("note", "server", text, "grant +info"))
        found += yield from self._latency()
        found += yield from self._permissions()
        if facts.get("cluster_enabled") == "1":
            found += yield from self._cluster()
        found += yield from self._foreign()
        found += yield from self._namespace_findings()
        found += list(_host())
        return found

    def _command(self, *words: bytes) -> Steps[Any]:
        space = self._namespace
        request = Request(space.partitions.prefix, words)
        (reply,) = yield from space.server.exchange([request], space.timeout)
        if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
            raise reply
        return reply

    def _latency(self) -> Steps[list[Finding]]:
        times = []
        for _ in range(PINGS):
            begun = time.perf_counter()
            yield from self._command(b"PING")
            times.append(time.perf_counter() - begun)
        typical = min(times)  # a slower one may have waited for this host
        level: Level = "problem" if typical > VERY_SLOW else "note" if typical > SLOW else "ok"
        remedy = "put workers nearer to the server; see SLOWLOG GET on it" if level != "ok" else ""
        found = [Finding(level, "latency", f"a ping takes {typical * 1000:.1f} ms", remedy)]
        reply = yield from self._command(b"TIME")
        if isinstance(reply, list):
            skew = int(reply[0]) + int(reply[1]) / 1e6 - time.time()
            level = "note" if abs(skew) > SKEW else "ok"
            remedy = (
                "run a time daemon on both (chronyd, systemd-timesyncd)" if level != "ok" else ""
            )
            text = f"the server's clock is {skew:+.2f} s from this host's"
            found.append(Finding(level, "clock", text, remedy))
        return found

    def _permissions(self) -> Steps[list[Finding]]:
        space = self._namespace
        (reply,) = yield from space.server.exchange([space.read(0, "rights")], space.timeout)
        if not isinstance(reply, list):
            return []
        if not reply:
            return [Finding("ok", "permissions", "this user may run all that a worker needs")]
        missing = " ".join(f"+{command.decode().lower()}" for command in reply)
        return [
            Finding(
                "note",
                "permissions",
                f"this user may not run all that a worker needs: {missing}",
                "that is right for a user who only reads; for a worker's user see "
                "docs/operations.md",
            )
        ]

    def _cluster(self) -> Steps[list[Finding]]:
        reply = yield from self._command(b"CLUSTER", b"INFO")
        facts = _facts(reply) if isinstance(reply, bytes) else {}
        if facts.get("cluster_state") == "ok" and facts.get("cluster_slots_fail") == "0":
            return [Finding("ok", "cluster", "all slots are served")]
        served = facts.get("cluster_slots_ok", "?")
        text = f"the cluster's state is {facts.get('cluster_state')}, {served} of 16384 slots serve"
        return [Finding("problem", "cluster", text, "see CLUSTER NODES; partitions there wait")]

    def _foreign(self) -> Steps[list[Finding]]:
        """Find keys of the first protocol, which no release reads any more."""
        space = self._namespace
        tag = space.partitions.prefix[:-2]  # "{namespace"
        old, cursor = 0, b"0"
        for _ in range(SCANS):
            match = tag.translate(None, b"*?[]\\") + b"*"
            words = (b"SCAN", cursor, b"MATCH", match, b"COUNT", b"%d" % SCANNED)
            reply = yield from self._command(*words)
            if not isinstance(reply, list):
                return []
            cursor, keys = reply
            prefixes = (*space.partitions.prefixes, space.partitions.prefix)
            old += sum(not key.startswith(prefixes) and key.startswith(tag) for key in keys)
            if cursor == b"0":
                break
        if not old:
            return []
        text = f"{old} keys of this namespace are of an older protocol, or of other partitions"
        remedy = "when no process of that release runs any more, they are of no use: delete them"
        return [Finding("note", "older keys", text, remedy)]

    def _namespace_findings(self) -> Steps[list[Finding]]:
        processes = yield from self._inspector.processes()
        # Dead letters by themselves: a thousand retries must not hide them.
        parked = yield from _some(self._inspector.batches(("parked",), ""))
        unfinished = yield from _some(self._inspector.batches(UNFINISHED, ""))
        locks = yield from _some(self._inspector.locks(""))
        return [
            *_processes(processes, known=self._namespace.is_known),
            *_batches(parked, unfinished, processes),
            *_locks(locks),
        ]


UNFINISHED: tuple[BatchState, ...] = (
    "waiting-for-class",
    "waiting-for-survivor",
    "retrying",
    "running",
)


def _some(walk: Walk[Any]) -> Steps[list[Any]]:
    found: list[Any] = []
    while len(found) < MOST and (page := (yield from next_page(walk))) is not None:
        found += page
    return found


def _facts(info: bytes) -> dict[str, str]:
    lines = info.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _server(facts: dict[str, str]) -> Iterator[Finding]:
    if not facts:
        return
    valkey, version = facts.get("valkey_version"), facts.get("redis_version", "?")
    name = f"Valkey {valkey}" if valkey else f"Redis {version}"
    yield Finding("ok", "version", f"{name}, which has Functions")
    yield from _persistence(facts)
    policy = facts.get("maxmemory_policy", "noeviction")
    most, used = int(facts.get("maxmemory", 0)), int(facts.get("used_memory", 0))
    if policy != "noeviction":
        gone = int(facts.get("evicted_keys", 0))
        yield Finding(
            "problem",
            "eviction",
            f"maxmemory-policy is {policy}: under memory pressure the server deletes keys that "
            f"Phonon needs; it has evicted {gone:,} so far",
            "CONFIG SET maxmemory-policy noeviction, and in the server's file",
        )
    else:
        yield Finding("ok", "eviction", "maxmemory-policy is noeviction")
    if most and used > FULL * most:
        yield Finding(
            "problem",
            "memory",
            f"{used / most:.0%} of maxmemory are in use; when it is full, new data is refused and "
            "kept by the workers",
            "raise maxmemory, or look for large sessions: phonon sessions, phonon batches",
        )
    else:
        share = f", {used / most:.0%} of maxmemory" if most else "; maxmemory is not set"
        yield Finding("ok", "memory", f"{used / 2**20:,.0f} MiB are in use{share}")
    if facts.get("role") == "slave":
        yield Finding("problem", "role", "this is a replica", "connect to its primary")


def _persistence(facts: dict[str, str]) -> Iterator[Finding]:
    aof = facts.get("aof_enabled") == "1"
    failed = [
        name
        for name in ("rdb_last_bgsave_status", "aof_last_write_status", "aof_last_bgrewrite_status")
        if facts.get(name, "ok") != "ok"
    ]
    if failed:
        text = f"the server cannot write its files ({', '.join(failed)})"
        yield Finding("problem", "persistence", text, "see its log: disk full, or no permission")
    elif not aof:
        yield Finding(
            "problem",
            "persistence",
            "appendonly is no: a restart of the server loses all writes since its last "
            "snapshot; Phonon notices that, and cannot restore them",
            "CONFIG SET appendonly yes, and in the server's file; see docs/operations.md",
        )
    else:
        yield Finding("ok", "persistence", "appendonly is yes")


def _processes(found: list[ProcessStatus], *, known: bool) -> Iterator[Finding]:
    if not found:
        text = "no process runs" if known else "no process has ever used it"
        remedy = "start a worker; is the namespace right (--namespace)?"
        yield Finding("problem" if known else "note", "processes", text, remedy)
        return
    for state, remedy in (
        ("late", "it hangs or was killed: survivors declare it dead by themselves"),
        ("dead", "survivors take it over; if none executes batches, start a worker"),
    ):
        ids = [p.id[:8] for p in found if p.state == state]
        if ids:
            text = f"{len(ids)} of {len(found)} are {state}: {', '.join(ids[:5])}"
            yield Finding("problem", "processes", text, remedy)
    alive = [p for p in found if p.state == "alive"]
    if alive:
        yield Finding("ok", "processes", f"{len(alive)} alive")
    else:
        yield Finding("problem", "processes", "0 alive", "start a worker")
    release = metadata.version("phonon")
    others = sorted({p.version for p in found if p.version and p.version != release})
    if others:
        text = f"some run other releases than this one, {release}: {', '.join(others)}"
        yield Finding("note", "releases", text, "finish the deployment")
    for process in found:
        if process.backlog and process.backlog >= MOST:
            where = f"{process.id[:8]} at {process.host}:{process.pid}"
            text = f"{where} has a backlog of {process.backlog:,}"
            remedy = "its database or its server is in trouble: its log says which"
            yield Finding("problem", "backlog", text, remedy)


def _batches(
    parked: list[BatchStatus], found: list[BatchStatus], processes: list[ProcessStatus]
) -> Iterator[Finding]:
    if parked:
        more = " (or more)" if len(parked) >= MOST else ""
        yield Finding(
            "problem",
            "dead letters",
            f"{counted(len(parked), 'parked batch', 'parked batches')}{more}, such as "
            f"{parked[0].resource!r}: "
            f"{parked[0].error.splitlines()[0][:200] if parked[0].error else ''}",
            "phonon batches --state parked; phonon show RESOURCE; then phonon replay, or discard",
        )
    able = {name for p in processes if p.state == "alive" and p.executes for name in p.classes}
    unknown = sorted({b.class_name for b in found if b.class_name} - able)
    if unknown:
        yield Finding(
            "problem",
            "unknown classes",
            f"batches wait for {', '.join(unknown)}, which no live process can execute",
            "start a worker that imports it, with recover_failed_processes left on",
        )
    for state, subject, remedy in (
        ("waiting-for-survivor", "orphans", "start a worker that executes batches"),
        ("retrying", "retries", "their errors name the cause: phonon batches --state retrying"),
    ):
        affected = [batch for batch in found if batch.state == state]
        if affected:
            text = counted(len(affected), f"batch is {state}", f"batches are {state}")
            text += f", such as {affected[0].resource!r} {affected[0].error}"
            yield Finding("note", subject, text.strip(), remedy)
    long = [b for b in found if b.state == "running" and b.age > LONG]
    if long:
        text = f"{long[0].resource!r} has been executed for {long[0].age / 3600:.1f} h"
        remedy = "its process hangs in execute: end it, and a survivor takes over"
        yield Finding("problem", "long executions", text, remedy)
    if not parked and not unknown and not long:
        yield Finding("ok", "batches", "none is parked")


def _locks(found: list[LockStatus]) -> Iterator[Finding]:
    now = time.time()
    for lock in found:
        held = [grant for grant in lock.holders if now - grant.since > LONG]
        if held and lock.waiting:
            grant = held[0]
            yield Finding(
                "problem",
                "locks",
                f"{lock.name!r} has been held for {(now - grant.since) / 3600:.1f} h by "
                f"{grant.process[:8]} at {grant.host}:{grant.pid}, thread {grant.thread}, and "
                f"{lock.waiting} wait",
                f"end that process; or phonon unlock {lock.name} {grant.token}",
            )


def _host() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < FILES:
        text = f"this host allows {files} open files a process"
        yield Finding("note", "open files", text, f"raise it to {FILES} or more (ulimit -n)")
    else:
        yield Finding("ok", "open files", f"this host allows {files} a process")
