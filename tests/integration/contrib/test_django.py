"""Django: a command in several processes, a page under gunicorn, the sink, the admin."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from support.programs import (
    EXAMPLES,
    ask_until_all_have_answered,
    free_port,
    is_up,
    program,
)
from support.world import Redis, wait_until

pytestmark = pytest.mark.slow
SHOP = EXAMPLES / "django_shop"

#: In the project's own interpreter: what is parked is shown, and replayed by a superuser only.
ADMIN = """
import django
django.setup()
from django.contrib.auth.models import User
from django.test import Client
from phonon import RetryPolicy, ConflictFreeUpdate
from phonon.contrib.django import add, get_process, stop, worker
from phonon.contrib.django.apps import check_settings

class Failing(ConflictFreeUpdate):
    fails = True
    def execute(self):
        if self.fails:
            raise OSError("the shelf is full")

assert check_settings() == []
process = get_process()
try:
    Failing(process, "ada", doc={"n": 1}).end_session()
except OSError:
    pass
(batch,) = process.parked()
User.objects.create_superuser("root", password="x")
User.objects.create_user("clerk", password="x", is_staff=True)
client = Client()
client.force_login(User.objects.get(username="root"))
url = "/admin/phonon/parkedbatch/"
assert b"/admin/phonon/parkedbatch/" in client.get("/admin/").content
assert b"the shelf is full" in client.get(url).content
data = {"resource": batch.resource, "token": batch.token, "act": "replay"}
clerk = Client()
clerk.force_login(User.objects.get(username="clerk"))
clerk.post(url, data)
assert process.parked() == [batch]
client.post(url, data)
assert b"shelf" in client.get(url).content
Failing.fails = False
client.post(url, {**data, "token": process.parked()[0].token})
assert process.parked() == []
assert b"No batch is parked" in client.get(url).content
stop()
"""


@pytest.fixture
def database(tmp_path: Path, own_server: Redis) -> str:
    path = str(tmp_path / "shop.db")
    manage(path, own_server, "migrate", "--verbosity", "0")
    return path


def manage(database: str, server: Redis, *arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=SHOP,
        env=os.environ
        | {"DATABASE": database, "PHONON_URL": server.url, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def views(database: str) -> dict[str, int]:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return dict(connection.execute("SELECT page, views FROM shop_pageviews").fetchall())


def test_a_command_in_several_processes(database: str, own_server: Redis, tmp_path: Path) -> None:
    names = [f"page-{i % 400}" for i in range(2000)]
    files = []
    for number in range(2):
        files.append(tmp_path / f"views-{number}")
        files[-1].write_text("\n".join(names[number::2]) + "\n")
    running = [
        subprocess.Popen(
            [sys.executable, "manage.py", "import_views", str(file)],
            cwd=SHOP,
            env={"DATABASE": database, "PHONON_URL": own_server.url},
        )
        for file in files
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    assert views(database) == {f"page-{i}": 5 for i in range(400)}
    assert manage(database, own_server, "phonon_parked") == ""


def test_a_page_under_gunicorn(database: str, own_server: Redis, tmp_path: Path) -> None:
    port = free_port()
    with program(
        "gunicorn",
        *("wsgi", "--workers", "2", "--bind", f"127.0.0.1:{port}"),
        *("--config", "python:phonon.contrib.gunicorn"),
        server=own_server,
        tmp_path=tmp_path,
        folder=SHOP,
        DATABASE=database,
    ) as server:
        wait_until(is_up(port), 60)
        asked = ask_until_all_have_answered(port, "/pages/tea", 1)
        server.stop()
    assert views(database) == {"tea": asked}


def test_the_admin_shows_what_is_parked(database: str, own_server: Redis, tmp_path: Path) -> None:
    script = tmp_path / "admin.py"
    script.write_text(ADMIN)
    (tmp_path / "admin_settings.py").write_text(
        "from settings import *\nfrom phonon import RetryPolicy\n"
        "PHONON = {**PHONON, 'retry': RetryPolicy(attempts=1)}\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ
        | {
            "DATABASE": database,
            "PHONON_URL": own_server.url,
            "PYTHONPATH": f"{SHOP}:{tmp_path}",
            "DJANGO_SETTINGS_MODULE": "admin_settings",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
