"""Updates that do the wrong thing, to see that the audit notices. Workers import them by name."""

import itertools
import os
import random
import signal

from chaos.jobs import NumberedUpdate

_chance = random.SystemRandom()
_executed = itertools.count()
#: A worker that has executed so many sessions lives on, or the run would not end.
YOUNG = 150


class Dying(NumberedUpdate):
    """Its worker, if young, is killed when it has written, before it could report that."""

    def execute(self) -> None:
        super().execute()
        if next(_executed) < YOUNG and _chance.random() < 0.01:
            os.kill(os.getpid(), signal.SIGKILL)


class Forgetful(NumberedUpdate):
    """Merging loses what others have contributed, now and then."""

    def merge(self, other: NumberedUpdate) -> None:
        if _chance.random() < 0.9:
            super().merge(other)


class Torn(NumberedUpdate):
    """Merging counts a flight twice, under one number."""

    def merge(self, other: NumberedUpdate) -> None:
        super().merge(other)
        self.doc["flights"] += 1
