"""A call for every kind of answer that the steps' headers promise, up to where it is sent."""

import re
from collections.abc import Callable
from typing import Any

from steps import LEASE, Lab, Process

from phonon.protocol.compaction import digest
from phonon.protocol.library import text

#: Who calls, which step, and its arguments after the operation number.
Ready = tuple[Process, str, tuple[Any, ...]]
Make = Callable[..., Process]


def documented() -> set[str]:
    """Step and kind of every answer that the Lua files' headers name."""
    found = set()
    for header, step in re.findall(r"((?:^--.*\n)+)step\('(\w+)'", text(), re.MULTILINE):
        kinds = re.findall(r"\{\s*'(\w+)'", header.partition("answers")[2])
        assert kinds, f"the header of {step} names no answers"
        found |= {f"{step} {kind}" for kind in kinds}
    return found


def joined(p: Make) -> Ready:
    p("b").join()
    return p("a"), "join", (LEASE, b"b", 3)


def counted(p: Make) -> Ready:
    return p("a"), "modify", (LEASE, 2)


def met(p: Make) -> Ready:
    p("b").meet(2)
    return p("a"), "meet", (LEASE, 3)


def stored(p: Make) -> Ready:
    p("b").append(b"1")
    return p("a"), "append", (LEASE, b"2")


def stored_when_there_are_many(p: Make) -> Ready:
    a = p("a")
    for i in range(63):
        a.append(b"%d" % i)
    return a, "append", (LEASE, b"63")


def compacted(p: Make) -> Ready:
    a = p("a")
    for partial in (b"1", b"2", b"3", b"4"):
        a.append(partial)
    return p("b"), "compact", (1, 2, digest([b"2", b"3"]), b"2+3")


def compacted_although_due(p: Make) -> Ready:
    p("b").batch(b"1")
    a = p("a")
    a.append(b"2")
    a.leave(b"3")
    a.append(b"4")
    return a, "compact", (0, 2, digest([b"2", b"3"]), b"2+3")


def changed(p: Make) -> Ready:
    a = p("a")
    a.append(b"1")
    return a, "compact", (0, 2, digest([b"1", b"2"]), b"1+2")


def leave_held(p: Make) -> Ready:
    p("b").append(b"1")
    a = p("a")
    a.append(b"2")
    return a, "leave", (0, LEASE, b"")


def leave_held_with_a_partial(p: Make) -> Ready:
    p("b").append(b"1")
    return p("a"), "leave", (0, LEASE, b"2")


def leave_held_when_there_are_many(p: Make) -> Ready:
    a, _, (lease, partial) = stored_when_there_are_many(p)
    p("b").join()
    return a, "leave", (0, lease, partial)


def leave_deferred_when_there_are_many(p: Make) -> Ready:
    p("b").batch(b"1")
    a, _, (lease, partial) = stored_when_there_are_many(p)
    return a, "leave", (0, lease, partial)


def leave_last(p: Make) -> Ready:
    a = p("a")
    a.modify()
    return a, "leave", (0, LEASE, b"")


def leave_deferred(p: Make) -> Ready:
    p("b").batch(b"1")
    a = p("a")
    a.append(b"2")
    return a, "leave", (0, LEASE, b"3")


def leave_run(p: Make) -> Ready:
    a = p("a")
    a.append(b"1")
    return a, "leave", (0, LEASE, b"")


def leave_run_with_a_partial(p: Make) -> Ready:
    return p("a"), "leave", (0, LEASE, b"1")


def leave_run_alone(p: Make) -> Ready:
    a = p("a")
    a.join()
    return a, "leave", (0, LEASE, b"1")


def leave_run_by_force(p: Make) -> Ready:
    p("b").append(b"1")
    return p("a"), "leave", (1, LEASE, b"2")


def complete_done(p: Make) -> Ready:
    a = p("a")
    return a, "complete", (a.batch(),)


def complete_lost(p: Make) -> Ready:
    return p("a"), "complete", (p("b").batch(),)


def complete_again(p: Make) -> Ready:
    a = p("a")
    token = a.batch(b"1")
    p("b").leave(b"2")
    p("c").append(b"3")
    return a, "complete", (token,)


def fail_retry(p: Make) -> Ready:
    a = p("a")
    return a, "fail", (a.batch(), "boom", 500, 2)


def fail_parked(p: Make) -> Ready:
    a = p("a")
    return a, "fail", (a.batch(), "boom", 500, 1)


def fail_lost(p: Make) -> Ready:
    return p("a"), "fail", (p("b").batch(), "boom", 500, 1)


def fail_again(p: Make) -> Ready:
    a, _, (token,) = complete_again(p)
    return a, "fail", (token, "boom", 500, 1)


def resume_run(p: Make) -> Ready:
    a = p("a")
    token = a.batch()
    a.fail(token)
    return a, "resume", (token,)


def resume_lost(p: Make) -> Ready:
    return p("a"), "resume", (p("b").batch(),)


def lock_granted(p: Make) -> Ready:
    return p("a"), "lock", (b"a/1", LEASE, 1, b"main")


def lock_granted_to_a_waiter(p: Make) -> Ready:
    b = p("b")
    b.lock()
    a = p("a")
    a.lock(queue=True)
    b.unlock()
    return a, "lock", (b"a/1", LEASE, 1, b"main")


def lock_wait(p: Make) -> Ready:
    p("b").lock()
    return p("a"), "lock", (b"a/1", LEASE, 1, b"main")


def lock_busy(p: Make) -> Ready:
    p("b").lock()
    return p("a"), "lock", (b"a/1", LEASE, 0, b"main")


def lock_granted_shared(p: Make) -> Ready:
    p("b").lock("1s")
    return p("a"), "lock", (b"a/1s", LEASE, 1, b"main")


def unlock_released_shared(p: Make) -> Ready:
    a = p("a")
    a.lock("1s")
    p("b").lock(queue=True)
    return a, "unlock", (b"a/1s",)


def unlock_released(p: Make) -> Ready:
    a = p("a")
    a.lock()
    p("b").lock(queue=True)
    return a, "unlock", (b"a/1",)


def unlock_lost(p: Make) -> Ready:
    p("b").lock()
    a = p("a")
    a.lock(queue=True)
    return a, "unlock", (b"a/1",)


def recover_run(p: Make) -> Ready:
    a = p("a")
    a.append(b"1")
    return p("b"), "recover", _dead(a)


def recover_run_its_batch(p: Make) -> Ready:
    a = p("a")
    a.batch(b"1")
    return p("b"), "recover", _dead(a)


def recover_later(p: Make) -> Ready:
    a = p("a")
    a.fail(a.batch(), delay=60_000)
    return p("b"), "recover", _dead(a)


def recover_free(p: Make) -> Ready:
    a, b = p("a"), p("b")
    a.append(b"1")
    a.lock()
    b.join()
    b.lock(queue=True)
    return b, "recover", _dead(a)


def _dead(process: Process) -> tuple[Any, ...]:
    registry = (process.registry,) if process.colocated else ()
    return (process.id, 1, LEASE, *registry)


def entrusted(p: Make) -> Ready:
    heir = p("class:C")
    heir.enter()
    a = p("a")
    return a, "entrust", (a.batch(), heir.id)


def entrust_lost(p: Make) -> Ready:
    return p("a"), "entrust", (p("b").batch(), b"class:C")


def _parked(p: Make) -> int:
    a = p("a")
    token = a.batch()
    a.fail(token, most=1)
    return token


def replay_run(p: Make) -> Ready:
    return p("b"), "replay", (_parked(p),)


def replay_busy(p: Make) -> Ready:
    token = _parked(p)
    p("a").batch()
    return p("b"), "replay", (token,)


def replay_missing(p: Make) -> Ready:
    return p("b"), "replay", (_parked(p) + 1,)


def discarded(p: Make) -> Ready:
    return p("b"), "discard", (_parked(p),)


def discard_missing(p: Make) -> Ready:
    return p("b"), "discard", (_parked(p) + 1,)


#: By "step kind", and what is special.
SCENARIOS: dict[str, Callable[[Make], Ready]] = {
    "join joined": joined,
    "modify counted": counted,
    "meet met": met,
    "append stored": stored,
    "append stored (and there are many)": stored_when_there_are_many,
    "compact compacted": compacted,
    "compact compacted (due ones)": compacted_although_due,
    "compact changed": changed,
    "leave held": leave_held,
    "leave held (with a partial)": leave_held_with_a_partial,
    "leave held (and there are many)": leave_held_when_there_are_many,
    "leave deferred (and there are many)": leave_deferred_when_there_are_many,
    "leave last": leave_last,
    "leave deferred": leave_deferred,
    "leave run": leave_run,
    "leave run (with a partial)": leave_run_with_a_partial,
    "leave run (alone)": leave_run_alone,
    "leave run (by force)": leave_run_by_force,
    "complete done": complete_done,
    "complete lost": complete_lost,
    "complete again": complete_again,
    "fail retry": fail_retry,
    "fail parked": fail_parked,
    "fail lost": fail_lost,
    "fail again": fail_again,
    "resume run": resume_run,
    "resume lost": resume_lost,
    "lock granted": lock_granted,
    "lock granted (to a waiter)": lock_granted_to_a_waiter,
    "lock granted (shared)": lock_granted_shared,
    "lock wait": lock_wait,
    "lock busy": lock_busy,
    "unlock released": unlock_released,
    "unlock released (shared)": unlock_released_shared,
    "unlock lost": unlock_lost,
    "recover run": recover_run,
    "recover run (its own batch)": recover_run_its_batch,
    "recover later": recover_later,
    "recover free": recover_free,
    "entrust entrusted": entrusted,
    "entrust lost": entrust_lost,
    "replay run": replay_run,
    "replay busy": replay_busy,
    "replay missing": replay_missing,
    "discard discarded": discarded,
    "discard missing": discard_missing,
}


def prepare(lab: Lab, name: str, resource: str = "x", *, colocated: bool = True) -> Ready:
    """Do what comes before the call."""
    made: dict[str, Process] = {}

    def process(name: str) -> Process:
        if name not in made:
            made[name] = lab.process(name, resource, colocated=colocated)
        return made[name]

    return SCENARIOS[name](process)
