"""``phonon demo``, the real program in an OS process, with real workers and a real server."""

import contextlib
import fcntl
import gzip
import io
import json
import os
import pty
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phonon import embedded
from phonon_demo import report
from phonon_demo.check import Difference, compare
from phonon_demo.flights import Flights
from phonon_demo.rows import Rejections
from phonon_demo.server import private_server
from phonon_demo.sink import Sink, create, sessions
from phonon_demo.sums import Sums
from support.proxy import Proxy, nothing
from support.world import Redis, wait_until

PROGRAM = [sys.executable, "-m", "phonon"]
TIMEOUT = 100
# Less to start and to wait for than by default, where that is not what the test is about.
TWO = ("--workers", "2", "--no-kill")
#: Keys of a process that holds nothing.
OF_A_LANE = {"lane", "lanes", "token"}

# Counted by awk: flights, miles, airports, worst delay, minutes in the air.
N14228 = (
    15,
    16479,
    '["BOS","EWR","FLL","IAH","LAX","MIA","PBI","PDX","PHX","RSW","TPA"]',
    59,
    2437,
)

SALES = """\
who,amount,count
ann,1.10,1
bob,2,2
ann,3.30,3
ann,-0.2,4
eve,1e-3,5
bob,5,6
"""
SALES_TOTALS = {"ann": (3, "4.20", 8), "bob": (2, 7, 8), "eve": (1, "0.001", 5)}


class Runs:
    """Runs the program in a world of its own."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.environment = {k: v for k, v in os.environ.items() if k != "PHONON_URL"}
        self.environment |= {"TMPDIR": str(temporary), "COLUMNS": "200"}

    def __call__(
        self, *arguments: str, stdin: str | bytes = b"", **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run it to its end. Nothing may be left behind."""
        done = subprocess.run(
            [*PROGRAM, *arguments],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            env=self.environment | environment,
        )
        assert list(self.temporary.iterdir()) == []
        assert b"Traceback" not in done.stderr
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )


@pytest.fixture
def run() -> Iterator[Runs]:
    temporary = Path(tempfile.mkdtemp(prefix="ph-"))
    yield Runs(temporary)
    shutil.rmtree(temporary)


class Running:
    """The program while it waits for rows on standard input."""

    def __init__(self, run: Runs, *arguments: str, rows: str) -> None:
        self.run = run
        self.popen = subprocess.Popen(
            [*PROGRAM, "demo", *TWO, "--input", "-", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=run.environment,
            process_group=0,
        )
        assert self.popen.stdin is not None
        assert self.popen.stderr is not None
        self.popen.stdin.write(rows)
        self.popen.stdin.flush()
        # The workers are ready when it says so. On a slow machine it says before how it goes.
        said = ""
        for line in iter(self.popen.stderr.readline, ""):
            said += line
            if "pids:" in line:
                break
        self.workers = [int(pid) for pid in re.findall(r"\d+", said.partition("pids:")[2])]
        assert self.workers, said

    def end(self) -> tuple[int, str, str]:
        """No more rows."""
        out, errors = self.popen.communicate(timeout=TIMEOUT)
        wait_until(lambda: not any(map(alive, self.workers)))
        return self.popen.returncode, out, errors


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Whether a process lives; one that nobody has waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def supervised(folder: Path) -> Iterator[Callable[[], bool]]:
    """Tells whether a folder's embedded server is there, also when the folder is not."""
    descriptor = os.open(folder / "phonon-server", os.O_RDONLY)

    def still_there() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return False

    yield still_there
    os.close(descriptor)


@pytest.fixture
def start(run: Runs) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str, rows: str = SALES) -> Running:
            running = Running(run, *arguments, rows=rows)
            stack.enter_context(running.popen)
            stack.callback(running.popen.kill)
            return running

        yield begin


def value(out: str, name: str) -> str:
    """A figure of the table."""
    (found,) = re.findall(rf"^│ +{re.escape(name)} +│ +(\S+) │$", out, re.MULTILINE)
    return str(found)


def totals(database: Path) -> dict[str, tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT * FROM totals").fetchall()
    return {key: tuple(figures) for key, *figures, _sessions, _token in rows}


# The main job


def test_the_flights_are_exact(run: Runs, tmp_path: Path) -> None:
    path = tmp_path / "flights.db"
    done = run("demo", "--no-kill", "--database", str(path))
    assert done.returncode == 0, done.stderr
    assert "3,148 of 3,148 keys equal" in done.stdout
    assert value(done.stdout, "messages") == "26,849"
    assert value(done.stdout, "rejected rows") == "155"
    assert value(done.stdout, "no tail number, first in line 1,425") == "155"
    # All workers hold every aircraft until the last message is stored: one session each.
    assert value(done.stdout, "sessions") == "3,148"
    assert value(done.stdout, "database writes") == "3,148"
    assert value(done.stdout, "messages per write") == "8.5"
    with contextlib.closing(sqlite3.connect(path)) as database:
        sums = "SELECT sum(flights), sum(sessions), count(*) FROM aircraft"
        assert database.execute(sums).fetchone() == (26849, 3148, 3148)
        figures = "SELECT flights, miles, airports, worst_delay, air_minutes FROM aircraft "
        one = database.execute(figures + "WHERE tailnum = 'N14228'").fetchone()
        # Some never left the ground.
        gaps = database.execute(figures + "WHERE worst_delay IS NULL").fetchall()
    assert (*one[:2], one[2].replace(" ", ""), *one[3:]) == N14228
    assert gaps
    assert {minutes for *_, minutes in gaps} == {0}
    assert [file.name for file in tmp_path.iterdir()] == ["flights.db"]


@pytest.mark.slow
def test_evictions_write_a_key_more_than_once(run: Runs) -> None:
    rows = "".join(f"k{i % 7},{i}\n" for i in range(3000))
    done = run("demo", *TWO, "--input", "-", "--key", "k", "--sum", "n", "--max-entries", "2",
               stdin="k,n\n" + rows)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "7 of 7 keys equal" in done.stdout
    assert value(done.stdout, "messages") == "3,000"
    assert int(value(done.stdout, "sessions").replace(",", "")) > 7
    assert value(done.stdout, "database writes") == value(done.stdout, "sessions")


@pytest.mark.slow
@pytest.mark.parametrize("options", [("1",), ("3",), ("3", "--asyncio")], ids=" ".join)
def test_own_rows(run: Runs, tmp_path: Path, options: tuple[str, ...]) -> None:
    source, path = tmp_path / "sales.csv", tmp_path / "sales.db"
    source.write_text(SALES)
    done = run("demo", "--input", str(source), "--key", "who", "--sum", "amount", "--sum", "count",
               "--sum", "amount", "--no-kill", "--workers", *options,
               "--database", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 3 keys equal" in done.stdout
    assert totals(path) == SALES_TOTALS


@pytest.mark.slow
def test_own_json_lines_packed_on_standard_input(run: Runs, tmp_path: Path) -> None:
    objects: list[dict[str, Any]] = [
        {"user": {1: "ann", 2: 7}.get(i % 3, "ы"), "n": 10**30 + i} for i in range(2500)
    ]
    lines = "".join(json.dumps(o) + "\n" for o in objects)
    path = tmp_path / "x.db"
    done = run("demo", *TWO, "--input", "-", "--key", "user", "--sum", "n", "--database", str(path),
               stdin=gzip.compress(lines.encode()))  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = {
        name: (
            sum(1 for o in objects if str(o["user"]) == name),
            str(sum(o["n"] for o in objects if str(o["user"]) == name)),
        )
        for name in ("ann", "7", "ы")
    }
    assert totals(path) == expected


def test_rows_are_counted_without_sums(run: Runs) -> None:
    done = run("demo", *TWO, "--input", "-", "--key", "who", stdin=SALES)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 keys equal" in done.stdout


@pytest.mark.slow
def test_odd_names(run: Runs, tmp_path: Path) -> None:
    """Keys and columns are any text: as resources, as SQL, and on the terminal."""
    keys = [
        "{a}",
        "a}b{c",
        "%41",
        "[red]x[/red]",
        "'; DROP TABLE totals; --",
        "\x1b[31m",
        "a\0b",
        "💥",
    ]
    column = 'sum("x") [/] {old} ?'
    lines = "".join(json.dumps({"rows": k, column: "1.5"}) + "\n" for k in keys * 3)
    path = tmp_path / "x.db"
    done = run("demo", *TWO, "--input", "-", "--key", "rows", "--sum", column, "--sum", "rows",
               "--database", str(path), stdin=lines)  # fmt: skip
    assert done.returncode == 2
    assert "no number in 'rows'" in done.stderr
    done = run("demo", *TWO, "--input", "-", "--key", "rows", "--sum", column,
               "--database", str(path), stdin=lines)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert totals(path) == dict.fromkeys(keys, (3, "4.5"))


def test_bad_rows_are_counted_and_shown(run: Runs, tmp_path: Path) -> None:
    source = tmp_path / "x.csv"
    source.write_bytes(
        b'\xef\xbb\xbfk,n\r\na,1\r\na\r\n,1\r\na,one\r\n\xff,1\r\na,2\r\n"a,3\r\nb,4\r\n'
    )
    done = run("demo", *TWO, "--input", str(source), "--key", "k", "--sum", "n")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 keys equal" in done.stdout
    assert value(done.stdout, "messages") == "3"
    assert value(done.stdout, "rejected rows") == "5"
    for reason, line in (
        ("wrong number of fields", 3),
        ("no key in 'k'", 4),
        ("no number in 'n'", 5),
        ("not UTF-8 text", 6),
        ("bad CSV", 8),
    ):
        assert value(done.stdout, f"{reason}, first in line {line}") == "1"


@pytest.mark.slow
def test_a_named_server(run: Runs, own_server: Redis) -> None:
    arguments = ("demo", *TWO, "--input", "-", "--key", "who", "--sum", "amount")
    url = own_server.url
    with own_server.client() as client:
        for options, environment in ((("--url", url), {}), ((), {"PHONON_URL": url})):
            client.config_resetstat()
            done = run(*arguments, *options, stdin=SALES, **environment)
            assert done.returncode == 0, done.stderr
            assert "3 of 3 keys equal" in done.stdout
            assert client.info("commandstats")["cmdstat_fcall"]["calls"] > 10  # it was this one
            assert left(own_server) == []


def left(server: Redis) -> list[bytes]:
    """What runs of the demo have left on a server."""
    with server.client() as client:
        return list(client.scan_iter(match="{phonon-demo-*", count=1000))


# The check


def test_figures_that_others_have_altered_are_found(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    path = tmp_path / "x.db"
    running = start("--key", "who", "--sum", "amount", "--database", str(path))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("""
            CREATE TRIGGER alter_bob AFTER INSERT ON totals WHEN new.key = 'bob'
            BEGIN UPDATE totals SET sum_amount = 666 WHERE key = 'bob'; END;
            CREATE TRIGGER drop_eve AFTER INSERT ON totals WHEN new.key = 'eve'
            BEGIN DELETE FROM totals WHERE key = 'eve'; END;
            INSERT INTO totals VALUES ('mallory', 1, 'no number', 1, 1);
        """)
    status, out, errors = running.end()
    assert status == 1, errors
    assert "1 of 4 keys equal" in out
    rows = [
        re.findall(r"[^│\s][^│]*[^│\s]|[^│\s]", line) for line in out.splitlines() if "'" in line
    ]
    assert ["'bob'", "sum_amount", "7", "666"] in rows
    assert ["'eve'", "1, 0.001", "no such key"] in rows
    assert ["'mallory'", "no such key", "1, no number"] in rows
    assert "'ann'" not in out


def test_differences_of_all_kinds_are_found() -> None:
    expected = {"a": (1, None), "b": (2, 5), "c": (3, 3)}
    assert compare(expected, dict(expected)) == []
    assert compare(expected, {"a": (1, 0), "b": (2, 5), "d": (1, 1)}) == [
        Difference("a", (1, None), (1, 0)),
        Difference("c", (3, 3), None),
        Difference("d", None, (1, 1)),
    ]


def test_the_first_twenty_differences_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(report, "Console", lambda: Console(file=out, width=200))
    differences = [Difference(f"k{i:02}", (1, i), (1, -i)) for i in range(1, 26)]
    rejections = Rejections()
    report.show(
        report.Outcome("title", 9, 0, rejections, 3, 3, 0, 1.0, 30, differences), ["rows", "sum"]
    )
    text = out.getvalue()
    assert "5 of 30 keys equal" in text
    assert "the first 20 of 25" in text
    assert len(re.findall(r"'k\d\d' +│ sum", text)) == 20
    assert "'k21'" not in text


def test_a_batch_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    path, table = str(tmp_path / "x.db"), Flights().table
    with create(path, table) as database:
        calls: list[None] = []
        with contextlib.closing(Sink(path, table, lambda: calls.append(None))) as sink:
            first = (1, 100, '["EWR", "IAH"]', None, 0)
            sink.write("N1", first, 10)
            sink.write("N1", first, 10)
            sink.write("N1", (2, 50, '["IAH", "BQN"]', -3, 70), 12)
            sink.write("N1", first, 11)
            sink.write("N1", (1, 1, '["EWR"]', -5, 1), 13)
            sink.write("N2", first, 5)
        assert (sink.writes, sink.repeats, len(calls)) == (4, 2, 6)
        assert sessions(database, table) == 4
        rows = {key: Flights().figures(rest) for key, *rest in database.execute(table.select)}
        assert rows == {
            "N1": (4, 151, frozenset({"EWR", "IAH", "BQN"}), -3, 71),
            "N2": (1, 100, frozenset({"EWR", "IAH"}), None, 0),
        }


# What cannot be used


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--input none.csv --key a", ["'none.csv'", "No such file", "--input"]),
        ("--input - --key a", ["standard input is empty"]),
        ("--input good.csv --key wo", ["no column 'wo'", "'who', 'amount', 'count'"]),
        ("--input good.csv --key who --sum x", ["no column 'x'", "'who', 'amount', 'count'"]),
        ("--input header.csv --key who", ["has a header and no rows"]),
        ("--input good.csv --key who --sum who", ["none of its 6 rows", "no number in 'who'"]),
        ("--input cut.csv.gz --key k", ["cannot be read to its end"]),
        ("--input good.csv", ["--input needs --key"]),
        ("--key who", ["--input FILE"]),
        ("--sum who", ["--input FILE"]),
        ("--input good.csv --key who --sum a --sum A", ["upper case"]),
        ("--workers 0", ["--workers"]),
        ("--max-entries 0", ["--max-entries"]),
        ("--url redis://127.0.0.1:1/1", ["127.0.0.1:1", "embedded://"]),
        ("--url nonsense", ["URL"]),
        ("--database good.csv", ["good.csv", "is there already", "--database"]),
        ("--database .", ["is there already"]),
        ("--database no/such/folder.db", ["folder.db", "cannot be made", "--database"]),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.csv").write_text(SALES)
    Path("header.csv").write_text("who,amount\n")
    rows = b"k,n\n" + b"".join(b"%d,%d\n" % (i % 9, i**3) for i in range(20_000))
    Path("cut.csv.gz").write_bytes(gzip.compress(rows)[:-100])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run("demo", *TWO, *arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if re.match(r"(phonon|Error): ", line)]
    assert len(said) == 1
    for word in words:
        assert word in said[0]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_run_without_a_row_leaves_no_database_in_the_way(run: Runs, tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    arguments = ("demo", *TWO, "--input", "-", "--key", "who", "--database", str(path))
    assert run(*arguments, "--sum", "who", stdin=SALES).returncode == 2
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, stdin=SALES).returncode == 0
    again = run(*arguments, stdin=SALES)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert totals(path) == {"ann": (3,), "bob": (2,), "eve": (1,)}


# Ends before the end


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_all(
    run: Runs, server: Redis, start: Callable[..., Running], number: signal.Signals
) -> None:
    running = start("--key", "who", "--url", server.url)
    os.killpg(running.popen.pid, number)  # as a terminal does
    status, out, errors = running.end()
    assert status == 128 + number
    assert out == ""
    # Not a word of workers that had to be killed.
    assert errors == f"phonon: ended by {number.name}; the workers have left\n"
    assert list(run.temporary.iterdir()) == []
    assert left(server) == []


@pytest.mark.slow
def test_a_signal_ends_its_own_server(run: Runs, start: Callable[..., Running]) -> None:
    running = start("--key", "who")
    (folder,) = run.temporary.iterdir()
    with supervised(folder) as still_there:
        assert still_there()
        running.popen.send_signal(signal.SIGINT)
        assert running.end()[0] == 128 + signal.SIGINT
        assert not still_there()
    assert not folder.exists()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_its_own_server_is_waited_for(run: Runs, error: type[BaseException] | None) -> None:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(KeyboardInterrupt), private_server(run.temporary) as url:
            user = embedded.start(url.removeprefix("embedded://"))
            still_there = stack.enter_context(supervised(run.temporary))
            assert still_there()
            user.close()
            if error is not None:
                raise error
        assert not still_there()


# Workers that die


@pytest.mark.parametrize("api", [(), ("--asyncio",)], ids=["threads", "asyncio"])
def test_one_is_killed_and_taken_over(run: Runs, tmp_path: Path, api: tuple[str, ...]) -> None:
    path = tmp_path / "flights.db"
    done = run("demo", "--database", str(path), *api)
    assert done.returncode == 0, done.stderr
    assert "3,148 of 3,148 keys equal" in done.stdout
    epitaph = r"worker 2 \(pid \d+\) was killed by SIGKILL"
    assert re.search(epitaph + r"; it had acknowledged 1,500 messages", done.stderr)
    assert re.search(r"all of worker 2 is taken over, \d+\.\d s after its death", done.stderr)
    assert re.search(epitaph + r" after +│ 1,500 messages", done.stdout)
    left = int(value(done.stdout, "open sessions that it left").replace(",", ""))
    assert left > 500
    taken = re.findall(r"^│ +taken over by worker (\d) +│ +(\S+) │$", done.stdout, re.MULTILINE)
    assert {number for number, _ in taken} <= {"1", "3", "4"}
    assert sum(int(count.replace(",", "")) for _, count in taken) == left
    assert re.search(r"all taken over after +│ +\d+\.\d s", done.stdout)
    assert "dealt again" not in done.stdout
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT sum(flights) FROM aircraft").fetchone() == (26849,)


@pytest.mark.slow
def test_keys_that_only_the_dead_one_held_are_written(run: Runs, tmp_path: Path) -> None:
    """Of ten rows each worker gets every second one; it is killed with its keys in hand."""
    path = tmp_path / "x.db"
    rows = "k\n" + "".join(f"k{i}\n" for i in range(10))
    done = run("demo", "--workers", "2", "--input", "-", "--key", "k", "--database", str(path),
               stdin=rows)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 of 10 keys equal" in done.stdout
    assert value(done.stdout, "open sessions that it left") == "5"
    assert value(done.stdout, "taken over by worker 1") == "5"
    assert totals(path) == {f"k{i}": (1,) for i in range(10)}


def test_a_single_worker_is_not_killed(run: Runs) -> None:
    done = run("demo", "--workers", "1", "--input", "-", "--key", "who", stdin=SALES)
    assert done.returncode == 0, done.stderr
    assert "a single worker is not killed" in done.stderr
    assert "SIGKILL" not in done.stdout


@pytest.mark.slow
def test_one_without_work_is_killed_all_the_same(run: Runs) -> None:
    done = run("demo", "--workers", "2", "--input", "-", "--key", "who", stdin="who\nann\n")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 keys equal" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_dies_by_itself_is_taken_over(
    run: Runs, server: Redis, start: Callable[..., Running], tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "x.db"
    running = start("--key", "who", "--url", server.url, "--database", str(path))
    os.kill(running.workers[1], number)
    status, out, errors = running.end()
    assert status == 0, errors
    assert "3 of 3 keys equal" in out
    how = "was killed by SIGKILL" if number == signal.SIGKILL else f"exit status {128 + number}"
    assert how in out
    assert re.search(rf"worker 2 \(pid {running.workers[1]}\) .*{how}", errors)
    assert "Traceback" not in errors
    assert totals(path) == {"ann": (3,), "bob": (2,), "eve": (1,)}
    assert list(run.temporary.iterdir()) == []
    assert left(server) == []


@pytest.mark.slow
def test_what_a_dead_worker_never_looked_at_is_dealt_again(start: Callable[..., Running]) -> None:
    running = start("--key", "who", rows="who\nann\n")
    os.kill(running.workers[1], signal.SIGSTOP)
    assert running.popen.stdin is not None
    running.popen.stdin.write("ann\n" * 4000)
    running.popen.stdin.flush()
    os.kill(running.workers[1], signal.SIGKILL)
    status, out, errors = running.end()
    assert status == 0, errors
    assert "1 of 1 keys equal" in out


@pytest.mark.slow
@pytest.mark.parametrize("api", [(), ("--asyncio",)], ids=["threads", "asyncio"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_leave_finishes_what_it_has_in_hand(
    own_server: Redis,
    start: Callable[..., Running],
    tmp_path: Path,
    number: signal.Signals,
    api: tuple[str, ...],
) -> None:
    path = tmp_path / "x.db"
    rows = [f"k{i % 70}\n" for i in range(5_000)]
    proxy = Proxy(own_server.socket)
    try:
        arguments = ("--key", "who", "--url", proxy.url, "--database", str(path))
        running = start(*arguments, *api, rows="who\n" + rows[0])
        append = 0

        def leave_at(step: str) -> None:
            nonlocal append
            append += step == "append"
            if append == 40 and step == "append":
                os.kill(running.workers[1], number)

        proxy.on_reply = leave_at
        assert running.popen.stdin is not None
        running.popen.stdin.write("".join(rows[1:]))
        status, out, errors = running.end()
    finally:
        proxy.close()
    assert status == 0, errors
    assert "70 of 70 keys equal" in out
    assert f"exit status {128 + number}" in out
    # Nothing was left to take over: its sessions had ended when it left.
    assert "taken over by" not in out
    assert sum(rows for (rows,) in totals(path).values()) == 5_000


@pytest.mark.slow
def test_what_was_stored_but_not_acknowledged_counts_twice_and_is_found(
    own_server: Redis, start: Callable[..., Running]
) -> None:
    proxy = Proxy(own_server.socket)
    try:
        running = start("--key", "who", "--url", proxy.url, rows="who\nk0\n")
        other, victim = running.workers
        os.kill(other, signal.SIGSTOP)  # so that it is the victim that stores

        def kill_at(step: str) -> None:
            if step == "append":
                proxy.on_reply = nothing
                os.kill(victim, signal.SIGKILL)
                os.kill(other, signal.SIGCONT)

        proxy.on_reply = kill_at
        assert running.popen.stdin is not None
        running.popen.stdin.write("".join(f"k{i % 20}\n" for i in range(1, 1000)))
        running.popen.stdin.flush()
        wait_until(lambda: not is_running(victim))
        status, out, errors = running.end()
    finally:
        proxy.close()
    assert status == 1, errors
    assert "A worker died with 500 messages unacknowledged" in out
    assert "at-least-once" in out
    assert value(out, "unacknowledged messages, dealt again") == "500"


@pytest.mark.slow
def test_when_all_workers_have_died_it_ends(
    run: Runs, server: Redis, start: Callable[..., Running]
) -> None:
    running = start("--key", "who", "--url", server.url)
    for worker in running.workers:
        os.kill(worker, signal.SIGKILL)
    status, out, errors = running.end()
    assert status == 1
    assert out == ""
    last = errors.splitlines()[-1]
    assert re.match(r"phonon: worker \d \(pid \d+\) was killed by SIGKILL", last)
    assert "no other worker is left" in last
    assert "Traceback" not in errors
    assert list(run.temporary.iterdir()) == []
    assert left(server) == []


@pytest.mark.slow
def test_a_worker_that_cannot_write_ends_it_all(
    run: Runs, start: Callable[..., Running], tmp_path: Path
) -> None:
    path = tmp_path / "x.db"
    running = start("--key", "who", "--database", str(path))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE totals")
    status, out, errors = running.end()
    assert status == 1
    assert out == ""
    assert re.match(r"phonon: worker \d .*no such table: totals", errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert list(run.temporary.iterdir()) == []


@pytest.mark.slow
def test_workers_do_not_outlive_a_demo_that_was_killed(
    own_server: Redis, start: Callable[..., Running], tmp_path: Path
) -> None:
    path = tmp_path / "x.db"
    rows = "who\n" + "".join(f"k{i}\n" for i in range(2000))
    running = start("--key", "who", "--url", own_server.url, "--database", str(path), rows=rows)
    with own_server.client() as client:
        wait_until(lambda: list(client.scan_iter(match="*:partials:*", count=1000)))
        running.popen.kill()
        assert running.end()[0] == -signal.SIGKILL
        # They have ended their sessions. What is left is the demo's own registration.
        kept = [key for key in client.scan_iter(count=1000) if client.ttl(key) < 0]
    names = {key.decode().partition("}:")[2].partition(":")[0] for key in kept}
    of_processes = {"processes", "listings", "cards", "reports", "epoch", "partitions"}
    assert names <= of_processes | set(OF_A_LANE)
    assert len(totals(path)) >= 1000  # a list of each worker was full, and had been dealt


# On a terminal, and around


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [TWO, ("--workers", "2")])
def test_the_display_on_a_terminal(run: Runs, arguments: tuple[str, ...]) -> None:
    leader, terminal = pty.openpty()
    popen = subprocess.Popen(
        [*PROGRAM, "demo", "--input", "-", "--key", "who", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=run.environment | {"TERM": "xterm"},
    )
    os.close(terminal)
    assert popen.stdin is not None
    popen.stdin.write(SALES.encode())
    popen.stdin.flush()
    shown = b""
    while b"worker 2" not in shown:  # with the input still open: it is live
        shown += os.read(leader, 4096)
    with popen:
        popen.stdin.close()
        with contextlib.suppress(OSError):  # how a terminal says that it was closed
            while more := os.read(leader, 4096):
                shown += more
        assert popen.stdout is not None
        out = popen.stdout.read().decode()
    os.close(leader)
    assert popen.returncode == 0
    assert re.search(rb"worker 1 .*pid \d+.* messages .* sessions written", shown)
    assert (b"was killed by SIGKILL" in shown) == (arguments is not TWO)
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") == 1  # the cursor is back
    assert out.startswith("standard input, added up per 'who'")
    assert "\x1b" not in out


@pytest.mark.slow
def test_lines_of_text_where_there_is_no_terminal(run: Runs) -> None:
    done = run("demo", "--no-kill", "--input", "-", "--key", "who", stdin=SALES)
    first, second = [line for line in done.stderr.splitlines() if not line.startswith("0 mess")]
    assert re.fullmatch(r"4 worker processes on a server of their own, their pids: [\d, ]+", first)
    assert "6 messages acknowledged" in second
    assert "\x1b" not in done.stderr + done.stdout


def test_help_and_version(run: Runs) -> None:
    assert re.fullmatch(r"phonon, version \d+\.\S+\n", run("--version").stdout)
    assert "demo" in run("--help").stdout
    text = run("demo", "--help").stdout
    options = {"--workers", "--url", "--input", "--key", "--sum", "--max-entries", "--database"}
    options |= {"--kill"}
    assert options <= set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))
    assert "PHONON_URL" in text
    assert "\n    phonon demo --workers 8" in text


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra(run: Runs, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import phonon.cli; phonon.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=run.environment,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert missing in done.stderr
    assert "pip install 'phonon[cli]'" in done.stderr


def test_workers_find_what_the_demo_finds(run: Runs, tmp_path: Path) -> None:
    """And nothing in the folder where it is run, which may have files named like modules."""
    for name in ("csv", "json", "logging", "sqlite3", "phonon"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    script = shutil.which("phonon", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run(
        [script, "demo", *TWO, "--input", "-", "--key", "who"],
        input=SALES,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        cwd=tmp_path,
        env=run.environment,
    )
    assert done.returncode == 0, done.stderr


def test_columns_become_names_in_sql() -> None:
    assert Sums("k", ("a", 'b"')).table.create == (
        'CREATE TABLE totals (key TEXT PRIMARY KEY, "rows", "sum_a", "sum_b""", '
        "sessions INTEGER NOT NULL, token INTEGER NOT NULL)"
    )
