"""Reports results: a table, a file of figures, and a chart."""

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comparison.run import Contender, Results, Target


def _range(values: list[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return f"{format(statistics.median(values), form)} ({low} to {high})"


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    table = Table("", "median (lowest to highest)", "lost at kill -9")
    for group, members in _groups(results).items():
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]", "", "")
        for contender in members:
            rate = _range(contender.rates, ",.0f") if contender.rates else "not installed"
            table.add_row(contender.name, rate, contender.loses)
    console.print(table)
    table = Table("ratio of", "to", "median (lowest to highest)", "target", "")
    for target in results.targets:
        table.add_row(*_row(target))
    console.print(table)
    absent = sorted({c.peer for c in results.contenders if not c.is_there})
    if absent:
        console.print(f"not installed: {', '.join(absent)}: pip install 'phonon\\[bench]'")


def _row(target: Target) -> tuple[str, ...]:
    met = "met" if target.is_met else "missed"
    ratios = _range(target.ratios, ".2f")
    return target.ours.name, target.theirs.name, ratios, f"{target.at_least:g}", met


def _groups(results: Results) -> dict[str, list[Contender]]:
    groups: dict[str, list[Contender]] = {}
    for contender in results.contenders:
        groups.setdefault(contender.group, []).append(contender)
    return groups


def write(results: Results, path: Path) -> None:
    """Write all figures as JSON."""
    figures: dict[str, Any] = {
        "settings": results.settings,
        "rates": [
            {"group": c.group, "name": c.name, "loses": c.loses, "per_second": c.rates}
            for c in results.contenders
        ],
        "ratios": [
            {
                "of": target.ours.name,
                "to": target.theirs.name,
                "group": target.ours.group,
                "ratios": target.ratios,
                "target": target.at_least,
                "met": target.is_met,
            }
            for target in results.targets
        ],
    }
    path.write_text(json.dumps(figures, indent=1) + "\n")


def draw(results: Results, path: Path) -> None:
    """Draw the rates of each group, as bars with their spread."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - needed for nothing else

    groups = {group: [c for c in members if c.rates] for group, members in _groups(results).items()}
    heights = [len(members) + 1 for members in groups.values()]
    figure = Figure(figsize=(8, 0.34 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)
    for (group, members), (axis,) in zip(groups.items(), axes, strict=True):
        medians = [statistics.median(c.rates) for c in members]
        spread = [
            [m - min(c.rates) for m, c in zip(medians, members, strict=True)],
            [max(c.rates) - m for m, c in zip(medians, members, strict=True)],
        ]
        colours = ["#2a6f97" if "worker" in c.name or "Phonon" in c.name or "keys" in c.name
                   or "reference" in c.name else "#b8b8b8" for c in members]  # fmt: skip
        axis.barh([c.name for c in members], medians, xerr=spread, color=colours)
        axis.invert_yaxis()
        axis.set_title(group, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.savefig(path, metadata={"Date": None})
