"""``phonon demo``, the real program in an OS process, with real workers and a real server."""

import contextlib
import gzip
import json
import os
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

from phonon_demo.demo import differences
from support.world import Redis, wait_until

#: Each run is a server and several workers, which a busy machine takes its time for.
pytestmark = pytest.mark.timeout(180)
PROGRAM = [sys.executable, "-m", "phonon"]
TIMEOUT = 170  # a busy machine
# Less to start and to wait for than by default, where that is not what the test is about.
TWO = ("--workers", "2", "--no-kill")

# Counted by awk.
N14228 = {
    "flights": 15,
    "miles": 16479,
    "airports": '["BOS","EWR","FLL","IAH","LAX","MIA","PBI","PDX","PHX","RSW","TPA"]',
    "worst_delay": 59,
    "air_minutes": 2437,
}

SALES = """\
who,amount,count
ann,1.10,1
bob,2,2
ann,3.30,3
ann,-0.2,4
eve,1e-3,5
bob,5,6
"""
SALES_TOTALS = {
    "ann": (3, {"amount": "4.20", "count": "8"}),
    "bob": (2, {"amount": "7", "count": "8"}),
    "eve": (1, {"amount": "0.001", "count": "5"}),
}


class Runs:
    """Runs the program in a world of its own."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.environment = {k: v for k, v in os.environ.items() if k != "PHONON_URL"}
        self.environment |= {"TMPDIR": str(temporary), "COLUMNS": "200"}
        self.environment.pop("XDG_RUNTIME_DIR", None)  # the embedded server is in TMPDIR then

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
        assert left_in(self.temporary) == []
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )


@pytest.fixture
def run() -> Iterator[Runs]:
    temporary = Path(tempfile.mkdtemp(prefix="ph-"))
    yield Runs(temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # its server may be about to stop


def left_in(temporary: Path) -> list[Path]:
    """Return what is there besides the folder of the embedded server."""
    return [path for path in temporary.iterdir() if path.name != f"phonon-{os.getuid()}"]


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
        # The workers are connected when it says so.
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


@pytest.fixture
def start(run: Runs) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str, rows: str = SALES) -> Running:
            running = Running(run, *arguments, rows=rows)
            stack.enter_context(running.popen)
            stack.callback(running.popen.kill)
            return running

        yield begin


def value(out: str, name: str) -> int:
    """A figure of the summary."""
    (found,) = re.findall(rf"^ +{re.escape(name)} +(\S+)$", out, re.MULTILINE)
    return int(found.replace(",", ""))


def totals(database: Path) -> dict[str, Any]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT key, rows, sums FROM totals").fetchall()
    return {key: (count, json.loads(sums)) for key, count, sums in rows}


def left(server: Redis) -> list[bytes]:
    """Return the keys that runs of the demo have left on a server."""
    with server.client() as client:
        return list(client.scan_iter(match="*phonon-demo-*", count=1000))


# The main aggregation


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "2"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--asyncio",), marks=pytest.mark.slow),
        pytest.param(("--max-entries", "100"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_one_is_killed_and_the_flights_are_exact(
    run: Runs, tmp_path: Path, options: tuple[str, ...]
) -> None:
    path = tmp_path / "flights.db"
    done = run("demo", *options, "--database", str(path))
    assert done.returncode == 0, done.stderr
    assert "3,148 of 3,148 keys equal" in done.stdout
    assert value(done.stdout, "messages") == 26_849
    assert value(done.stdout, "rejected rows") == 155
    assert value(done.stdout, "no tailnum") == 155
    assert value(done.stdout, "sessions written by workers that live") >= 3_148
    assert re.search(r"worker \d+ was killed with SIGKILL; it held [\d,]+ open", done.stderr)
    assert re.search(r"all of it is taken over, \d+\.\d s after its death", done.stderr)
    with contextlib.closing(sqlite3.connect(path)) as database:
        columns = ", ".join(N14228)
        query = f"SELECT {columns} FROM aircraft WHERE tailnum = 'N14228'"  # noqa: S608 - our names
        one = dict(zip(N14228, database.execute(query).fetchone(), strict=True))
        # Some never left the ground.
        gaps = "SELECT air_minutes FROM aircraft WHERE worst_delay IS NULL"
        assert {minutes for (minutes,) in database.execute(gaps)} == {0}
    assert one | {"airports": one["airports"].replace(" ", "")} == N14228
    assert [file.name for file in tmp_path.iterdir()] == ["flights.db"]


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
    assert totals(path) == {
        name: (
            sum(1 for o in objects if str(o["user"]) == name),
            {"n": str(sum(o["n"] for o in objects if str(o["user"]) == name))},
        )
        for name in ("ann", "7", "ы")
    }


@pytest.mark.slow
def test_odd_names(run: Runs, tmp_path: Path) -> None:
    """Keys and columns are any text."""
    keys = ["{a}", "a}b{c", "%41", "'; DROP TABLE totals; --", "\x1b[31m", "💥"]
    column = 'sum("x") [/] {old} ?'
    lines = "".join(json.dumps({"rows": k, column: "1.5"}) + "\n" for k in keys * 3)
    path = tmp_path / "x.db"
    done = run("demo", *TWO, "--input", "-", "--key", "rows", "--sum", column,
               "--database", str(path), stdin=lines)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert totals(path) == dict.fromkeys(keys, (3, {column: "4.5"}))


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


# The check


@pytest.mark.slow
def test_rows_that_others_have_altered_are_found(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    path = tmp_path / "x.db"
    running = start("--key", "who", "--sum", "amount", "--database", str(path))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("""
            CREATE TRIGGER alter_bob AFTER UPDATE ON totals WHEN new.key = 'bob' AND new.rows < 666
            BEGIN UPDATE totals SET rows = 666 WHERE key = 'bob'; END;
            CREATE TRIGGER drop_eve AFTER UPDATE ON totals WHEN new.key = 'eve'
            BEGIN DELETE FROM totals WHERE key = 'eve'; END;
        """)
    status, out, errors = running.end()
    assert status == 1, errors
    assert "1 of 3 keys equal" in out
    assert re.search(r"^'bob' should be .*'rows': 2.* and is .*'rows': 666", out, re.MULTILINE)
    assert re.search(r"^'eve' should be .* and is None$", out, re.MULTILINE)
    assert "'ann'" not in out


def test_differences_of_all_kinds_are_found() -> None:
    expected = {"a": {"n": None}, "b": {"n": 5}, "c": {"n": 3}}
    assert differences(expected, dict(expected)) == []
    found = {"a": {"n": 0}, "b": {"n": 5}, "d": {"n": 1}}
    assert differences(expected, found) == ["a", "c", "d"]


# Unusable input


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--input none.csv --key a", ["'none.csv'", "No such file", "--input"]),
        ("--input - --key a", ["is empty"]),
        ("--input good.csv --key wo", ["no column 'wo'", "'who', 'amount', 'count'"]),
        ("--input header.csv --key who", ["none of its rows can be used: it has none"]),
        ("--input good.csv --key who --sum who", ["none of its rows", "6 x no number in 'who'"]),
        ("--input cut.csv.gz --key k", ["'cut.csv.gz' cannot be read"]),
        ("--input good.csv", ["--input needs --key"]),
        ("--sum who", ["--input FILE"]),
        ("--workers 0", ["--workers"]),
        ("--url redis://127.0.0.1:1/1", ["127.0.0.1:1", "embedded://"]),
        ("--url nonsense", ["URL"]),
        ("--database good.csv", ["good.csv", "File exists", "--database"]),
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
    assert done.returncode == 2, done.stderr
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
    assert "File exists" in again.stderr
    assert totals(path) == {"ann": (3, {}), "bob": (2, {}), "eve": (1, {})}


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
    assert errors.endswith(f"phonon: ended by {number.name}; the workers have ended too\n")
    assert left_in(run.temporary) == []
    assert left(server) == []


# Workers that die


@pytest.mark.slow
def test_keys_that_only_the_dead_one_held_are_written(run: Runs, tmp_path: Path) -> None:
    """Of ten rows each worker may have any; it is killed when all of them are stored."""
    path = tmp_path / "x.db"
    rows = "k\n" + "".join(f"k{i}\n" for i in range(10))
    done = run("demo", "--workers", "2", "--input", "-", "--key", "k", "--database", str(path),
               stdin=rows)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 of 10 keys equal" in done.stdout
    assert totals(path) == {f"k{i}": (1, {}) for i in range(10)}


def test_a_single_worker_is_not_killed(run: Runs) -> None:
    done = run("demo", "--workers", "1", "--input", "-", "--key", "who", stdin=SALES)
    assert done.returncode == 0, done.stderr
    assert "a single worker is not killed" in done.stderr
    assert "SIGKILL" not in done.stdout
    assert "3 of 3 keys equal" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("api", [(), ("--asyncio",)], ids=["threads", "asyncio"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_by_itself_is_done_without(
    run: Runs,
    server: Redis,
    start: Callable[..., Running],
    tmp_path: Path,
    number: signal.Signals,
    api: tuple[str, ...],
) -> None:
    path = tmp_path / "x.db"
    running = start("--key", "who", "--url", server.url, "--database", str(path), *api)
    os.kill(running.workers[1], number)
    status, out, errors = running.end()
    assert status == 0, errors
    assert "3 of 3 keys equal" in out
    assert "Traceback" not in errors
    assert totals(path) == {"ann": (3, {}), "bob": (2, {}), "eve": (1, {})}
    assert left_in(run.temporary) == []
    assert left(server) == []


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
    assert errors.splitlines()[-1] == "phonon: all workers have died before their work was done"
    assert "Traceback" not in errors
    assert left_in(run.temporary) == []
    assert left(server) == []


@pytest.mark.slow
def test_workers_do_not_outlive_a_demo_that_was_killed(
    own_server: Redis, start: Callable[..., Running]
) -> None:
    running = start("--key", "who", "--url", own_server.url)
    running.popen.kill()
    assert running.end()[0] == -signal.SIGKILL


# Around


def test_help_and_version(run: Runs) -> None:
    assert re.fullmatch(r"phonon, version \d+\.\S+\n", run("--version").stdout)
    assert "demo" in run("--help").stdout
    text = run("demo", "--help").stdout
    options = {"--workers", "--url", "--input", "--key", "--sum", "--max-entries", "--database"}
    options |= {"--kill", "--asyncio"}
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


@pytest.mark.slow
def test_it_needs_nothing_from_a_checkout(run: Runs, tmp_path: Path) -> None:
    """Nor anything in the folder where it is run, which may have files named like modules."""
    for name in ("csv", "json", "logging", "sqlite3", "phonon", "chaos"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    script = shutil.which("phonon", path=str(Path(sys.executable).parent))
    assert script is not None
    for options in ((), ("--asyncio",)):
        done = subprocess.run(
            [script, "demo", *TWO, "--input", "-", "--key", "who", *options],
            input=SALES,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            cwd=tmp_path,
            env=run.environment,
        )
        assert done.returncode == 0, done.stderr
