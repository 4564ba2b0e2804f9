"""Requests to servers with several workers are counted, none lost and none twice."""

import importlib.util
import signal
import urllib.error
from pathlib import Path

import pytest

from support.programs import (
    Program,
    ask_until_all_have_answered,
    free_port,
    get,
    is_up,
    new_table,
    program,
    rows,
)
from support.world import Redis, wait_until

pytestmark = pytest.mark.slow


def test_fastapi_under_uvicorn(own_server: Redis, tmp_path: Path) -> None:
    database = new_table(tmp_path / "requests.db", "requests", "route")
    port = free_port()
    with program(
        "uvicorn",
        *("fastapi_requests:app", "--workers", "2", "--port", str(port)),
        server=own_server,
        tmp_path=tmp_path,
        DATABASE=database,
    ) as server:
        wait_until(is_up(port), 60)
        asked = ask_until_all_have_answered(port, "/users/ada", 2)
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError):
                get(port, "/nothing/here")
        server.stop()
    assert rows(database, "requests") == {"GET /users/{user} 200": asked, "GET - 404": 3}


def count(server: Program, port: int, database: str) -> None:
    wait_until(is_up(port), 60)
    asked = ask_until_all_have_answered(port, "/home", 2)
    server.stop(signal.SIGTERM)
    wait_until(lambda: rows(database, "views") == {"/home": asked}, 5)


def test_gunicorn_prefork(own_server: Redis, tmp_path: Path) -> None:
    database = new_table(tmp_path / "views.db", "views", "page")
    port = free_port()
    with program(
        "gunicorn",
        *("wsgi_counter:application", "--workers", "2", "--bind", f"127.0.0.1:{port}"),
        *("--config", "python:gunicorn_conf"),
        server=own_server,
        tmp_path=tmp_path,
        DATABASE=database,
    ) as server:
        count(server, port, database)


@pytest.mark.skipif(importlib.util.find_spec("uwsgidecorators") is None, reason="needs uWSGI")
def test_uwsgi_prefork(own_server: Redis, tmp_path: Path) -> None:
    database = new_table(tmp_path / "views.db", "views", "page")
    port = free_port()
    arguments = ("--http", f"127.0.0.1:{port}", "--module", "wsgi_counter", "--master")
    with program(
        "uwsgi",
        *(*arguments, "--processes", "2", "--die-on-term", "--enable-threads"),
        server=own_server,
        tmp_path=tmp_path,
        DATABASE=database,
    ) as server:
        count(server, port, database)
    with program(
        "uwsgi",
        *(*arguments, "--need-app", "--die-on-term"),
        server=own_server,
        tmp_path=tmp_path,
        DATABASE=database,
    ) as server:
        wait_until(lambda: "set enable-threads = true" in server.said(), 30)
