"""Short scripts of two or three processes, in all orders in which their calls can reach the server.

After each call all keys are compared with the model and the guarantees are checked, as in random
schedules; at the end of each order everything is executed and nothing is left.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from phonon._protocol.operations import Operation
from steps.lab import Lab, Proc, lab_fixture  # noqa: F401 - the fixture is found by its name
from steps.world import World, fresh
from support import operations as ops

#: What a process does next, as soon as it is its turn; None if there is nothing to do any more.
Step = Callable[[World, Proc], Operation | None]


def append(world: World, _: Proc) -> Operation:
    return ops.append(0, b"x", world.payload())


def leave(world: World, _: Proc) -> Operation:
    return ops.leave(0, b"x")


def leave_with(world: World, _: Proc) -> Operation:
    return ops.leave(0, b"x", world.payload())


def force(world: World, _: Proc) -> Operation:
    return ops.leave(0, b"x", world.payload(), ops.FORCE | ops.MODIFICATIONS)


def join(world: World, _: Proc) -> Operation:
    return ops.join(0, b"x")


def meet(world: World, process: Proc) -> Operation:
    return ops.meet(0, b"x", 2, process.id)


def complete(world: World, process: Proc) -> Operation | None:
    batch = world.model.at(b"x").batch
    return ops.complete(0, b"x", batch.token) if batch and batch.owner == process.id else None


def park(world: World, process: Proc) -> Operation | None:
    batch = world.model.at(b"x").batch
    return ops.fail(0, b"x", batch.token, b"e", 1, 1) if batch else None


def replay(world: World, process: Proc) -> Operation:
    return ops.replay(0, b"x", min(world.model.at(b"x").parked, default=1))


def lock(world: World, process: Proc) -> Operation:
    holder = f"{process.id.decode()}/1"
    return ops.lock(0, b"x", holder, queue=True, thread="main")


def share(world: World, process: Proc) -> Operation:
    holder = f"{process.id.decode()}/1s"
    return ops.lock(0, b"x", holder, queue=True, thread="main")


def unlock(world: World, process: Proc) -> Operation:
    return ops.unlock(0, b"x", f"{process.id.decode()}/1")


def unshare(world: World, process: Proc) -> Operation:
    return ops.unlock(0, b"x", f"{process.id.decode()}/1s")


def kill_first(world: World, process: Proc) -> Operation | None:
    """Reap the first process, which is dead from now on; what it still sends is refused."""
    dead = world.processes[0]
    if dead.id in world.model.fenced or dead is process:
        return None
    world.former.append(dead)
    return ops.reap(0, dead.id, 100, recovers=True)


def wait(world: World, _: Proc) -> None:
    world.lab.advance(250)


SCENARIOS: dict[str, list[list[Step]]] = {
    "append, leave": [[append, leave], [append, leave], [append, leave]],
    "leave, complete, leave": [
        [leave_with, complete, leave_with, complete],
        [leave_with, complete, leave_with, complete],
    ],
    "the only one leaves beside one that comes": [[join, leave_with, complete], [append, leave]],
    "by force": [[append, leave, complete], [force, complete, force]],
    "parties": [[meet, leave], [meet, leave_with, complete], [join, leave]],
    "lock, unlock": [[lock, lock, unlock], [lock, lock, unlock], [wait, lock]],
    "readers and a writer": [[lock, lock, unlock], [share, share, unshare], [share, unshare]],
    "reap beside leave": [[append, leave_with, complete], [append, leave, complete], [kill_first]],
    "reap beside lock": [[lock, append, unlock], [lock, lock, unlock], [kill_first]],
    "reap of parties": [[meet, leave], [meet, leave], [kill_first]],
    "park and replay": [[leave_with, park, replay], [leave_with, replay, complete]],
}


def interleavings(lengths: list[int]) -> Iterator[list[int]]:
    """All orders in which so many steps of each can be done."""
    if not any(lengths):
        yield []
    for who, length in enumerate(lengths):
        if length:
            rest = [n - (i == who) for i, n in enumerate(lengths)]
            for order in interleavings(rest):
                yield [who, *order]


def different(scripts: list[list[Step]]) -> Iterator[list[int]]:
    """All orders, but for those in which two processes with the same script change places."""
    pairs = itertools.combinations(range(len(scripts)), 2)
    twins = [(a, b) for a, b in pairs if scripts[a] == scripts[b] and [kill_first] not in scripts]
    for order in interleavings([len(script) for script in scripts]):
        if all(order.index(a) < order.index(b) for a, b in twins):
            yield order


def play(lab: Lab, scripts: list[list[Step]], order: list[int]) -> None:
    fresh(lab)
    world = World(lab, len(scripts))
    turns = [iter(script) for script in scripts]
    for who in order:
        process = world.processes[who]
        step: Any = next(turns[who])
        if process.id in world.model.fenced:
            world.zombie(process)
            continue
        operation = step(world, process)
        if operation is not None:
            world.call(process, [operation], "answered")
    for dead in world.former:  # it has a new identity by now
        world.processes[world.processes.index(dead)] = world.be_born()
    world.drain()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_orders(lab: Lab, name: str) -> None:
    scripts = SCENARIOS[name]
    orders = list(different(scripts))
    for order in orders:
        try:
            play(lab, scripts, order)
        except AssertionError as violation:
            violation.add_note(f"in the order {order}")
            raise
    assert len(orders) >= 10
