"""A rolling release: processes of two versions of a program run side by side."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest

from phonon import ConflictFreeUpdate, Model, RetryPolicy, Update
from phonon.errors import ConfigurationError, UnstableNameWarning
from phonon.fields import ID, Sum
from support.world import Make, Redis, key_for, wait_until

#: The releases of a program: in the second one the model and the update were renamed and changed.
COMMON = """
import json, sys
from phonon import Model, Process, Update
from phonon.errors import UnknownClassError
from phonon.fields import ID, Sum
def write(*row):
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps(row) + "\\n")
"""
RELEASES = {
    1: """
class Views(Model, name="app.Views"):
    user: ID[str]
    count: Sum[int] = Sum()
    def on_complete(self):
        write(1, "model", self.user, self.count)
class Old(Update, name="app.Old"):
    def merge(self, other): self.doc["n"] += other.doc["n"]
    def execute(self): write(1, "update", self._id, self.doc["n"])
def model(user): return {"user": user, "count": 1}
def update(process, key): return Old(process, key, doc={"n": 1})
""",
    2: """
class PageViews(Model, name="page_views", aliases=["app.Views"], version=2):
    user: ID[str]
    views: Sum[int] = Sum()
    def on_complete(self):
        write(2, "model", self.user, self.views)
    @classmethod
    def upgrade(cls, old, version):
        assert version == 1
        return {"views": old.get("count", 0)}
class New(Update, name="new", aliases=["app.Old"], version=2):
    def merge(self, other): self.doc["times"] += other.doc["times"]
    def execute(self): write(2, "update", self._id, self.doc["times"])
    @classmethod
    def upgrade(cls, old, version):
        return {"doc": {"times": old["doc"]["n"]}}
def model(user): return {"user": user, "views": 1}
def update(process, key): return New(process, key, doc={"times": 1})
""",
}
MAIN = """
Record = Views if "Views" in globals() else PageViews
process = Process(url=sys.argv[1], namespace=sys.argv[3], heartbeat_interval=0.3)
records = process.collect(Record)
for line in sys.stdin:
    command, _, key = line.strip().partition(" ")
    if command == "add":
        with process.batch():
            records.add_many([model(key)])
            kept = update(process, key)
    elif command == "end":
        for end in (records.expire_all, kept.end_session):
            try:
                end()
            except* UnknownClassError:
                pass  # its data is left to the other release
    else:
        process.stop()
        break
    print("done", flush=True)
"""


class Program:
    """A process of one release."""

    def __init__(self, release: int, server: Redis, namespace: str, folder: Path) -> None:
        code = COMMON + RELEASES[release] + MAIN
        self.popen = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, server.url, str(folder / "out"), namespace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )

    def __call__(self, command: str) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()
        if command != "stop":
            assert self.popen.stdout.readline() == "done\n"

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            stream.close()


@pytest.mark.parametrize("last", ["old", "new", "killed"])
def test_a_rolling_release_loses_nothing(
    server: Redis, namespace: str, tmp_path: Path, last: str
) -> None:
    old, new = (Program(release, server, namespace, tmp_path) for release in (1, 2))
    try:
        for _ in range(2):
            old("add ada")
            new("add ada")
        if last == "killed":
            old.popen.kill()
            new("end")
        else:
            first, then = (new, old) if last == "old" else (old, new)
            first("end")
            then("end")
        found: Counter[str] = Counter()

        def written() -> bool:
            found.clear()
            if (tmp_path / "out").exists():
                for line in (tmp_path / "out").read_text().splitlines():
                    release, kind, key, count = json.loads(line)
                    assert (release, key) == (2, "ada"), "the old one knows nothing of the new data"
                    found[kind] += count
            return found == {"model": 4, "update": 4}

        wait_until(written)
    finally:
        old.close()
        new.close()


def test_a_class_of_a_script_warns() -> None:
    code = (
        "from phonon import Model\nfrom phonon.fields import ID\nclass A(Model):\n    id: ID[str]"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    assert UnstableNameWarning.__name__ in ran.stderr
    assert 'class A(..., name="a")' in ran.stderr
    named = code.replace("(Model)", '(Model, name="a")')
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", named], capture_output=True, text=True, check=True
    )
    assert not ran.stderr


@pytest.mark.parametrize(
    "keywords", [{"name": "a@2"}, {"version": 0}, {"aliases": "one"}, {"aliases": [""]}]
)
def test_names_that_cannot_be_meant(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        type("Wrong", (ConflictFreeUpdate,), {}, **keywords)


def test_data_of_a_later_version_waits_for_it(make: Make) -> None:
    class Later(Model, name="test_later", version=3):
        id: ID[str]
        n: Sum[int] = Sum()

        def on_complete(self) -> None: ...

    from phonon._core import classes  # noqa: PLC0415 - what is asked here

    assert classes.resolve("test_later@4") is None
    assert classes.resolve("test_later@2") == (Later._record, 2)
    assert classes.resolve("test_later") == (Later._record, 1)
    assert classes.resolve("test_later@" + "9" * 5000) is None
    assert make().collect(Later).read("a") is None


@pytest.mark.parametrize("kind", ["model", "update"])
def test_an_upgrade_that_returns_no_dict_loses_nothing(make: Make, kind: str) -> None:
    """The batch is parked with an error that names the method, and replayed once it is mended."""
    done: list[Any] = []
    mended: list[bool] = []

    def upgraded(old: dict[str, Any], version: int) -> Any:
        assert version == 1
        return old if mended else None

    class Views(Model, name="test_upgraded_views", version=2):
        user: ID[str]
        views: Sum[int] = Sum()

        def on_complete(self) -> None:
            done.append((self.user, self.views))

        @classmethod
        def upgrade(cls, old: dict[str, Any], version: int) -> dict[str, Any]:
            found: dict[str, Any] = upgraded(old, version)
            return found

    class Row(ConflictFreeUpdate, name="test_upgraded_row", version=2):
        def execute(self) -> None:
            done.append((self._id, self.doc["n"]))

        @classmethod
        def upgrade(cls, old: dict[str, Any], version: int) -> dict[str, Any]:
            found: dict[str, Any] = upgraded(old, version)
            return found

    process = make(retry=RetryPolicy(attempts=1))
    client = process.client
    if kind == "model":
        records = process.collect(Views)
        records.add("ada", views=3)
        resource = "model.test_upgraded_views.ada"
        end: Callable[[], None] = partial(records.expire, "ada")
    else:
        row = Row(process, "ada", doc={"n": 3})
        resource, end = row.resource_id, row.end_session
    key = key_for(process, "partials", resource)
    layout, name, *rest = msgpack.unpackb(client.lrange(key, 0, -1)[0])
    assert name.endswith("@2")
    # As the first version of the class has stored it
    client.lset(key, 0, msgpack.packb([layout, name.removesuffix("@2"), *rest]))

    with pytest.raises(TypeError, match=r"\.upgrade\(\) returned None: it returns"):
        end()
    (parked,) = process.parked()
    assert "upgrade() returned None" in parked.error
    assert not done
    mended.append(True)
    process.replay(parked.resource, parked.token)
    assert done == [("ada", 3)]


def test_an_update_never_absorbs_one_of_another_resource_or_class(make: Make) -> None:
    from phonon import LruCache  # noqa: PLC0415 - of this test only

    class Row(ConflictFreeUpdate, name="test_row"):
        def execute(self) -> None: ...

    class Other(ConflictFreeUpdate, name="test_other_row"):
        def execute(self) -> None: ...

    process = make()
    cache: LruCache[Update] = LruCache()
    with process.batch():
        cache.set("k", Row(process, "z", doc={"n": 1}))
        with pytest.raises(ConfigurationError, match=r"Row of 'y'.*Row of 'z'"):
            cache.set("k", Row(process, "y", doc={"n": 2}))
        with pytest.raises(ConfigurationError, match=r"Other of 'z'.*Row of 'z'"):
            cache.set("k", Other(process, "z", doc={"n": 4}))
    kept = cache.get("k")
    assert kept is not None
    assert kept._id == "z"
