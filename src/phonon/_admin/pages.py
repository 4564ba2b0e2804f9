"""Listings that are read page by page: a walk yields steps of the transport, and pages.

The caller of a walk asks for the next page, so a listing of a million entries is never in memory,
and no call to the server is long.
"""

from collections.abc import Generator
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from phonon._transport.steps import Step, Steps

T = TypeVar("T")


class Page(NamedTuple, Generic[T]):
    """Some entries of a listing."""

    entries: list[T]


#: Yields steps, is sent their results, and yields pages in between.
Walk: TypeAlias = Generator[Step | Page[T], Any, None]


def next_page(walk: Walk[T]) -> Steps[list[T] | None]:
    """Go on with a walk until it has a page.

    Returns:
        The page's entries; None at the end.
    """
    result: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = walk.send(result) if failure is None else walk.throw(failure)
        except StopIteration:
            return None
        if isinstance(step, Page):
            return step.entries
        result = failure = None
        try:
            result = yield step
        except GeneratorExit:
            walk.close()
            raise
        except BaseException as error:  # noqa: BLE001 - thrown into the walk, which may clean up
            failure = error
