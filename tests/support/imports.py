"""The tree of imports, drawn from the code: ``make imports``.

Imports for the type checker alone (``if TYPE_CHECKING``) are left out: they name classes in
annotations. Those inside functions are left out of the tree, and listed below it.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
#: The lines of the page between which the tree is kept.
BEGIN, END = "<!-- imports: made by `make imports ARGS=--write` -->", "<!-- end of imports -->"
#: Packages from the bottom to the top; modules at the root belong to "facades".
LAYERS = (
    ("errors", "serializers", "embedded", "_protocol"),
    ("_core",),
    ("_transport",),
    ("_admin",),
    ("facades", "_models"),
    ("aio",),
)
#: The names of `_core` that `_transport` may use: effects, and values without behaviour.
EFFECTS = {"phonon._core.flows", "phonon._core.settings", "phonon._core.clock"}

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Return all modules of the package, by their dotted names."""
    found = {}
    for path in sorted((ROOT / "src" / "phonon").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(tree: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not _is_for_types(node) and (lazy or not is_function):
            yield node
            yield from _statements(node, lazy=lazy)


def imports(name: str, path: Path, known: set[str], *, lazy: bool = False) -> set[str]:
    """Return the modules of the package that one of them imports.

    Args:
        name: Its dotted name.
        path: Its file.
        known: The names of all modules.
        lazy: Whether to count imports inside functions, too.
    """
    found = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")), lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name instead of a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known
            if not inner <= known:
                found.add(str(node.module))
    return (found & known) - {name}


def graph(*, lazy: bool = False) -> Graph:
    """Return what each module of the package imports."""
    found = modules()
    return {name: imports(name, path, set(found), lazy=lazy) for name, path in found.items()}


def circles(edges: Graph) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""

    def below(name: str) -> set[str]:
        reached: set[str] = set()
        todo = [name]
        while todo:
            for other in edges[todo.pop()] - reached:
                reached.add(other)
                todo.append(other)
        return reached

    reach = {name: below(name) for name in edges}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in edges
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def package_of(name: str) -> str:
    """Return a module's package below ``phonon``; "facades" for what users import at the root."""
    parts = name.split(".")
    if name == "phonon.__main__":
        return "cli"
    if len(parts) > 1 and (parts[1] in ("errors", "serializers") or len(parts) > 2):
        return parts[1]
    path = ROOT / "src" / "phonon" / parts[-1]
    return parts[1] if len(parts) > 1 and path.is_dir() else "facades"


def height(name: str) -> int:
    """Return a module's layer, counted from the bottom. Optional packages are above all others.

    So are their twins in ``aio``, as ``phonon.aio.sinks`` is.
    """
    package = package_of(name)
    twin = ROOT / "src" / "phonon" / name.rpartition(".")[2]
    if package == "aio" and name != "phonon.aio" and twin.is_dir():
        return len(LAYERS)
    return next((i for i, layer in enumerate(LAYERS) if package in layer), len(LAYERS))


def upwards(edges: Graph) -> list[str]:
    """Return the imports that run upwards, or past what `_transport` may know of `_core`."""
    found = []
    for name, targets in edges.items():
        for target in sorted(targets):
            known = package_of(name) != "_transport" or package_of(target) != "_core"
            if height(target) > height(name) or not (known or target in EFFECTS):
                found.append(f"{name} imports {target}")
    return found


def levels(edges: Graph, names: set[str]) -> list[list[str]]:
    """Return modules from the top to the bottom: each imports only from the lines below its own."""
    depth: dict[str, int] = {}

    def measure(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((measure(other) for other in edges[name] & names), default=-1)
        return depth[name]

    rows: dict[int, list[str]] = {}
    for name in sorted(names):
        rows.setdefault(measure(name), []).append(name)
    return [rows[i] for i in sorted(rows, reverse=True)]


def draw(edges: Graph) -> str:
    """Return the tree as text: the layers, and in each package its files from the top down."""
    lines = []
    for layer in reversed(LAYERS):
        for package in layer:
            names = {name for name in edges if package_of(name) == package}
            names.discard(f"phonon.{package}")  # its `__init__` exports the others
            names.discard("phonon")
            rows = levels(edges, names or {f"phonon.{package}"})
            for i, row in enumerate(rows):
                short = "  ".join(name.rpartition(".")[2] for name in row)
                lines.append(f"{package if i == 0 else '':<13}{short}".rstrip())
        lines.append("")
    return "\n".join(lines).strip()


def page_with(tree: str) -> str:
    """Return the page of the documentation, with a tree in its place."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n```\n{tree}\n```\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Print the tree, or write it into the page."""
    parser = argparse.ArgumentParser(description="Draw the tree of imports.")
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.name}")
    options = parser.parse_args()
    edges, lazy = graph(), graph(lazy=True)
    print(draw(edges), "\n\nInside functions:")
    for name in edges:
        for target in sorted(lazy[name] - edges[name]):
            print(f"  {name} imports {target}")
    wrong = [*upwards(edges), *(" <-> ".join(group) for group in circles(edges))]
    print("\n".join(["\nUpwards, or in a circle:", *wrong] if wrong else ["\nNo circle."]))
    if options.write:
        PAGE.write_text(page_with(draw(edges)), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
