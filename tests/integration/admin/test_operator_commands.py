"""The operator's commands: tables for people, JSON for programs, exit statuses for scripts."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phonon import ConflictFreeUpdate, Process, RetryPolicy
from phonon._admin import doctor as examination
from phonon.cli.app import phonon
from support.world import Make, Redis, wait_until

ONCE = RetryPolicy(attempts=1)

Run = Callable[..., Result]


class Poison(ConflictFreeUpdate):
    """Raises until it is told not to."""

    cured = False

    def execute(self) -> None:
        if not Poison.cured:
            raise OSError("no database")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    Poison.cured = False
    yield
    Poison.cured = True


@pytest.fixture
def run(server: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def run_it(*words: Any, answer: str | None = None) -> Result:
        name, *others = map(str, words)
        where = ["--url", server.url, "--namespace", namespace]
        return CliRunner().invoke(phonon, [name, *where, *others], input=answer)

    return run_it


def rows(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def park(process: Process, record: str) -> int:
    with pytest.raises(OSError, match="no database"):
        Poison(process, record, doc={"n": 1}).end_session()
    return max(e.token for e in process.parked() if e.resource == f"test.test.{record}")


def test_ps(run: Run, make: Make) -> None:
    process = make()
    process.create_reference("x")
    result = run("ps")
    assert result.exit_code == 0
    assert process.id[:8] in result.stdout
    assert "alive" in result.stdout
    (row,) = rows(run("ps", "--json"))
    assert (row["id"], row["memberships"], row["state"]) == (process.id, 1, "alive")


def test_locks(run: Run, make: Make) -> None:
    process = make()
    lock = process.lock("x")
    lock.acquire()
    process.lock("y").acquire()
    (row,) = rows(run("locks", "--json", "--prefix", "x"))
    assert (row["name"], row["holders"][0]["token"]) == ("x", lock.token)
    result = run("locks", "x")
    assert str(lock.token) in result.stdout
    assert process.id in result.stdout
    assert "is not locked" in run("locks", "z").stdout


ODD = ["[/x]", "[bold]", ":smile:", "e\x1b[31mred\x9b0m", "\ud800", "{x}", "new\nline"]


@pytest.mark.parametrize("name", ODD)
def test_any_name_is_shown_as_it_is(run: Run, make: Make, name: str) -> None:
    process = make(retry=ONCE)
    took = threading.Thread(target=process.lock(name).acquire, name="[/worker]")
    took.start()
    took.join()
    process.create_reference(name)
    park(process, name)
    shown = re.sub("[\x1b\x9b]", "\ufffd", name).encode("utf-8", "backslashreplace").decode()
    for status, *words in (
        (0, "locks"),
        (0, "locks", name),
        (0, "locks", "no" + name),
        (0, "show", name),
        (0, "sessions"),
        (1, "batches"),
        (1, "show", f"test.test.{name}"),
    ):
        result = run(*words)
        assert result.exit_code == status
        assert isinstance(result.exception, SystemExit | None)
        assert all(line in result.stdout for line in shown.splitlines())
        assert "\x1b" not in result.stdout


def test_a_narrow_terminal_has_all_of_a_name(
    run: Run, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    park(make(retry=ONCE), "0123456789" * 6)
    first, *others = run("batches").stdout.splitlines()[2:]
    column = len(first.split()[0])
    cells = [row[:column].strip() for row in (first, *others)]
    assert "".join(cells) == f"test.test.{'0123456789' * 6}"


def test_a_terminal_that_has_not_all_characters(run: Run, own_server: Redis) -> None:
    program = [sys.executable, "-m", "phonon", "doctor", "--url", own_server.url]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "persistence" in done.stdout


def test_sessions(run: Run, make: Make) -> None:
    process = make()
    for i in range(60):
        process.create_reference(f"r{i}")
    result = run("sessions")
    assert "50 of about 60 open sessions" in result.stdout
    assert len(rows(run("sessions", "--json", "--all"))) == 60
    assert [r["resource"] for r in rows(run("sessions", "--json", "--prefix", "r59"))] == ["r59"]
    assert rows(run("sessions", "--json", "--older", "3600")) == []
    assert run("sessions", "--all").exit_code == 2


def test_batches_and_the_exit_status(run: Run, make: Make) -> None:
    process = make(retry=ONCE)
    assert run("batches").exit_code == 0
    token = park(process, "a")
    result = run("batches")
    assert result.exit_code == 1
    assert str(token) in result.stdout
    assert "no database" in result.stdout
    assert run("batches", "--state", "retrying").exit_code == 0
    assert [r["token"] for r in rows(run("batches", "--json", "--state", "parked"))] == [token]


def test_show(run: Run, make: Make) -> None:
    process = make(retry=ONCE)
    token = park(process, "a")
    result = run("show", "test.test.a")
    assert result.exit_code == 1
    assert "doc: {'n': 1}" in result.stdout, "the batch's data, as there is no session"
    assert "1 batch " in result.stdout
    assert "1 partial\n" in result.stdout
    assert result.stdout.count("no database") == 1, "the error is told once, in full"
    Poison(process, "a", doc={"n": 2})
    assert "doc: {'n': 2}" in run("show", "test.test.a").stdout
    (row,) = rows(run("show", "test.test.a", token, "--json"))
    assert row["content"][0]["doc"] == {"n": 1}
    assert run("show", "test.test.b").exit_code == 0
    assert run("show", "test.test.a", 1024).exit_code == 2
    Poison.cured = True


def test_replay_asks(run: Run, make: Make) -> None:
    process = make(retry=ONCE, heartbeat_interval=0.1)
    park(process, "a")
    wait_until(lambda: rows(run("ps", "--json"))[0]["executes"])
    assert run("replay", "test.test.a", answer="n\n").exit_code == 1
    assert run("batches").exit_code == 1, "it is still there"
    Poison.cured = True
    result = run("replay", "test.test.a", answer="y\n")
    assert result.exit_code == 0
    assert "goes on as" in result.stdout
    wait_until(lambda: run("batches").exit_code == 0)
    assert [row["act"] for row in rows(run("log", "--json"))] == ["replay"]
    assert "replay" in run("log").stdout


def test_discard(run: Run, make: Make) -> None:
    process = make(retry=ONCE)
    park(process, "a")
    park(process, "a")
    result = run("discard", "test.test.a", "--yes")
    assert result.exit_code == 2
    assert "give TOKEN, or --all" in result.stderr
    assert run("discard", "test.test.a", "--all", "--yes").exit_code == 0
    assert run("batches").exit_code == 0
    assert run("discard", "test.test.a", "--yes").exit_code == 2


def test_unlock(run: Run, make: Make) -> None:
    process = make()
    lock = process.lock("x")
    lock.acquire()
    assert run("unlock", "x", answer="n\n").exit_code == 1
    assert run("unlock", "x", 1024, "--yes").exit_code == 2
    assert lock.owned()
    result = run("unlock", "x", lock.token, "--yes")
    assert (result.exit_code, process.id in result.stdout) == (0, True)
    assert run("unlock", "x", "--yes").exit_code == 2
    make().lock("x", block=False).acquire()


def test_expire(run: Run, make: Make) -> None:
    process = make(heartbeat_interval=0.2)
    assert "PROCESS is empty" in run("expire", "", "--yes").stderr  # $UNSET
    make(heartbeat_interval=0.2)
    former = process.id
    result = run("expire", former[:10], "--yes")
    assert (result.exit_code, former in result.stdout) == (0, True)
    wait_until(lambda: process.id != former)
    assert run("expire", "nobody", "--yes").exit_code == 2


def test_top(run: Run, make: Make) -> None:
    process = make(retry=ONCE, heartbeat_interval=0.2)
    park(process, "a")
    process.create_reference("x")
    (row,) = rows(run("top", "--once", "--json", "--interval", "1"))
    assert (row["processes"], row["memberships"], row["parked"]) == (1, 1, 1)
    assert row["by_process"][0]["id"] == process.id
    assert "oldest session" in run("top", "--once", "--interval", "0.1").stdout


def test_doctor(own_server: Redis) -> None:
    def doctor(*words: str) -> tuple[int, dict[str, dict[str, str]]]:
        where = ["doctor", "--url", own_server.url, "--json", *words]
        result = CliRunner().invoke(phonon, where)
        return result.exit_code, {f["subject"]: f for f in rows(result)}

    with own_server.client() as client:
        status, found = doctor()
        assert status == 1
        assert found["persistence"]["level"] == "problem"
        assert "appendonly yes" in found["persistence"]["remedy"]
        assert found["processes"]["level"] == "note"
        client.config_set("appendonly", "yes")
        with Process(url=own_server.url) as process:
            wait_until(lambda: doctor("--quiet") == (0, {}))
            assert doctor()[1]["permissions"]["level"] == "ok"
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.config_set("maxmemory", 3_000_000)
            client.set("{phonon}:ancient", 1)
            client.set("{phonon/old}:x", 1)
            status, found = doctor("--quiet")
            assert status == 1
            assert "noeviction" in found["eviction"]["remedy"]
            assert "older protocol" in found["older keys"]["text"]
            assert process.id
    shown = CliRunner().invoke(phonon, ["doctor", "--url", own_server.url]).stdout
    assert "→ CONFIG SET maxmemory-policy noeviction" in shown


def test_watch_looks_again(server: Redis, namespace: str, make: Make) -> None:
    from phonon.cli import options  # noqa: PLC0415

    seen = []

    def look() -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [], "nothing"

    assert options.show(look, as_json=False, watch=0.01) == []
    assert len(seen) == 3


def test_a_server_that_is_not_there_is_one_line(namespace: str) -> None:
    url = "unix:///nowhere/at/all"
    result = CliRunner().invoke(phonon, ["ps", "--url", url])
    assert result.exit_code == 2
    assert result.stderr.startswith("phonon: no Redis at unix:///nowhere")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["--help"], ["ps"], ["ps", "--json"], ["doctor"]])
def test_an_output_that_cannot_be_written_is_one_line(server: Redis, words: list[str]) -> None:
    with Process(server.url), Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "phonon", *words]
        environment = {**os.environ, "PHONON_URL": server.url}
        ended = subprocess.run(
            command, check=False, env=environment, stdout=full, stderr=subprocess.PIPE
        )
    assert ended.returncode == 1
    assert ended.stderr == b"phonon: No space left on device\n"


def test_completion(run: Run, server: Redis, namespace: str, make: Make) -> None:
    park(make(retry=ONCE), "a")
    words = f"phonon replay --url {server.url} --namespace {namespace} test"
    environment = {
        "_PHONON_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = CliRunner().invoke(
        phonon, [], env=environment, prog_name="phonon", standalone_mode=True
    )
    assert "test.test.a" in result.stdout
    script = CliRunner().invoke(phonon, ["completion", "bash"])
    assert "_PHONON_COMPLETE=bash_complete" in script.stdout


def test_doctor_finds_dead_letters_behind_many_retries(
    run: Run, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "MOST", 1)
    retrying = make(retry=RetryPolicy(first_delay=300, longest_delay=300, jitter=0))
    with contextlib.suppress(OSError):
        Poison(retrying, "again").end_session()
    park(make(retry=ONCE), "given up")
    subjects = {finding["subject"]: finding["text"] for finding in rows(run("doctor", "--json"))}
    assert "test.test.given up" in subjects["dead letters"]
    assert "test.test.again" in subjects["retries"]
    Poison.cured = True  # the process stops without an error
