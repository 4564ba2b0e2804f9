"""A Redis Cluster: each request goes to the node that has its slot, all nodes side by side.

The map of the slots is kept here. The map of redis-py's cluster client does not fit: up to redis-py
7 every use of it cuts the connections of other threads, and its pipelines ask the server for the
keys of each ``FCALL``, which Phonon knows.
"""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from phonon._protocol.library import Request
from phonon._transport import failures
from phonon._transport.server import UNANSWERED, FunctionLibrary, Reply, Server
from phonon._transport.steps import GONE, Invoke, Node, Steps

#: The nodes that are asked for the map after a failure, before the requests are tried again: each
#: node behind a dead network costs a time-out.
ASKED_AT_ONCE = 3
#: Keys whose slots are remembered. They are prefixes of partitions, so there are few.
REMEMBERED_KEYS = 4096
#: Errors of a slot that is being moved: the map is right, so no node is asked for it.
UNDER_WAY = ("ASK ", "TRYAGAIN ")


class ClusterServer(Server):
    """Sends requests to the nodes of a cluster.

    Args:
        node_at: Makes the node for a host and a port.
        remap: Translates an address that a node has announced.
        known: Hosts and ports of nodes that the client knows already.
        given: Hosts and ports that the user gave for the cluster. They are asked for the map at any
            time: a name may still resolve when all addresses have changed.
        library: See `Server`.
        address: The cluster's name in messages, without a password.
        settings: See `Server`.
    """

    colocated = False

    def __init__(
        self,
        node_at: Callable[[str, int], Node],
        remap: Callable[[str, int], tuple[str, int]],
        known: Sequence[tuple[str, int]],
        given: Sequence[tuple[str, int]],
        library: FunctionLibrary,
        address: str,
        **settings: Any,
    ) -> None:
        self._node_at = node_at
        self._remap = remap
        self._nodes: dict[tuple[str, int], Node] = {}
        start = [self._at(*place) for place in dict.fromkeys((*known, *given))]
        super().__init__(start[0], library, address, **settings)
        #: The primary of each slot. A new map replaces the whole list; a single slot that has moved
        #: is changed in it.
        self._owners: list[Node] = [start[0]] * REDIS_CLUSTER_HASH_SLOTS
        self._slots: dict[bytes, int] = {}
        self._start = start

    def start(self) -> Steps[None]:
        """Learn which node has which slot, and load the library.

        A primary that does not answer may be failing over. The start succeeds all the same, and the
        node gets the library when it is back.

        Raises:
            ServerUnreachableError: No node answers.
            ServerError: A node cannot be used.
        """
        failure = yield from self._ask_for_map(self._start)
        if failure is not None:
            raise self._no_start(failure) from failure
        prepared = 0
        for node in dict.fromkeys(self._owners):
            try:
                yield from self._prepare(node, check_mode=False)
                prepared += 1
            except GONE as error:
                failure = error
            except ResponseError as error:
                raise self.explain(error) from error
        if failure is not None and not prepared:
            raise self._no_start(failure) from failure

    def close(self) -> Steps[None]:
        """Close the connections to all nodes."""
        for node in list(self._nodes.values()):
            yield Invoke(node.close)

    def forget_connections(self) -> None:
        """Drop the connections after a fork, because they are the parent's."""
        for node in list(self._nodes.values()):
            node.forget()

    def node_of(self, key: bytes) -> Node:
        """Return the primary of a key's slot."""
        return self._owners[self._slot(key)]

    def _slot(self, key: bytes) -> int:
        slot = self._slots.get(key)
        if slot is None:
            if len(self._slots) >= REMEMBERED_KEYS:
                self._slots = {}
            slot = self._slots[key] = key_slot(key)
        return slot

    def _no_start(self, failure: BaseException) -> Exception:
        if isinstance(failure, ResponseError):
            if "cluster support disabled" in str(failure):
                return failures.no_cluster(self.address)
            return self.explain(failure)
        return failures.unreachable(self.address, failure)

    def _attempt(
        self,
        requests: Sequence[Request],
        indices: Sequence[int],
        replies: list[Reply],
        limit: float | None,
        confirm: bool,
    ) -> Steps[BaseException | None]:
        owners = self._owners
        asked = {i: self.node_of(requests[i].key) for i in indices}
        failure = yield from super()._attempt(requests, indices, replies, limit, confirm)
        suspects = {node for i, node in asked.items() if replies[i] is UNANSWERED}
        # The node that redirected us knows the new owner; the others hear of it later.
        moved = {
            self._slot(requests[i].key): there
            for i, node in asked.items()
            if (there := self.node_of(requests[i].key)) is not node
        }
        # Another thread may have asked for the map meanwhile.
        if suspects and self._owners is owners and not str(failure).startswith(UNDER_WAY):
            yield from self._refresh(suspects)
            for slot, node in moved.items():
                self._owners[slot] = node
        return failure

    def _note(self, node: Node, error: ResponseError) -> None:
        """Learn from a temporary error that a slot has moved, or that a primary is gone.

        ``ASK`` is waited out, never followed. Each request declares a key that never exists, so
        while a slot is being moved its old owner always answers ``ASK``; but its new owner lacks
        the keys that have not been moved yet.
        """
        super()._note(node, error)
        if str(error).startswith("MOVED "):
            _, slot, place = str(error).split(" ")[:3]
            host, _, port = place.rpartition(":")
            self._owners[int(slot)] = self._announced(node, host, int(port))

    def _at(self, host: str, port: int) -> Node:
        node = self._nodes.get((host, port))
        if node is None:
            node = self._nodes.setdefault((host, port), self._node_at(host, port))
        return node

    def _announced(self, by: Node, host: str | bytes | None, port: int) -> Node:
        """Return a node that another node has announced."""
        name = host.decode() if isinstance(host, bytes) else host
        if name in ("", "?", None):
            name = by.host  # the node does not know its own name: take the one that we used
        return self._at(*self._remap(str(name), port))

    # The map

    def _refresh(self, suspects: Collection[Node]) -> Steps[None]:
        """Ask a node for the map of slots. Without an answer the old map stays."""
        nodes = list(self._nodes.values())
        random.shuffle(nodes)
        nodes.sort(key=suspects.__contains__)
        yield from self._ask_for_map(nodes[:ASKED_AT_ONCE])

    def _ask_for_map(self, nodes: Sequence[Node]) -> Steps[BaseException | None]:
        """Ask nodes, one after the other, until one knows the whole map.

        Returns:
            The errors, if no node answered.
        """
        failure: BaseException | None = RedisConnectionError("none of its nodes has slots")
        most = 0
        for node in nodes:
            try:
                slots = (yield from self._commands(node, (b"CLUSTER", b"SLOTS")))[0]
            except (*GONE, ResponseError) as error:
                slots = error
            if isinstance(slots, Exception):
                failure = failure if most else slots
                continue
            covered = sum(last - first + 1 for first, last, *_ in slots)
            # A node that has left the cluster, or was not let in yet, knows of few slots or none.
            if covered > most:
                most = covered
                self._owners = self._map(node, slots)
                failure = None
            if covered == REDIS_CLUSTER_HASH_SLOTS:
                break
        return failure

    def _map(self, asked: Node, slots: Sequence[Any]) -> list[Node]:
        """Turn the answer of ``CLUSTER SLOTS`` into a list of nodes by slot."""
        # A node that is asked for a slot without an owner says so, or knows the owner.
        owners = [asked] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, *nodes in slots:
            # Replicas as well: they are asked for the map when the primaries are gone.
            found = [self._announced(asked, host, port) for host, port, *_ in nodes]
            owners[first : last + 1] = found[:1] * (last - first + 1)
        return owners
