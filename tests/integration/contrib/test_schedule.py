"""Schedulers on several machines: one of them runs the job."""

import subprocess
import sys
from pathlib import Path

import pytest
import redis

from phonon import Process
from phonon.contrib.schedule import only_one
from support.programs import lines_of, program, wait_for_line
from support.world import Make, Redis, wait_until


def test_one_of_two_runs_it(make: Make) -> None:
    one, two = make(), make()
    ran: list[str] = []

    @only_one(two, "report")
    def theirs() -> str:
        ran.append("theirs")
        return "done"

    @only_one(one, "report")
    def ours() -> str:
        ran.append("ours")
        assert theirs() is None
        return "done"

    assert ours() == "done"
    assert theirs() == "done"
    assert ran == ["ours", "theirs"]


def test_who_comes_late_finds_it_done(make: Make) -> None:
    one, two = make(), make()
    job = [only_one(process, "report", every=3600)(lambda: "done") for process in (one, two)]
    assert job[0]() == "done"
    assert job[1]() is None


def test_what_has_failed_was_not_done(make: Make) -> None:
    one, two = make(), make()

    @only_one(one, "report", every=3600)
    def fails() -> None:
        raise OSError("no paper")

    with pytest.raises(OSError, match="no paper"):
        fails()
    assert only_one(two, "report", every=3600)(lambda: "done")() == "done"


def test_the_next_time_it_runs_again(make: Make) -> None:
    process = make()
    job = only_one(process, "report", every=0.05)(lambda: "done")
    assert job() == "done"
    assert wait_until(job) == "done"


def test_a_server_that_is_full_keeps_no_job_locked(own_server: Redis) -> None:
    """The job was done, but that cannot be noted. Its lock would last as long as the process."""
    with (
        Process(own_server.url) as one,
        Process(own_server.url) as two,
        own_server.client() as client,
    ):

        @only_one(one, "report", every=3600)
        def fills() -> None:
            client.config_set("maxmemory", 1)

        with pytest.raises(redis.OutOfMemoryError):
            fills()
        client.config_set("maxmemory", 0)
        assert only_one(two, "report", every=3600)(lambda: "done")() == "done"


def test_an_error_before_the_job_keeps_no_lock(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make(), make()

    def cut(_: str) -> None:
        raise redis.ConnectionError("cut")

    with monkeypatch.context() as cutting:
        cutting.setattr(one.client, "exists", cut)
        with pytest.raises(redis.ConnectionError):
            only_one(one, "report", every=3600)(lambda: "done")()
    assert only_one(two, "report", every=3600)(lambda: "done")() == "done"


@pytest.mark.slow
def test_apscheduler_on_two_machines(own_server: Redis, tmp_path: Path) -> None:
    report = tmp_path / "report"
    with (
        program(
            "scheduled_report.py", server=own_server, tmp_path=tmp_path, REPORT=str(report)
        ) as one,
        program(
            "scheduled_report.py", server=own_server, tmp_path=tmp_path, REPORT=str(report)
        ) as two,
    ):
        wait_for_line(report, 3)
        # The process that wrote last is killed; the other one goes on.
        last = lines_of(report)[-1]
        dead, alive = (one, two) if int(last) == one.popen.pid else (two, one)
        dead.close()
        before = len(lines_of(report))
        wait_for_line(report, before + 2)
        assert set(lines_of(report)[before + 1 :]) == {str(alive.popen.pid)}


def test_cron_on_two_machines(own_server: Redis, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def once(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "phonon", "once", "job", "--url", own_server.url]
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=60, check=False
        )

    write = ("--every", "3600", "--", "sh", "-c", f"echo x >> {mark}; exit $0")
    assert once(*write, "3").returncode == 3  # it has failed, so it was not done
    assert once(*write, "0").returncode == 0
    assert once(*write, "0").returncode == 0
    assert lines_of(mark) == ["x", "x"]
    missing = once("--", "no-such-program")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)


def test_a_command_that_runs_is_not_started_again(own_server: Redis, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    arguments = ("once", "job", "--url", own_server.url, "--")
    script = f"echo $$ >> {mark}; exec sleep 60"
    with program(
        "phonon", *arguments, "sh", "-c", script, server=own_server, tmp_path=tmp_path
    ) as first:
        wait_for_line(mark)
        with program(
            "phonon", *arguments, "sh", "-c", script, server=own_server, tmp_path=tmp_path
        ) as second:
            assert second.popen.wait(30) == 0
        assert first.stop() == 128 + 15  # the command gets the signal, and its status is ours
    assert len(lines_of(mark)) == 1
