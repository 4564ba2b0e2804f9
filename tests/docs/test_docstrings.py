"""Every public class has an example in its docstring, and it prints what it says."""

import ast
import asyncio
import contextlib
import doctest
import importlib
import inspect
import io
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import phonon
import phonon.aio
import phonon.fields
from support.world import Redis

PACKAGES = ("phonon", "phonon.aio", "phonon.fields")


def public_classes() -> Iterator[Any]:
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            found = getattr(package, name)
            if isinstance(found, type) and not issubclass(found, BaseException):
                yield pytest.param(package, found, id=f"{package.__name__}.{name}")


def run(runner: asyncio.Runner, source: str, names: dict[str, Any]) -> str:
    """Run one example, which may await something; return what it prints."""
    printed = io.StringIO()
    code = compile(source, "<example>", "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    with contextlib.redirect_stdout(printed):
        made: Any = types.FunctionType(code, names)()
        if inspect.iscoroutine(made):
            runner.run(made)
    return printed.getvalue()


@pytest.mark.parametrize(("package", "public"), list(public_classes()))
def test_example_prints_what_it_says(
    package: types.ModuleType,
    public: type,
    own_server: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PHONON_URL", own_server.url)
    examples = doctest.DocTestParser().get_examples(public.__doc__ or "")
    assert examples, f"{public.__name__} has no example in its docstring"
    # Classes of examples are known by this name; `__main__` would be refused.
    module = types.ModuleType(f"{package.__name__}.{public.__name__}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names: dict[str, Any] = {"__name__": module.__name__, "json": json}
    names |= {name: getattr(phonon, name) for name in phonon.__all__}
    names |= {name: getattr(phonon.aio, name) for name in phonon.aio.__all__}
    names |= {name: getattr(phonon.fields, name) for name in phonon.fields.__all__}
    checker = doctest.OutputChecker()
    with asyncio.Runner() as runner:
        is_async = package is phonon.aio
        process: Any = phonon.aio.AsyncProcess() if is_async else phonon.Process()
        if is_async:
            runner.run(process.start())
        names["process"] = process
        try:
            for example in examples:
                got = run(runner, example.source, names)
                flags = doctest.ELLIPSIS
                assert checker.check_output(example.want, got, flags), checker.output_difference(
                    example, got, flags
                )
        finally:
            stopping = process.stop()
            if is_async:
                runner.run(stopping)
