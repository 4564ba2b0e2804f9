"""Imports point downwards only, and the documentation shows them as they are."""

from support import imports


def test_no_import_runs_upwards() -> None:
    assert imports.upwards(imports.graph()) == []


def test_no_modules_import_each_other() -> None:
    assert imports.circles(imports.graph()) == []


def test_the_documentation_shows_the_tree_as_it_is() -> None:
    shown = imports.PAGE.read_text(encoding="utf-8")
    drawn = imports.page_with(imports.draw(imports.graph()))
    assert shown == drawn, "run: make imports ARGS=--write"


def test_what_would_be_wrong_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert imports.circles(edges) == [["b", "c"]]
    edges = {"phonon._core.outbox": {"phonon._transport.server"}}
    assert imports.upwards(edges) == ["phonon._core.outbox imports phonon._transport.server"]
    edges = {"phonon._transport.server": {"phonon._core.outbox", "phonon._core.flows"}}
    assert imports.upwards(edges) == ["phonon._transport.server imports phonon._core.outbox"]
    edges = {"phonon.process": {"phonon.admin"}, "phonon.lock": {"phonon.web.server"}}
    assert imports.upwards(edges) == ["phonon.lock imports phonon.web.server"]
