"""`benchmarks/compare.py` measures, verifies, and says what is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import compare
from comparison import contenders, stream
from comparison.contenders import WrongError, verify
from comparison.run import Contender, Results, Target


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, compare.__file__, *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.slow
def test_all_contenders_come_to_the_same(tmp_path: Path) -> None:
    """Their totals are verified by the program; that it ends with 0 says they are right."""
    path = tmp_path / "figures.json"
    ran = bench("--messages", "2000", "--rounds", "1", "--json", str(path))
    assert ran.returncode == 0, ran.stderr
    figures: dict[str, Any] = json.loads(path.read_text())
    assert figures["settings"]["messages"] == 2000
    rates = {(entry["group"], entry["name"]): entry["per_second"] for entry in figures["rates"]}
    without = {name for (_, name), measured in rates.items() if not measured}
    assert without <= {"Bytewax", "python-redis-lock", "pottery Redlock"}
    assert all(rate > 0 for measured in rates.values() for rate in measured)
    assert len(figures["ratios"]) >= 8
    for ratio in figures["ratios"]:
        assert len(ratio["ratios"]) == 1
        assert ratio["met"] == (ratio["ratios"][0] >= ratio["target"])
    assert "expire_all" in ran.stdout


def test_a_chart_without_what_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda _: None)
    ran = CliRunner().invoke(compare.main, ["--chart", str(tmp_path / "chart.svg")])
    assert ran.exit_code == 2
    assert "pip install 'phonon[bench]'" in ran.output


def test_a_wrong_total_is_found() -> None:
    messages = stream.zipf(100, 10, seed=1)
    found = stream.totals(messages)
    verify("right", messages, found)
    key = next(iter(found))
    count, elements, high = found[key]
    found[key] = count + 1, elements, high
    with pytest.raises(WrongError, match=r"wrong: 1 of \d+ keys"):
        verify("wrong", messages, found)


def test_ratios_are_of_the_same_round() -> None:
    ours = Contender("group", "ours", "", lambda: (1.0, 1), rates=[10.0, 30.0, 20.0])
    theirs = Contender("group", "theirs", "", lambda: (1.0, 1), rates=[10.0, 10.0, 40.0])
    target = Target(ours, theirs, 1.0)
    assert target.ratios == [1.0, 3.0, 0.5]
    assert target.is_met
    assert not Target(ours, theirs, 1.1).is_met
    assert Results({}, [ours, theirs], [target]).targets == [target]


def test_streams_are_seeded() -> None:
    one, two = stream.zipf(1000, 50, seed=1), stream.zipf(1000, 50, seed=1)
    assert one == two != stream.zipf(1000, 50, seed=2)
    shares = stream.shares(one, 3)
    assert sorted(map(len, shares)) == [333, 333, 334]
    assert stream.totals([m for share in shares for m in share]) == stream.totals(one)
    assert sum(map(len, stream.batches(uniform := stream.uniform(2500, 7)))) == len(uniform)
    assert contenders.SESSIONS % stream.BATCH == 0
