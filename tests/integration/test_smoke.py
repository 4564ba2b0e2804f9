from collections.abc import Callable

from conftest import Make


def test_last_one_out(make: Make, keys: Callable[[], set[str]]) -> None:
    first, second = make(), make()
    a, b = first.create_reference("x"), second.create_reference("x")
    assert a.count() == 2
    assert not a.dereference()
    assert b.dereference()
    assert keys() == {"{=x}:memory"}
