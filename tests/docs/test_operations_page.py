"""docs/operations.md says of every line in the log what to do; it must know all of them."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
LEVELS = {"debug", "info", "warning", "error", "exception"}


def logged() -> set[tuple[str, str]]:
    """Level and text of each line that the source logs."""
    found = set()
    for path in (ROOT / "src" / "phonon").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=[first, *_]
                ) if level in LEVELS:
                    text = first.value if isinstance(first, ast.Constant) else None
                    if isinstance(first, ast.Name):
                        text = constants[first.id]
                    assert isinstance(text, str), f"{path.name}:{node.lineno}"
                    found.add(("error" if level == "exception" else level, text))
    return found


def test_the_table_has_every_line_of_the_log() -> None:
    rows = re.findall(r"^\| (\w+) \| `(.+?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    table = {(level, text) for level, text, remedy in rows if len(remedy) > 3}
    assert logged() - table == set(), "say in docs/operations.md what to do about these"
    assert table - logged() == set(), "these are logged no more"
