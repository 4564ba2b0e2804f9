"""Resources whose answers are under way: a batch of one of them may come with its answer."""

import threading
from collections.abc import Iterable, Sequence


class Expectation:
    """One flow's, which it makes before it sends, and ends in a ``finally``.

    Attributes:
        over: Whether it has ended. To set it is one step that no signal handler comes between: a
            resource that is expected for ever would never be executed again.
    """

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = False


class Expected:
    """The expectations of all flows of a process, by the server's name of the resource.

    An answer may lie in one of them, unseen, while others of the same `Send` are still to come: its
    batch is no forgotten one.
    """

    def __init__(self) -> None:
        self._by_name: dict[bytes, Sequence[Expectation]] = {}
        # Never held across I/O. A call in the middle of a call of the same thread may come in.
        self._lock = threading.RLock()

    def __contains__(self, name: bytes) -> bool:
        here = self._by_name.get(name)
        return here is not None and not all([one.over for one in here])  # noqa: C419 - it is faster

    def add(self, expectation: Expectation, names: Iterable[bytes]) -> None:
        """Expect a batch of these resources."""
        alone = (expectation,)
        by_name = self._by_name
        with self._lock:
            for name in names:
                here = by_name.get(name)
                if here is None:
                    by_name[name] = alone
                else:
                    by_name[name] = (*[one for one in here if not one.over], expectation)

    def remove(self, names: Iterable[bytes]) -> None:
        """Forget the expectations of these resources that are over."""
        by_name = self._by_name
        with self._lock:
            for name in names:
                left = [one for one in by_name.get(name, ()) if not one.over]
                if left:
                    by_name[name] = left
                else:
                    by_name.pop(name, None)
