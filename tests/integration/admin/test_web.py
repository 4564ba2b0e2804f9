"""The operator's page as an HTTP client sees it: what it tells, and what it refuses."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from phonon import ConflictFreeUpdate, Process, RetryPolicy
from phonon.errors import ConfigurationError
from phonon.web import create_app
from support.page import TOKEN, Page
from support.world import Make, Redis, wait_until

BEARER = {"authorization": f"Bearer {TOKEN}"}


class Doomed(ConflictFreeUpdate):
    """Fails."""

    def execute(self) -> None:
        raise OSError("no database")


def park(process: Process, record: str) -> int:
    with pytest.raises(OSError, match="no database"):
        Doomed(process, record, doc={"<b>": 1}).end_session()
    return max(e.token for e in process.parked() if e.resource == f"test.test.{record}")


@pytest.fixture
def page(server: Redis, namespace: str) -> Iterator[Page]:
    with Page(server.url, namespace, "--token", TOKEN) as page:
        yield page


def test_what_it_tells(page: Page, make: Make, namespace: str) -> None:
    process = make(retry=RetryPolicy(attempts=1), heartbeat_interval=0.2)
    token = park(process, "a")
    process.create_reference("x")
    process.lock("l").acquire()
    found = page.ask("api/overview").json
    assert (found["namespace"], found["parked"], found["writable"]) == (namespace, 1, True)
    assert [p["id"] for p in found["processes"]] == [process.id]
    assert found["sample"]["sessions"] == 1
    assert found["oldest"]["resource"] == "x"
    source = process.source("clicks/0")
    source.report_end(3)
    wait_until(lambda: [s["lag"] for s in page.ask("api/overview").json["sources"]] == [3])
    (batch,) = page.ask("api/batches").json
    assert batch["token"] == str(token), "as text: a browser would lose digits"
    assert [lock["name"] for lock in page.ask("api/locks").json] == ["l"]
    assert [s["resource"] for s in page.ask("api/sessions?prefix=x").json] == ["x"]
    (partial,) = page.ask(f"api/resource?name=test.test.a&token={token}").json["content"]
    assert partial["doc"] == {"<b>": 1}
    assert any(f["subject"] == "dead letters" for f in page.ask("api/doctor").json)
    assert page.ask("api/acts").json == []
    assert page.ask("api/resource").status == 400
    assert page.ask("api/resource?name=x&token=wrong").status == 400


def test_a_browser_is_told_to_load_nothing_else(page: Page) -> None:
    for path in ("", "app.js", "style.css", "icon.svg", "view.js", "api/acts", "nothing"):
        answer = page.ask(path)
        assert answer.status == (404 if path == "nothing" else 200)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert b"http://" not in answer.body.replace(b"http://www.w3.org/", b"")
        assert b"https://" not in answer.body


def test_acts_need_the_token(page: Page, make: Make) -> None:
    token = park(make(retry=RetryPolicy(attempts=1)), "a")
    body = {"resource": "test.test.a", "token": str(token)}
    assert page.ask("api/act/discard", body).status == 401
    assert page.ask("api/act/discard", body, authorization=f"Bearer {TOKEN}x").status == 401
    assert page.ask("api/act/discard").status == 405
    assert page.ask("api/act/wipe", body, **BEARER).status == 404
    assert len(page.ask("api/batches").json) == 1
    assert page.ask("api/act/discard", body, **BEARER).status == 200
    assert page.ask("api/batches").json == []
    assert page.ask("api/act/discard", body, **BEARER).status == 409, "there is none any more"
    assert [act["act"] for act in page.ask("api/acts").json] == ["discard"]


def test_it_is_read_only_without_a_token(server: Redis, namespace: str, make: Make) -> None:
    token = park(make(retry=RetryPolicy(attempts=1)), "a")
    with Page(server.url, namespace) as page:
        assert page.ask("api/overview").json["writable"] is False
        body = {"resource": "test.test.a", "token": str(token)}
        assert page.ask("api/act/discard", body, **BEARER).status == 403
        assert len(page.ask("api/batches").json) == 1


def test_locks_are_broken_and_processes_expired(page: Page, make: Make) -> None:
    process = make(heartbeat_interval=0.2)
    make(heartbeat_interval=0.2)
    lock = process.lock("x")
    lock.acquire()
    body = {"resource": "x", "token": str(lock.token)}
    assert page.ask("api/act/unlock", body, **BEARER).status == 200
    assert page.ask("api/locks").json == []
    former = process.id
    assert page.ask("api/act/expire", {"resource": former}, **BEARER).status == 200
    wait_until(lambda: process.id != former)


def test_another_name_of_the_host_is_refused(page: Page) -> None:
    assert page.ask("api/overview", host="evil.example").status == 400


def test_a_server_that_has_gone_is_said(own_server: Redis) -> None:
    with Page(own_server.url, "phonon", "--timeout", "0.5") as page:
        assert page.ask("api/overview").status == 200
        own_server.kill()
        answer = page.ask("api/acts")
        assert answer.status == 503
        assert "does not answer" in answer.json["error"]


def test_it_mounts_into_another_application(server: Redis, namespace: str) -> None:
    page = create_app(server.url, namespace=namespace)
    app = Starlette(routes=[Mount("/phonon", page)])

    async def get(path: str) -> tuple[int, dict[bytes, bytes], bytes]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
        extra = {"query_string": b"", "scheme": "http", "server": ("localhost", 80)}
        await app({**scope, **extra, "app": app}, receive, send)
        body = b"".join(m.get("body", b"") for m in sent[1:])
        return sent[0]["status"], dict(sent[0]["headers"]), body

    async def look() -> None:
        status, _, body = await get("/phonon/")
        assert status == 200
        assert b'src="app.js"' in body
        status, headers, _ = await get("/phonon")
        assert status in (307, 308), headers
        status, _, body = await get("/phonon/api/acts")
        assert (status, body) == (200, b"[]")
        await page.state.close()

    asyncio.run(look())


def test_a_token_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 16"):
        create_app(token="short")  # noqa: S106 - a test's
