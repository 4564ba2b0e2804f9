"""Each test of sources begins with nothing counted."""

from collections.abc import Iterator

import pytest

from support.counted import Count


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.executed.clear()
