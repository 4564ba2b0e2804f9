"""Jobs that do the wrong thing, to see that the audit notices. Workers import them by name."""

import itertools
import os
import random
import signal
from dataclasses import dataclass
from typing import Any

from chaos.jobs import Job, Message, NumberedUpdate
from chaos.sink import Table
from phonon import Update

_chance = random.SystemRandom()
_executed = itertools.count()
#: A worker that has executed so many sessions lives on, or the run would not end.
YOUNG = 150


class UncheckedTable(Table):
    """Adds every batch, whether or not its token was there before."""

    @property
    def upsert(self) -> str:
        return super().upsert.partition(" WHERE excluded.token >")[0]


class DyingUpdate(NumberedUpdate):
    """Its worker, if young, is killed when it has written, before it could report that."""

    def execute(self) -> None:
        super().execute()
        if next(_executed) < YOUNG and _chance.random() < 0.01:
            os.kill(os.getpid(), signal.SIGKILL)


class ForgetfulUpdate(NumberedUpdate):
    """Merging loses the contributions of others now and then."""

    def merge(self, other: NumberedUpdate) -> None:
        if _chance.random() < 0.9:
            super().merge(other)


class TornUpdate(NumberedUpdate):
    """Merging counts a flight twice, under one number."""

    def merge(self, other: NumberedUpdate) -> None:
        super().merge(other)
        self.doc["flights"] += 1


@dataclass(frozen=True)
class Dying(Job):
    def update(self, process: Any, message: Message) -> Update:
        return DyingUpdate(process, message)


@dataclass(frozen=True)
class Careless(Dying):
    @property
    def table(self) -> Table:
        table = super().table
        return UncheckedTable(table.name, table.key, table.figures)


@dataclass(frozen=True)
class Forgetful(Job):
    def update(self, process: Any, message: Message) -> Update:
        return ForgetfulUpdate(process, message)


@dataclass(frozen=True)
class Torn(Job):
    def update(self, process: Any, message: Message) -> Update:
        return TornUpdate(process, message)
