"""Schedulers on several machines: one of them runs the job."""

from pathlib import Path

import pytest

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
        # Whoever wrote last is killed; the other goes on.
        last = lines_of(report)[-1]
        dead, alive = (one, two) if int(last) == one.popen.pid else (two, one)
        dead.close()
        before = len(lines_of(report))
        wait_for_line(report, before + 2)
        assert set(lines_of(report)[before + 1 :]) == {str(alive.popen.pid)}
