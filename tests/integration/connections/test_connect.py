"""From a URL or a client to a server, and what is said when there is none."""

import contextlib
import logging
import re
import socket
import ssl
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.sentinel import Sentinel

from phonon import ConflictFreeUpdate, Process
from phonon._transport import connect
from phonon.errors import (
    AuthenticationError,
    ConfigurationError,
    ServerError,
    ServerTooOldError,
    ServerUnreachableError,
)
from phonon.settings import Durability
from support.nodes import Node
from support.world import NEVER, Make, Redis, wait_until

SECRET = "sEcReT"  # noqa: S105 - of servers that live as long as the test
USER = "worker"
#: Nobody listens there: the port is reserved, and not for us.
NOBODY = "127.0.0.1:1"


class Sum(ConflictFreeUpdate):
    done: list[dict[str, Any]]

    def execute(self) -> None:
        executed.append(self.doc)


executed: list[dict[str, Any]] = []


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A server with a password, and a user who may do everything but load functions."""
    node = Node(
        f"user {USER} on >{SECRET} ~* &* +@all",
        f"user narrow on >{SECRET} ~* &* +@all -function",
        password=SECRET,
    )
    yield node
    node.close()


@pytest.fixture
def admin(node: Node) -> Iterator["redis.Redis"]:
    with node.client() as client:
        yield client


@pytest.fixture
def nothing_left(admin: "redis.Redis") -> Iterator[None]:
    """Checks that the test leaves no connections behind."""
    yield
    wait_until(lambda: len(clients(admin)) == 1)
    assert connect._shared == {}


def clients(admin: "redis.Redis") -> set[int]:
    return {int(client["id"]) for client in admin.client_list()}


def allow(admin: "redis.Redis", user: str) -> None:
    admin.execute_command("ACL SETUSER", user, "on", f">{SECRET}", "~*", "&*", "+@all")  # type: ignore[no-untyped-call]


def use(process: Process) -> None:
    """Make calls of each kind, in most shapes of answers."""
    reference = process.create_reference("thing")
    assert reference.count() == 1
    assert [holder.id for holder in reference.holders()] == [process.id]
    reference.increment_times_modified()
    assert reference.modified_by() == {process.id: 1}
    assert process.get_registry() == ["thing"]
    with process.lock("locked") as lock:
        assert lock.token
        assert not process.lock("locked").acquire(block=False)
    assert reference.dereference()
    executed.clear()
    with process.batch():
        for i in range(10):
            Sum(process, f"sum{i}", doc={"n": 1})
            Sum(process, f"sum{i}", doc={"n": i}).end_session()
    assert sorted(doc["n"] for doc in executed) == list(range(1, 11))
    assert process.get_registry() == []


MALFORMED = [
    "",
    "localhost:6379",
    f"u:{SECRET}@localhost:6379",
    SECRET,
    "http://localhost",
    f"http://u:{SECRET}@localhost",
    "redis:/localhost",
    "REDIS://localhost",
    f"redis://u:x@{SECRET}@h",
    f"redis://u:{SECRET}/x@h",
    f"redis://u:1/{SECRET}@h",
    f"redis://u:{SECRET}#x@h",
    f"redis://u:{SECRET}?x@h",
    f"redis://u:6379?{SECRET}@h",
    f"redis://{SECRET}@h",
    f"redis://u:{SECRET}",
    f"redis://u:{SECRET}@:6379",
    f"redis://u:{SECRET}@h:99999",
    f"redis://u:{SECRET}@h:0",
    f"redis://u:{SECRET}@h:http",
    f"redis://u:{SECRET}@h/1/2",
    f"redis://u:{SECRET}@h/first",
    f"redis://u:{SECRET}@h/-1",
    f"redis://u:{SECRET}@h:1,i:2",
    f"redis://u:{SECRET}@h h",
    f"redis://u:{SECRET}@h\n",
    f"redis://u:{SECRET}@a..b",
    f"redis://u:{SECRET}@{'a' * 64}",
    f"redis://u:{SECRET}@::1",
    f"redis://u:{SECRET}@[::1",
    f"redis://h?password={SECRET}&socket_timeout=soon",
    f"redis://h?password={SECRET}&socket_timeout=-1",
    f"redis://h?password={SECRET}&socket_connect_timeout=inf",
    f"redis://h?password={SECRET}&socket_connect_timeout=nan",
    f"redis://h?password={SECRET}&protocol=9",
    f"redis://h?password={SECRET}&colour=blue",
    f"redis://h?password={SECRET}&ssl_cert_reqs=none",
    f"rediss://h?password={SECRET}&ssl_cert_reqs=maybe",
    f"unix://u:{SECRET}@tmp/s",
    f"unix://u:{SECRET}@",
    "unix://",
    "redis+cluster://",
    f"redis+cluster://u:{SECRET}@h/1",
    f"redis+cluster://u:{SECRET}@a,,b",
    f"redis+cluster://u:{SECRET}@a?db=2",
    f"redis+cluster://u:{SECRET}@a?health_check_interval=3",
    f"redis+sentinel://u:{SECRET}@h",
    f"redis+sentinel://u:{SECRET}@h/",
    f"redis+sentinel://u:{SECRET}@h/service/first",
    f"redis+sentinel://u:{SECRET}@h/service/1/2",
    f"redis+sentinel://h/s?sentinel_password={SECRET}&sentinel_colour=blue",
    f"embedded:///x?password={SECRET}",
]


@pytest.mark.parametrize("url", MALFORMED)
def test_malformed_url_is_refused_with_its_remedy_and_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Process(url=url)
    assert re.search("://|a port is|no name of a host|its option|this option", str(refusal.value))
    assert SECRET not in everything(refusal.value)


def everything(error: BaseException) -> str:
    """Return the text of an error with all its causes, as a log may have it."""
    lines = traceback.format_exception(error)
    return "".join(line for line in lines if not line.startswith("  File"))


def test_password_is_in_no_message(
    node: Node, server: Redis, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    at = f"{USER}:{SECRET}@"
    for url in (
        f"redis://{at}{NOBODY}/1",
        f"rediss://{at}{NOBODY}/1",
        f"rediss://{at}{node.address}?socket_timeout=0.1",
        f"redis://{node.address}/99?password={SECRET}",
        f"redis://x{at}{node.address}",
        f"redis://narrow:{SECRET}@{node.address}",
        f"redis+cluster://{at}{NOBODY},{NOBODY}",
        f"redis+cluster://{at}{node.address}",
        f"redis+sentinel://{at}{NOBODY}/s?sentinel_password={SECRET}",
        f"redis+sentinel://{at}{node.address}/s?sentinel_password=x{SECRET}",
        f"unix://{at}{tmp_path}/nothing",
    ):
        with pytest.raises((ServerError, ServerUnreachableError, ConfigurationError)) as failure:
            Process(url=url, retry_timeout=0.1)
        assert "***@" in str(failure.value) or "?password" in url
        assert SECRET not in everything(failure.value)
    client = redis.Redis(port=1, username=USER, password=SECRET, retry=NEVER)
    with pytest.raises(ServerUnreachableError) as failure:
        Process(client=client)
    assert SECRET not in everything(failure.value)
    with Process(url=f"redis://{at}{node.address}") as process:
        assert SECRET not in repr(process)
        assert SECRET not in repr(process.create_reference("x"))
    assert SECRET not in caplog.text


def test_password_that_is_missing_or_wrong(node: Node, nothing_left: None) -> None:
    for url in (
        f"redis://{node.address}",
        f"redis://:wrong@{node.address}",
        f"redis://nobody:{SECRET}@{node.address}",
        f"redis://:wrong@{node.address}?protocol=2",
    ):
        with pytest.raises(AuthenticationError, match="put user and password into the URL"):
            Process(url=url)
    for url in (f"redis://:{SECRET}@{node.address}", f"redis://{USER}:{SECRET}@{node.address}"):
        Process(url=url).stop()


def test_user_who_may_not_load_functions(node: Node, nothing_left: None) -> None:
    with pytest.raises(ServerError, match=r"narrow.*function") as failure:
        Process(url=f"redis://narrow:{SECRET}@{node.address}")
    assert not isinstance(failure.value, AuthenticationError)


@pytest.mark.parametrize(
    "place",
    [f"redis://{NOBODY}", f"redis+cluster://{NOBODY}", f"redis+sentinel://{NOBODY}/s", "unix:///x"],
)
def test_nobody_there_is_one_line_with_three_ways_out(place: str) -> None:
    with pytest.raises(ServerUnreachableError) as failure:
        Process(url=place)
    text = str(failure.value)
    assert text.startswith(f"no Redis at {place} (")
    assert "\n" not in text
    for way in ("start one", "PHONON_URL", "embedded://"):
        assert way in text
    assert connect._shared == {}


def test_host_that_does_not_exist() -> None:
    with pytest.raises(ServerUnreachableError, match=r"no Redis at redis://nowhere\.invalid"):
        Process(url="redis://nowhere.invalid")


OLD_INFO = b"# Server\r\nredis_version:6.2.5\r\nredis_mode:standalone\r\n"
OLD_ANSWERS = {
    b"INFO": b"$%d\r\n%s\r\n" % (len(OLD_INFO), OLD_INFO),
    b"FUNCTION": b"-ERR unknown command `FUNCTION`, with args beginning with: `LOAD`, \r\n",
}


class OldServer:
    """Answers what Redis 6.2.5 did when it was asked the same; Debian has none so old."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self.listener.accept()[0] as connection, connection.makefile("rb") as lines:
                    for line in lines:
                        words = []
                        for _ in range(int(line[1:])):
                            words.append(lines.read(int(lines.readline()[1:])))
                            lines.readline()
                        connection.sendall(OLD_ANSWERS.get(words[0], b"+OK\r\n"))

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


def test_server_without_functions_is_too_old() -> None:
    with contextlib.closing(OldServer()) as old, pytest.raises(ServerTooOldError) as failure:
        Process(url=f"redis://127.0.0.1:{old.port}?protocol=2")
    assert "runs Redis 6.2.5" in str(failure.value)
    assert "Redis 7.0 or Valkey 7.2" in str(failure.value)


def test_node_of_a_cluster_and_server_without_one() -> None:
    with contextlib.closing(Node("cluster-enabled yes")) as lone:
        for options in (
            {"url": f"redis://{lone.address}"},
            {"host": "127.0.0.1", "port": lone.port},  # the database is 1 then
            {"client": redis.Redis(port=lone.port)},
        ):
            with pytest.raises(ConfigurationError, match=r"redis\+cluster://host:port"):
                Process(**options)
        # It is a cluster, but has nothing yet.
        with pytest.raises(ServerUnreachableError, match="slots"):
            Process(url=f"redis+cluster://{lone.address}")


def test_cluster_url_of_a_plain_server(node: Node, nothing_left: None) -> None:
    with pytest.raises(ConfigurationError, match="is no cluster: connect with redis://"):
        Process(url=f"redis+cluster://:{SECRET}@{node.address}")


def test_database_that_does_not_exist(node: Node, nothing_left: None) -> None:
    with pytest.raises(ConfigurationError, match="has no such database"):
        Process(url=f"redis://:{SECRET}@{node.address}/99")


def test_database_is_1_only_where_no_url_says_otherwise(
    make: Make, server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Node()) as open_node:
        for options, db in (
            ({"host": "127.0.0.1", "port": open_node.port}, 1),
            ({"host": "127.0.0.1", "port": open_node.port, "db": 3}, 3),
            ({"url": f"redis://{open_node.address}"}, 0),
            ({"url": f"redis://{open_node.address}/2"}, 2),
        ):
            with Process(**options) as process:
                process.create_reference("x")
                keyspace = open_node.ask("INFO", "keyspace")
                assert list(keyspace) == [f"db{db}"]
            open_node.ask("FLUSHALL")
        monkeypatch.setenv("PHONON_URL", f"redis://{open_node.address}/5")
        with Process() as process:
            assert process.client.connection_pool.connection_kwargs["db"] == 5


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [False, True])
def test_client_of_the_callers(
    node: Node, namespace: str, nothing_left: None, protocol: int, decode: bool
) -> None:
    with redis.Redis(
        port=node.port, password=SECRET, protocol=protocol, decode_responses=decode
    ) as client:
        with Process(client=client, namespace=namespace) as process:
            assert process.client is client
            assert repr(process).endswith(f"at the client's server localhost:{node.port}>")
            use(process)
        assert client.ping()
        assert client.connection_pool.connection_kwargs["decode_responses"] is decode


def test_client_with_few_connections(make: Make, server: Redis) -> None:
    # One for what is under way, one for the user's own calls.
    pool = redis.BlockingConnectionPool(  # type: ignore[no-untyped-call]  # redis-py lacks types
        max_connections=2,
        timeout=2,
        connection_class=redis.UnixDomainSocketConnection,
        path=server.socket,
        db=1,
    )
    with redis.Redis(connection_pool=pool) as client:
        process, other = make(client=client), make()
        use(process)
        with other.lock("locked"):
            assert not process.lock("locked").acquire(timeout=0.01)
        assert client.ping()
        process.stop()
    pool.disconnect()


@pytest.mark.parametrize(
    ("client", "hint"),
    [
        (redis.asyncio.Redis(), "redis.asyncio"),
        (redis.Redis, "class Redis"),
        (Sentinel([]), "master_for"),  # type: ignore[no-untyped-call]  # redis-py lacks types
        ("redis://localhost", "url="),
        (redis.ConnectionPool(), "ConnectionPool"),
        (object(), "not a builtins.object"),
    ],
)
def test_client_of_a_wrong_kind(client: Any, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^client= takes a redis\.Redis") as refusal:
        Process(client=client)
    assert hint in str(refusal.value)


def test_client_that_cannot_connect_stays_open_and_is_named() -> None:
    with (
        redis.Redis(port=1, retry=NEVER) as client,
        pytest.raises(ServerUnreachableError) as failure,
    ):
        Process(client=client)
    assert "the client's server localhost:1" in str(failure.value)


def test_processes_share_connections_and_the_last_one_closes_them(
    node: Node, admin: "redis.Redis", nothing_left: None
) -> None:
    url = f"redis://:{SECRET}@{node.address}/1"
    before = clients(admin)
    first, second = Process(url=url), Process(url=url)
    assert first.client is second.client
    patient = Process(url=url, retry_timeout=3)  # a setting of the process's
    assert patient.client is first.client
    patient.stop()
    # And one of the server's.
    other = Process(url=url, durability=Durability(fsync=False))
    assert other.client is not first.client
    other.stop()
    first.stop()
    first.stop()
    assert second.create_reference("x").count() == 1
    assert clients(admin) > before
    second.stop()
    wait_until(lambda: clients(admin) == before)


def test_processes_that_start_at_once_share_connections(
    node: Node, admin: "redis.Redis", nothing_left: None
) -> None:
    url = f"redis://:{SECRET}@{node.address}"
    for _ in range(10):
        barrier = threading.Barrier(8)

        def start(_: int, barrier: threading.Barrier = barrier) -> Process:
            barrier.wait()
            return Process(url=url)

        with ThreadPoolExecutor(8) as threads:
            processes = list(threads.map(start, range(8)))
        assert len({id(process.client) for process in processes}) == 1
        for process in processes:
            process.stop()


def test_failed_start_leaves_nothing_to_those_who_start_after(
    node: Node, admin: "redis.Redis", nothing_left: None
) -> None:
    url = f"redis://later:{SECRET}@{node.address}"
    with pytest.raises(AuthenticationError):
        Process(url=url)
    assert connect._shared == {}
    allow(admin, "later")
    Process(url=url).stop()
    admin.acl_deluser("later")


def test_server_that_hangs_keeps_nobody_from_another(server: Redis, namespace: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging, ThreadPoolExecutor(1) as threads:
        url = f"redis://127.0.0.1:{hanging.getsockname()[1]}?socket_timeout=600"
        waiting = threads.submit(Process, url=url)
        with hanging.accept()[0]:
            with Process(url=server.url, namespace=namespace) as process:
                assert process.create_reference("x").dereference()
            assert not waiting.done()
        with pytest.raises(ServerUnreachableError):
            waiting.result()


def test_password_that_changes_while_we_work(node: Node, admin: "redis.Redis") -> None:
    allow(admin, "leaver")
    process = Process(url=f"redis://leaver:{SECRET}@{node.address}")
    reference = process.create_reference("x")
    admin.acl_deluser("leaver")  # which closes the user's connections
    with pytest.raises(ServerUnreachableError, match=r"refuses these credentials .* put user and"):
        reference.count()
    allow(admin, "leaver")
    assert reference.count() == 1
    process.stop()
    admin.acl_deluser("leaver")


@pytest.mark.parametrize(
    ("out", "back", "error"),
    [
        (
            ("CONFIG SET", "min-replicas-to-write", 1),
            ("CONFIG SET", "min-replicas-to-write", 0),
            "NOREPLICAS",
        ),
        (("REPLICAOF", "127.0.0.1", 1), ("REPLICAOF", "NO", "ONE"), "READONLY"),
    ],
)
def test_server_that_cannot_serve_for_a_while(
    out: tuple[str | int, ...], back: tuple[str | int, ...], error: str
) -> None:
    with contextlib.closing(Node()) as node, ThreadPoolExecutor() as threads:
        url = f"redis://{node.address}"
        with Process(url=url) as holder, Process(url=url) as waiter:
            held, lock = holder.lock("locked"), waiter.lock("locked")
            assert held.acquire()
            waiting = threads.submit(lock.acquire, timeout=60)
            wait_until(node.waiters)
            node.ask(*out)
            creating = threads.submit(holder.create_reference, "x")
            wait_until(lambda: node.errors(error) > 3)
            assert not creating.done()
            assert not waiting.done()
            node.ask(*back)
            assert creating.result(20).count() == 1
            held.release()
            assert waiting.result(20)
            lock.release()


def test_server_without_memory(make: Make) -> None:
    with contextlib.closing(Node()) as node, Process(url=f"redis://{node.address}") as process:
        reference = process.create_reference("x")
        node.ask("CONFIG SET", "maxmemory", 1)
        with pytest.raises(ServerError, match="raise its maxmemory"):
            process.create_reference("y")
        assert reference.dereference()


# Of a key that is only here, for 127.0.0.1 and localhost, until 2126.
CERTIFICATE = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgvcOevZEVZnvJJ9dc
myi7WoI+6bIRL7docG6hcBlaALWhRANCAARkq4hglBJAXVij/FKv/0yllQ83MTW1
MDzpdrQO94zf6ppwzUqSlvd09ZHHAOXTI3UAHWCPAgrvjrSoRsxcfKL5
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUO8Ifg9J5ZrybejzMSeNIP+byyBMwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzA3NTI1MloYDzIxMjYxMDMw
MDc1MjUyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARkq4hglBJAXVij/FKv/0yllQ83MTW1MDzpdrQO94zf6ppwzUqSlvd0
9ZHHAOXTI3UAHWCPAgrvjrSoRsxcfKL5o28wbTAdBgNVHQ4EFgQUyClB+LsMoijG
/qAcJFaIjo2Eb3cwHwYDVR0jBBgwFoAUyClB+LsMoijG/qAcJFaIjo2Eb3cwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgNpVTa2dmL6MkF1CVAM1gsWAt0JC3r8IyZmlDHodS0QQCIHeQ
JuCEIJhZljd0P5h2eQJv/T+AmQSRRgLk2eWPSqwr
-----END CERTIFICATE-----
"""


class Proxy:
    """An address that leads to a server, with TLS if it is given a certificate."""

    def __init__(self, target: Node, certificate: Path | None = None) -> None:
        self.target = target
        self.context: ssl.SSLContext | None = None
        if certificate is not None:
            certificate.write_text(CERTIFICATE)
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.serve)]
        self.threads[0].start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                self.threads.append(threading.Thread(target=self.talk, args=(client,)))
                self.threads[-1].start()

    def talk(self, client: socket.socket) -> None:
        address = ("127.0.0.1", self.target.port)
        with contextlib.suppress(OSError), client, socket.create_connection(address) as server:
            if self.context is not None:
                client.settimeout(5)  # redis-py 6 forgets to close what it does not trust
                client = self.context.wrap_socket(client, server_side=True)
                client.settimeout(None)
            with client:
                back = threading.Thread(target=self.copy, args=(server, client))
                back.start()
                self.copy(client, server)
                server.shutdown(socket.SHUT_RDWR)
                back.join()

    @staticmethod
    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


def test_tls(tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(contextlib.closing(Node()))
        proxy = stack.enter_context(contextlib.closing(Proxy(node, certificate)))
        place = f"rediss://localhost:{proxy.port}/1"
        trusting = "ssl_cert_reqs=none&ssl_check_hostname=false"
        for url in (f"{place}?ssl_ca_certs={certificate}", f"{place}?{trusting}"):
            with Process(url=url) as process:
                use(process)
        with pytest.raises(ServerUnreachableError, match=r"(?i)certificate.verify.failed"):
            Process(url=place)
        with pytest.raises(ServerUnreachableError, match="No such file"):
            Process(url=f"{place}?ssl_ca_certs=/nowhere")


def test_address_that_leads_to_another_server_after_a_failover() -> None:
    """Our connections still lead to the old one, which lives on as a replica."""
    with contextlib.ExitStack() as stack:
        old, new = (stack.enter_context(contextlib.closing(Node())) for _ in range(2))
        new.ask("REPLICAOF", "127.0.0.1", old.port)
        wait_until(lambda: new.ask("INFO", "replication")["master_link_status"] == "up")
        proxy = stack.enter_context(contextlib.closing(Proxy(old)))
        with Process(url=f"redis://127.0.0.1:{proxy.port}") as process:
            reference = process.create_reference("x")
            assert old.replicates()
            proxy.target = new
            new.ask("REPLICAOF", "NO", "ONE")
            old.ask("REPLICAOF", "127.0.0.1", new.port)
            reference.increment_times_modified()
            assert reference.get_times_modified() == 1
            assert old.errors("READONLY") > 0


def test_many_waiting_threads_share_a_connection(make: Make) -> None:
    process, other = make(), make()
    waiters = 120

    def enter(_: int) -> None:
        with process.lock("locked"):
            pass

    with ThreadPoolExecutor(waiters) as threads:
        with other.lock("locked") as lock:
            waiting = [threads.submit(enter, i) for i in range(waiters)]
            wait_until(lambda: len(lock.waiters()) == waiters)
            assert int(other.client.info("clients")["blocked_clients"]) <= 1
            assert process.create_reference("x").count() == 1
        for future in waiting:
            future.result(30)
