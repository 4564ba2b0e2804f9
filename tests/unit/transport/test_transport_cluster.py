"""A cluster: routes, moved slots, failovers."""

import contextlib
import threading
from collections.abc import Iterator

import pytest
import redis

from phonon.errors import ConfigurationError, ConnectionLostError, ServerUnreachableError
from support.transport import Cluster, Lab, Node, slot_of
from support.world import wait_until


@pytest.fixture(params=["threads", "asyncio", "uvloop"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(request.param)
    yield lab
    lab.close()


KEYS = [f"{{lab/{i}}}:".encode() for i in range(16)]


def test_requests_go_to_their_nodes(lab: Lab, cluster: Cluster) -> None:
    to = lab.connect(cluster.url)
    assert not to.colocated
    assert len({to.node_of(key) for key in KEYS}) == 3
    assert lab.exchange(to, *(lab.count(key, key) for key in KEYS)) == KEYS
    assert to.troubles == 0
    assert lab.run(to.wait([KEYS[0] + b"list"], 0.01)) == []


def test_moved_slot(lab: Lab, cluster: Cluster) -> None:
    to = lab.connect(cluster.url)
    lab.exchange(to, *map(lab.count, KEYS))
    slot = slot_of(KEYS[0])
    source = cluster.owner(slot)
    target = next(node for node in cluster.nodes[:3] if node is not source and node.is_primary())
    cluster.move(slot, target)
    try:
        assert lab.exchange(to, *(lab.count(key, key) for key in KEYS)) == KEYS
        assert 0 < to.troubles < 4
        troubles = to.troubles
        assert lab.exchange(to, *(lab.count(key, key) for key in KEYS)) == KEYS
        assert to.troubles == troubles
    finally:
        cluster.move(slot, source)
        wait_until(cluster.is_well, 60)
    assert lab.exchange(to, *(lab.count(key, key) for key in KEYS)) == KEYS


def test_slot_under_way_is_waited_out(lab: Lab, cluster: Cluster) -> None:
    to = lab.connect(cluster.url)
    key = KEYS[1]
    lab.exchange(to, lab.count(key))
    slot = slot_of(key)
    source = cluster.owner(slot)
    target = next(node for node in cluster.nodes[:3] if node is not source and node.is_primary())
    before = int(source.ask("GET", (key + b"n").decode()))
    cluster.open_slot(slot, source, target)
    try:
        assert isinstance(lab.exchange(to, lab.count(key), patience=0.2)[0], ConnectionLostError)
        cluster.move_keys(slot, source, target)
        timer = threading.Timer(0.2, cluster.close_slot, (slot, target))
        timer.start()
        assert lab.exchange(to, lab.count(key, b"there")) == [b"there"]
        timer.join()
        assert int(target.ask("GET", (key + b"n").decode())) == before + 1
    finally:
        cluster.close_slot(slot, target)
        cluster.move(slot, source)
        wait_until(cluster.is_well, 60)


@pytest.mark.slow
def test_failover(lab: Lab, cluster: Cluster) -> None:
    to = lab.connect(cluster.url)
    lab.exchange(to, *map(lab.count, KEYS))
    primary, replica = cluster.pair()
    primary.kill()
    try:
        assert lab.exchange(to, *(lab.count(key, key) for key in KEYS), patience=60) == KEYS
        assert replica.is_primary()
    finally:
        primary.start()
        cluster.wait_until_well()


def test_client_of_the_callers(cluster: Cluster) -> None:
    lab = Lab("threads")
    with redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port) as client:
        to = lab.connect(client)
        assert "the client's cluster at" in to.address
        assert lab.exchange(to, *(lab.count(key, key) for key in KEYS)) == KEYS
        lab.close()
        assert client.ping(target_nodes="primaries")


def test_close_leaves_no_connections(lab: Lab, cluster: Cluster) -> None:
    wait_until(lambda: cluster.connections() == 0)
    to = lab.connect(cluster.url)
    lab.exchange(to, *map(lab.count, KEYS))
    assert cluster.connections() > 0
    for shared in lab.opened:
        lab.run(shared.close())
    wait_until(lambda: cluster.connections() == 0)


def test_what_is_no_cluster(lab: Lab) -> None:
    with (
        contextlib.closing(Node()) as node,
        pytest.raises(ConfigurationError, match="is no cluster: connect with redis://"),
    ):
        lab.connect(f"redis+cluster://{node.address}")
    with contextlib.closing(Node("cluster-enabled yes")) as lone:
        with pytest.raises(ConfigurationError, match=r"redis\+cluster://host:port"):
            lab.connect(f"redis://{lone.address}")
        with pytest.raises(ServerUnreachableError, match="slots"):
            lab.connect(f"redis+cluster://{lone.address}")
    for url in ("redis+cluster://127.0.0.1:1", "redis+cluster://127.0.0.1:1,127.0.0.1:1"):
        with pytest.raises(ServerUnreachableError, match="no Redis at"):
            lab.connect(url)
