"""Each test of sources begins with nothing counted."""

from collections.abc import Iterator

import pytest

from support.counted import Count
from support.world import Redis


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.executed.clear()


@pytest.fixture
def own_server() -> Iterator[Redis]:
    """A server of its own, for a test that fills it or makes it a replica."""
    server = Redis()
    yield server
    server.close()
