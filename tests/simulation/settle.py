"""The dust settles: everything goes on without disturbance, until nothing is left to do."""

from phonon._core.flows import FLUSH, AwaitMail, Execute, Read, Sleep, Wait
from phonon._protocol.lane import State
from simulation.checks import stays
from simulation.process import LEASE_US, Idle, Point, SimFlow, SimProcess
from simulation.world import Setup, World

#: Longer than all that the core waits for: a lease, the sweep, a sweep's patience, and a beat each.
ENOUGH_US = 4 * LEASE_US
WEEK_US = 604_800_000_000
_MOST_MOVES = 20_000


def run_out(world: World, only: str = "") -> None:
    """Make all moves that need no time, of one process if it is named."""
    budget = _MOST_MOVES
    while _round(world, only):
        budget -= 1
        if not budget:
            world.checks.fail("G8: it does not come to an end")


def _round(world: World, only: str) -> bool:
    moved = False
    for p in list(world.processes.values()):
        if not p.alive or (only and p.name != only):
            continue
        for partition, lane in enumerate(p.identity.lanes):
            if p.alive and lane.has_work and lane.state is not State.FENCED:
                moved = world.do(("call", p.name, partition, "ok")) or moved
        if p.replies:
            moved = world.do(("reply", p.name)) or moved
        for task in list(p.tasks.values()):
            if p.alive and not task.ended:
                moved = _go(world, p, task) or moved
        if any(isinstance(t.effect, AwaitMail) for t in p.tasks.values()):
            for partition in range(world.count):
                moved = world.do(("mail", p.name, partition, "ok")) or moved
    return moved


def _go(world: World, p: SimProcess, task: SimFlow) -> bool:
    name, effect = task.name, task.effect
    if task.detached:
        return False
    if task.is_ready or isinstance(effect, Read | Point | Sleep) or effect is FLUSH:
        return world.do(("go", p.name, name, "ok"))
    if isinstance(effect, Execute):
        moved = False
        for index in range(len(effect.jobs)):
            moved = world.do(("exec", p.name, name, index, "ok")) or moved
        return moved
    if isinstance(effect, Wait | AwaitMail) and world.server.now >= task.deadline:
        return world.do(("go", p.name, name, "ok"))
    return False


def settle(world: World, micros: int) -> None:
    """Let so much time pass, with all that happens in it."""
    till = world.server.now + micros
    while True:
        run_out(world)
        deadlines = [
            task.deadline
            for p in world.processes.values()
            if p.alive
            for task in p.tasks.values()
            if isinstance(task.effect, Wait | AwaitMail) and not task.ready
        ]
        soonest = min([till, *(d for d in deadlines if d > world.server.now)])
        if soonest <= world.server.now or world.server.now >= till:
            return
        world.server.pass_time(soonest - world.server.now)


def unfinished(p: SimProcess) -> list[str]:
    """Return what a process has not brought to its end."""
    found = []
    for task in p.tasks.values():
        rests = isinstance(task.effect, Idle | Wait) and not task.ready
        if not rests:
            found.append(repr(task))
    outbox = p.engine.outbox
    if outbox.has_work or outbox._due:
        found.append(f"outbox: {outbox.unsent} {outbox.unended} {outbox.detached} {outbox._due}")
    if p.identity.suspected:
        found.append("a rebirth is due")
    if p.engine.takeover._dead or p.engine.takeover.former:
        found.append(f"takeover: {p.engine.takeover._dead} {p.engine.takeover.former}")
    batches = [key for workload in p.engine.executor.workloads for key in workload.batches]
    if batches:
        found.append(f"executor: {batches}")
    return found


def finish(world: World) -> None:
    """Let the dust settle, stop everybody, and see that nothing is lost, doubled or left."""
    world.do(("forward",))
    settle(world, ENOUGH_US)
    for _ in range(6):
        if not any(unfinished(p) for p in world.processes.values() if p.alive):
            break
        settle(world, LEASE_US)
    _calm(world)
    for p in list(world.processes.values()):
        if p.alive:
            world.do(("stop", p.name))
            settle(world, 1_000_000)
    settle(world, LEASE_US)
    stuck = {p.name: unfinished(p) for p in world.processes.values() if p.alive}
    if stuck:
        world.checks.fail(f"G8: {stuck} cannot stop")
    clean_up(world, "yy")
    world.checks.ended_well()
    for key in list(world.kept):
        before = world.seen["calls carried out"]
        world.do(("dup", key))
        if world.seen["calls carried out"] != before:
            world.checks.fail(f"G4: {key} was carried out after everybody had stopped")
    clean_up(world, "zz")
    world.checks.ended_well()
    world.server.pass_time(WEEK_US + 1_000_000)
    left = [k for k, _, _ in world.server.look() if not stays(k)]
    if left:
        world.checks.fail(f"G11: {left} stays for ever")


def _calm(world: World) -> None:
    """Nothing happens any more: what must be true now."""
    state = world.checks.check()
    living = [p for p in world.processes.values() if p.alive]
    for p in living:
        if rest := unfinished(p):
            world.checks.fail(f"G8: {p.name} does not come to an end: {rest}")
    if not living:
        return
    for resource in world.resources:
        want = {p.identity.id for p in living if resource in p.held}
        have = set(state.members[resource])
        if want != have:
            world.checks.fail(f"G1/G8: {want} hold {resource}, and {have} are counted")
        owner = state.running.get(resource, {}).get(b"owner")
        able = any(p.recovers and world.class_of(resource) in p.knows for p in living)
        if (
            able
            and (owner or (state.partials[resource] and not have))
            and resource not in state.parties
        ):
            world.checks.fail(f"G8: {resource} is left to nobody: {state.running.get(resource)}")
        holders = [*state.lock[resource], *state.queue[resource]]
        if holders:
            world.checks.fail(f"G8/G13: {holders} have {resource}, and nobody uses it")


def deliver_all(world: World, name: str) -> None:
    """Deliver all messages again that were ever delivered: what is stored is passed over."""
    broker = world.broker
    for _ in range(3 if broker.produced else 0):
        world.do(("user", name, "user0", "consume", broker.produced, broker.produced, 5))
        settle(world, 1_000_000)
    numbers = tuple(range(broker.queued))
    for n in range(0, len(numbers), 5):
        world.do(("user", name, "user0", "take", numbers[n : n + 5], 2))
        settle(world, 1_000_000)


def clean_up(world: World, name: str) -> None:
    """A process starts, takes over what is left, replays what is parked, and stops."""
    world.do(("start", *Setup(name, users=1)))
    p = world.processes[name]
    settle(world, ENOUGH_US)
    deliver_all(world, name)
    state = world.checks.state()
    for resource, parked in state.dead.items():
        for token, items in parked.items():
            applied = [i for some in world.checks.applied[resource].values() for i in some]
            # A batch that committed before it failed must not be executed under another token.
            discard = any(item in applied for item in items)
            if discard:
                world.checks.dropped.update(items)
            settle(world, 1_000_000)
            world.do(("user", name, "user0", "replay", resource, token, discard))
            settle(world, 2_000_000)
    world.do(("stop", name))
    settle(world, 2_000_000)
    if p.alive:
        world.checks.fail(f"G8: {name} cannot stop: {unfinished(p)}")
