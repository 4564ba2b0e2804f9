"""The chaos run finds nothing wrong, and would find it."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chaos import run as chaos
from chaos.__main__ import main
from chaos.jobs import NumberedUpdate
from chaos.ledger import Verdict, audit
from phonon_demo.models import Message
from support import saboteurs

MINUTE = 60


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the program puts its files, and leaves none. Sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="ph-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", None)


def chaos_program(*arguments: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "chaos", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"COLUMNS": "100"},
    )


def value(out: str, name: str) -> int:
    """A figure of the summary."""
    (found,) = re.findall(rf"^ +{re.escape(name)} +(\S+)$", out, re.MULTILINE)
    return int(found.replace(",", ""))


def check_exact(done: "subprocess.CompletedProcess[str]") -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "lost",
        "deliveries doubled",
        "deliveries in the wrong row",
        "batches parked",
        "leftovers on the server",
        "workers that died by themselves",
    ):
        assert value(done.stdout, name) == 0
    assert value(done.stdout, "deliveries acknowledged") > 1_000
    assert value(done.stdout, "sessions taken over") > 0
    assert "EXACT: nothing acknowledged was lost, nothing doubled" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("api", [(), ("--asyncio",)], ids=["threads", "asyncio"])
def test_twenty_kills_and_everything_else(temporary: Path, api: tuple[str, ...]) -> None:
    arguments = ("--kills", "20", "--seed", "3", "--cut", "--restart-server")
    done = chaos_program(*arguments, *api, timeout=2 * MINUTE)
    check_exact(done)
    assert value(done.stdout, "workers killed with SIGKILL") == 20
    assert value(done.stdout, "workers paused until believed dead") >= 1
    assert value(done.stdout, "connections cut") >= 1
    assert value(done.stdout, "server killed and started again") >= 1


@pytest.mark.chaos
@pytest.mark.timeout(10 * MINUTE)
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--cut",),
        ("--cut", "--restart-server"),
        ("--asyncio", "--cut", "--restart-server"),
    ],
)
def test_two_hundred_kills(temporary: Path, options: tuple[str, ...]) -> None:
    done = chaos_program("--kills", "200", *options, timeout=9 * MINUTE)
    sys.stdout.write(done.stdout + done.stderr)
    check_exact(done)
    assert value(done.stdout, "workers killed with SIGKILL") == 200


def run_with(
    update: type[NumberedUpdate], capsys: pytest.CaptureFixture[str], *, checks: bool = True
) -> tuple[int, str]:
    options = chaos.Options(3, None, 8, 1, cut=False, restart_server=False)
    status = chaos.run(options, update, checks=checks)
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_a_sink_that_checks_the_token_skips_what_was_written_before_a_death(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run_with(saboteurs.Dying, capsys)
    assert status == 0, out
    assert value(out, "workers that died by themselves") > 0
    assert value(out, "repeats skipped by token") > 0


@pytest.mark.slow
def test_a_sink_that_does_not_check_the_token_doubles_and_that_is_found(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run_with(saboteurs.Dying, capsys, checks=False)
    assert status == 1, out
    assert value(out, "deliveries doubled") > 0
    assert "NOT EXACT" in out


@pytest.mark.slow
def test_an_update_that_loses_is_found(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run_with(saboteurs.Forgetful, capsys)
    assert status == 1, out
    assert value(out, "lost") > 0
    assert value(out, "deliveries doubled") == 0


@pytest.mark.slow
def test_figures_that_do_not_belong_to_the_messages_are_found(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run_with(saboteurs.Torn, capsys)
    assert status == 1, out
    assert value(out, "lost") == 0
    assert not re.search(r"([\d,]+) of \1 keys equal", out)


# The books


def message(number: int, key: str, *content: Any) -> Message:
    return Message(key, [*content, number])


SENT = [
    message(0, "N1", ["EWR", "IAH"], 100, -3, 60),
    message(1, "N1", ["IAH", "BQN"], 50, None, None),
    message(2, "N2", ["EWR", "IAH"], 100, 7, 61),
]
#: All of them are stored; another delivery of the last one has died on the way.
ACKNOWLEDGED = ["0/a/0", "1/b/0", "2/a/1"]


def row(airports: str, miles: int, delay: int, minutes: int, numbers: str) -> dict[str, Any]:
    deliveries = numbers.split()
    return {
        "airports": airports.split(), "miles": miles, "worst_delay": delay,
        "air_minutes": minutes, "flights": len(deliveries), "numbers": deliveries,
    }  # fmt: skip


N1 = row("BQN EWR IAH", 150, -3, 60, "0/a/0 1/b/0")
N2 = row("EWR IAH", 100, 7, 61, "2/a/1")
GOOD = Verdict(3, 0, 0, 0, 0, 2, 0)


def verdict_on(found: dict[str, Any], acknowledged: list[str] = ACKNOWLEDGED) -> Verdict:
    return audit(SENT, acknowledged, found)


def test_books_that_balance() -> None:
    verdict = verdict_on({"N1": N1, "N2": N2})
    assert verdict == GOOD
    assert verdict.exact


def test_what_was_not_acknowledged_may_be_there() -> None:
    verdict = verdict_on({"N1": N1, "N2": row("EWR IAH", 200, 7, 122, "2/a/1 2/b/1")})
    assert verdict == GOOD._replace(unacknowledged=1)
    assert verdict.exact


def test_what_is_lost() -> None:
    verdict = verdict_on({"N1": N1})
    assert verdict == GOOD._replace(lost=1, keys=1)
    assert not verdict.exact


def test_what_was_never_acknowledged_is_lost() -> None:
    verdict = verdict_on({"N1": N1}, ACKNOWLEDGED[:2])
    assert verdict == GOOD._replace(acknowledged=2, lost=1, keys=1)
    assert not verdict.exact


def test_what_is_doubled() -> None:
    verdict = verdict_on({"N1": N1, "N2": row("EWR IAH", 200, 7, 122, "2/a/1 2/a/1")})
    assert verdict == GOOD._replace(doubled=1, differing=1)
    assert not verdict.exact


def test_what_is_in_the_wrong_row() -> None:
    verdict = verdict_on({"N1": row("BQN EWR IAH", 150, -3, 60, "0/a/0 1/b/0 2/a/1 77/a/5")})
    assert verdict.foreign == 2
    assert not verdict.exact


def test_what_is_there_in_part() -> None:
    verdict = verdict_on({"N1": N1, "N2": row("EWR IAH", 0, 7, 61, "2/a/1")})
    assert verdict == GOOD._replace(differing=1)
    assert not verdict.exact


@pytest.mark.parametrize("arguments", [("--workers", "1"), ("--kills", "0"), ("--seconds", "0")])
def test_what_cannot_be_meant(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert arguments[0] in done.output


def test_help() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    options = {"--workers", "--seconds", "--kills", "--seed", "--cut", "--restart-server"}
    assert options <= set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))
