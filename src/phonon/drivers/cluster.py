"""A Redis Cluster: each call goes to the node that has its slot, a pipeline a node.

redis-py's cluster client makes the connections; which node has which slot is kept here. Its own
map is no use to us: up to redis-py 7 every look at it cuts the connections of other threads, and
its pipelines ask the server for the keys of each ``FCALL``, which we know.
"""

import random
from collections.abc import Collection, Sequence
from typing import Any, cast

import redis
from redis.cluster import ClusterNode
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from phonon.drivers.server import GONE, UNANSWERED, Server, is_passing
from phonon.protocol.effects import Call
from phonon.protocol.library import Library

#: Nodes that are asked for the map after a failure, before the calls are tried again: each one
#: that is behind a dead network costs a time-out.
ASKED_AT_ONCE = 3
#: What the key of a resource contains and no other key of ours does.
RESOURCE = b":{="

Pool = Any


class ClusterServer(Server):
    """Sends calls to the nodes of a cluster. A resource's keys are all in one slot.

    Args:
        client: Makes the connections.
        library: See `Server`, as for the rest.
        address: What to call the cluster in messages; without a password.
        nodes: Hosts and ports that were given for the cluster. They are asked for its map as long
            as we live: a name may lead somewhere when all addresses have changed.
        settings: See `Server`.
    """

    colocated = False

    def __init__(
        self,
        client: "redis.RedisCluster",
        library: Library,
        address: str,
        nodes: Sequence[tuple[str, int]] = (),
        **settings: Any,
    ) -> None:
        super().__init__(cast("redis.Redis", client), library, address, **settings)
        self._cluster = client
        self._given = nodes
        self._nodes: dict[tuple[str, int], redis.Redis] = {}
        #: For each slot the connections to its primary. A new map takes the place of the whole
        #: list; a single slot that has moved is changed in it.
        self._owners: list[Pool] = []

    def start(self) -> None:
        """Learn which node has which slot, and load the library.

        A primary that is not there may be failing over: it is no reason not to start, and gets
        the library when it is back.

        Raises:
            ServerUnreachableError: No node answers.
            ServerError: One cannot be used.
        """
        found = [(node.host, node.port) for node in self._cluster.get_nodes() if node.host]
        failure = self._ask_for_map([self._pool_at(*node) for node in (*found, *self._given)])
        loaded = 0
        for pool in dict.fromkeys(self._owners):
            try:
                self._load(pool)
                self._check_durability(pool)
                loaded += 1
            except GONE as error:
                failure = error
            except ResponseError as error:
                raise self._unusable(error) from error
        if isinstance(failure, ResponseError):
            raise self._unusable(failure) from failure
        if failure is not None and not loaded:
            raise self.unreachable(failure) from failure

    def close(self) -> None:
        """Close the connections, but not the client."""
        super().close()
        for node in self._nodes.values():
            node.connection_pool.disconnect()

    def _pool_of(self, key: bytes) -> Pool:
        return self._owners[key_slot(key)]

    def _attempt(
        self,
        calls: Sequence[Call],
        words: list[tuple[Any, ...]],
        indices: Sequence[int],
        replies: list[Any],
    ) -> BaseException | None:
        owners = self._owners
        shares: dict[Pool, list[int]] = {}
        for i in indices:
            shares.setdefault(owners[key_slot(calls[i].base)], []).append(i)
        errors, failure = self._send(calls, shares, words, replies)
        moved: dict[int, Pool] = {}
        for pool, wrong in errors.items():
            try:
                rest = self._redirect(pool, calls, words, wrong, replies, moved)
                self._sift(pool, rest, replies)
            except GONE as error:
                failure = error
        suspects = {owners[key_slot(calls[i].base)] for i in indices if replies[i] is UNANSWERED}
        if suspects and self._owners is owners:  # else another thread has asked meanwhile
            self._refresh(suspects)
        for slot, pool in moved.items():
            # Who sent us on is the one that knows: the others hear of it later.
            self._owners[slot] = pool
        return failure

    def _send(
        self,
        calls: Sequence[Call],
        shares: dict[Pool, list[int]],
        words: list[tuple[Any, ...]],
        replies: list[Any],
    ) -> tuple[dict[Pool, list[int]], BaseException | None]:
        """Send each node its share before any answer is read: they work side by side.

        Returns:
            The answers that are errors, by node, and why there are calls without an answer.
        """
        errors: dict[Pool, list[int]] = {}
        failure: BaseException | None = None
        posted: list[tuple[Pool, Any]] = []
        try:
            # In one order in all threads: they may hold connections while they wait for others, if
            # the client limits their number.
            for pool in sorted(shares, key=id):
                try:
                    confirm = self._wants_confirmation(calls, shares[pool])
                    connection = self._post(pool, words, shares[pool], confirm=confirm)
                    posted.append((pool, connection))
                except GONE as error:
                    failure = error
                except ResponseError as error:  # while connecting: it will not pass
                    for i in shares[pool]:
                        replies[i] = error
            while posted:
                pool, connection = posted.pop()
                try:
                    confirm = self._wants_confirmation(calls, shares[pool])
                    errors[pool] = self._read(
                        pool, connection, shares[pool], replies, confirm=confirm
                    )
                except GONE as error:
                    failure = error
        except BaseException:
            # Interrupted, with answers still to come: nobody must read them for his own.
            for pool, connection in posted:
                self._drop(pool, connection)
            raise
        return errors, failure

    def _redirect(
        self,
        pool: Pool,
        calls: Sequence[Call],
        words: list[tuple[Any, ...]],
        errors: Sequence[int],
        replies: list[Any],
        moved: dict[int, Pool],
    ) -> list[int]:
        """See to the calls of keys that are elsewhere, and note the slots that have moved.

        Returns:
            The errors that are something else.
        """
        rest = []
        for i in errors:
            error = replies[i]
            if not isinstance(error, AskError):
                rest.append(i)
                continue
            replies[i] = UNANSWERED
            there = self._announced(pool, error.host, error.port)
            if isinstance(error, MovedError):
                moved[error.slot_id] = there
            elif RESOURCE not in calls[i].base:
                replies[i] = self._ask(there, words[i])
            # Otherwise the call waits until the whole slot has moved. The server is told one key
            # of a resource, a name for all of them that never exists, so while the slot is under
            # way it always sends us on. Over there those keys would be missing that have not
            # arrived yet, and the call would start a second life of the resource beside them.
        return rest

    def _ask(self, pool: Pool, words: tuple[Any, ...]) -> Any:
        """Call where a key is that has left its slot's owner already, or is not there yet."""
        try:
            reply = self._commands(pool, [("ASKING",), words])[1]
            if isinstance(reply, ResponseError) and "unction not found" in str(reply):
                self._load(pool)
                return UNANSWERED
        except GONE:
            return UNANSWERED
        return UNANSWERED if isinstance(reply, ResponseError) and is_passing(reply) else reply

    def _pool_at(self, host: str, port: int) -> Pool:
        """The connections to a node."""
        node = self._nodes.get((host, port))
        if node is None:
            # A node of our own, so that nothing the client does to its nodes touches these.
            made = self._cluster.get_redis_connection(ClusterNode(host, port))
            node = self._nodes.setdefault((host, port), made)
        return node.connection_pool

    def _announced(self, by: Pool, host: str | bytes | None, port: int) -> Pool:
        """The connections to a node that another one has told us of."""
        name = host.decode() if isinstance(host, bytes) else host
        if name in ("", "?", None):
            name = by.connection_kwargs["host"]  # it knows no name for it: the one that we used
        return self._pool_at(*self._cluster.nodes_manager.remap_host_port(str(name), port))

    def _refresh(self, suspects: Collection[Pool]) -> None:
        """Ask some node which node has which slot. Without an answer the old map stays."""
        pools = [node.connection_pool for node in list(self._nodes.values())]
        random.shuffle(pools)
        pools.sort(key=suspects.__contains__)
        self._ask_for_map(pools[:ASKED_AT_ONCE])

    def _ask_for_map(self, pools: Sequence[Pool]) -> BaseException | None:
        """Ask nodes, one after the other, until one knows the whole map.

        Returns:
            What went wrong, if none knew anything.
        """
        failure: BaseException | None = RedisConnectionError("none of its nodes has slots")
        most = 0
        for pool in pools:
            try:
                slots = self._commands(pool, [("CLUSTER", "SLOTS")])[0]
            except (*GONE, ResponseError) as error:
                slots = error
            if isinstance(slots, Exception):
                failure = failure if most else slots
                continue
            covered = sum(last - first + 1 for first, last, *_ in slots)
            # A node that has left the cluster, or was not let in yet, knows of few slots or none.
            if covered > most:
                most = covered
                self._owners = self._map(pool, slots)
                failure = None
            if covered == REDIS_CLUSTER_HASH_SLOTS:
                break
        return failure

    def _map(self, asked: Pool, slots: Sequence[Any]) -> list[Pool]:
        """The answer of ``CLUSTER SLOTS`` as a list of connections by slot."""
        # Whoever is asked for a slot that nobody has says so, or knows better.
        owners = [asked] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, *nodes in slots:
            # The replicas too: they are asked for the map when the primaries are gone.
            pools = [self._announced(asked, host, port) for host, port, *_ in nodes]
            owners[first : last + 1] = pools[:1] * (last - first + 1)
        return owners
