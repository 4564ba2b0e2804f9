"""The code of models: a message is merged as a whole, whatever interrupts it."""

import dis
import linecache
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from types import CodeType
from typing import Any

import pytest

from phonon import Model, fields
from phonon._models.collecting import _PUT, _PUT_ROWS, _filled
from phonon._models.compiled import Compiled
from phonon.fields import (
    ID,
    Counter,
    Custom,
    Field,
    Latest,
    Max,
    Mean,
    SetAppend,
    Stats,
    Sum,
    TopK,
    Window,
)

#: Behind these CPython runs signal handlers, and lets other threads run.
BREAKS = frozenset(
    {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "PRECALL", "JUMP_BACKWARD", "FOR_ITER", "SEND"}
)


def instructions_of(code: CodeType) -> Iterator[tuple[int, dis.Instruction]]:
    line = 0
    for instruction in dis.get_instructions(code):
        found = instruction.positions
        line = (found.lineno if found is not None else None) or line
        yield line, instruction
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from instructions_of(constant)


def compiled(**others: Any) -> Compiled:
    all_of_them: dict[str, Field[Any, Any]] = {"id": ID(str), **others}
    for name, field in all_of_them.items():
        field.name = name
    return Compiled("Model", all_of_them)


@pytest.mark.parametrize("kind", [None, int, float, Decimal, str, datetime])
@pytest.mark.parametrize("name", sorted(set(fields.__all__) - {"Field", "Summary", "ID"}))
def test_a_state_changes_without_a_call(name: str, kind: Any) -> None:
    make: Any = getattr(fields, name)
    more = {"merge": max, "zero": 0} if make is Custom else {}
    code = compiled(field=make(data_type=kind, **more))
    function = "def commit(_record, field):\n" + "".join(f"    {x}\n" for x in code.fold_lines())
    names = [i.opname for _, i in instructions_of(compile(function, "", "exec"))]
    assert BREAKS.isdisjoint(names[names.index("RESUME", 2) :])


@pytest.mark.parametrize("template", [_PUT, _PUT_ROWS], ids=["put", "put_rows"])
def test_nothing_comes_between_the_look_for_a_record_and_its_change(template: str) -> None:
    code = compiled(total=Sum(int), kinds=SetAppend(str), high=Max(int))
    source = code.source(_filled(template, {"@TOUCH": "", "@SEEN": "", "@COUNT": ""}))
    lines = source.splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.strip() == "_record = _entries[id]")
    last = max(i for i, line in enumerate(lines, 1) if "high_state_ = high" in line)
    seldom = {"continue"}, {"_record = _ready(id, _batch, _target)"}
    for line, instruction in instructions_of(compile(source, "", "exec")):
        if first <= line <= last and instruction.opname in BREAKS:
            assert {lines[line - 1].strip()} in seldom


def test_states_move_out_of_a_record_at_once() -> None:
    take = compiled(total=Sum(int), kinds=SetAppend(str), high=Max(int)).packing.take
    lines = linecache.getlines(take.__code__.co_filename)
    first = next(i for i, line in enumerate(lines, 1) if "_record.moved_ +=" in line)
    last = next(i for i, line in enumerate(lines, 1) if "_record._emptied_ =" in line)
    assert last > first + 3
    for line, instruction in instructions_of(take.__code__):
        assert not (first <= line <= last and instruction.opname in BREAKS), lines[line - 1]


#: What a field's code calls before its state changes, and behind that.
CALLED = ("fold", "sums", "better", "changed", "tidy")
VALUES: dict[str, tuple[Any, list[Any]]] = {
    "counter": (lambda: Counter(str), [{"a": 1}, {"a": 2, "b": 1}, {"b": 5}]),
    "latest": (lambda: Latest(str), [(1, "a"), (2, "b"), (3, "c")]),
    "max": (lambda: Max(datetime), [datetime(2020, 1, n, tzinfo=None) for n in (1, 2, 3)]),  # noqa: DTZ001
    "custom": (lambda: Custom(merge=lambda a, b: a + b, zero=0), [1, 2, 4]),
    "top": (lambda: TopK(1, str), [{"a": 1}, {"a": 2}, {"b": 3}]),
    "window": (lambda: Window(1, int), [[(1, 1), (2, 2)], (4, 4), (5, 5)]),
    "sum": (lambda: Sum(float), [[0.1] * 63, 0.2, 0.3]),
    "mean": (lambda: Mean(float), [[0.1] * 62, 0.2, 0.3]),
    "stats": (lambda: Stats(float), [[0.1] * 58, 0.2, 0.3]),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_message_that_comes_in_the_middle_of_another_is_merged_too(name: str) -> None:
    make, (before, outer, inner) = VALUES[name]
    many = before if isinstance(before, list) else [before]
    code = compiled(field=make())
    plain: dict[str, Any] = {}
    for value in [*many, outer, inner]:
        code.fold(plain, "a", value)

    names = code._fold.__globals__
    states = code._states()
    code.fill(states, {})
    for value in many:
        code._fold("a", value, _record=states)
    hits: list[str] = []
    for called in CALLED:
        function = names.get(f"_{called}_field")

        def handled(*values: Any, function: Any = function, called: str = called) -> Any:
            found = function(*values)
            if not hits:
                hits.append(called)
                code._fold("a", inner, _record=states)
            return found

        names[f"_{called}_field"] = handled
    code._fold("a", outer, _record=states)
    assert hits
    field = code.fields["field"]
    assert field.read(code.doc_of(states)["field"]) == field.read(plain["field"])


def test_a_message_whose_merge_raises_leaves_nothing() -> None:
    def merge(one: int, other: int) -> int:
        raise ZeroDivisionError

    class Mixed(Model, name="mixed_code"):
        id: ID[str]
        total: Sum[int]
        ratio: Sum[float]
        kinds: SetAppend[str]
        counts: Counter[str]
        worst: Custom[int] = Custom(merge=merge, zero=0)

    code = Mixed._code()
    states = code._states()
    code.fill(states, {})
    code._fold("a", 1, 0.5, "x", {"k": 1}, _record=states)
    before = code.doc_of(states)
    with pytest.raises(ZeroDivisionError):
        code._fold("a", 1, 0.5, "y", {"k": 1}, 1, _record=states)
    assert code.doc_of(states) == before == {
        "total": 1, "ratio": [0, 0.5], "kinds": {"x"}, "counts": {"k": 1},
    }  # fmt: skip
