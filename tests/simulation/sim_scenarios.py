"""The scenarios whose interleavings are all explored."""

from collections.abc import Generator
from typing import Any

from sim_explorer import Scenario, Script
from sim_world import CANCELLED, DEAF, RAISES, SimProcess

from phonon.protocol import heirs

Steps = Generator[Any, Any, None]


def stores(p: SimProcess) -> Steps:
    yield from p.append(p.world.base("x"))


def leaves(p: SimProcess) -> Steps:
    yield from p.leave(p.world.base("x"))


def stores_and_leaves(p: SimProcess) -> Steps:
    yield from p.append(p.world.base("x"))
    yield from p.leave(p.world.base("x"))


def compacts(p: SimProcess) -> Steps:
    yield from p.compact(p.world.base("x"))


def stores_twice_and_leaves(p: SimProcess) -> Steps:
    yield from stores(p)
    yield from stores_and_leaves(p)


def stores_and_leaves_twice(p: SimProcess) -> Steps:
    """What the second session stores may come behind what is due."""
    yield from stores_twice_and_leaves(p)
    yield from stores_twice_and_leaves(p)


def leaves_with_data(p: SimProcess) -> Steps:
    """Its data goes to the server with the leave."""
    yield from p.join(p.world.base("x"))
    p.add(p.world.base("x"))
    yield from p.leave(p.world.base("x"))


def comes_and_goes(p: SimProcess) -> Steps:
    yield from p.join(p.world.base("x"))
    yield from p.leave(p.world.base("x"))


def locks(p: SimProcess) -> Steps:
    yield from p.lock(p.world.base("x"))


def reads(p: SimProcess) -> Steps:
    yield from p.lock(p.world.base("x"), shared=True)


def waits_in_vain(p: SimProcess) -> Steps:
    yield from p.lock(p.world.base("x"), patient=False)


def takes_a_place(p: SimProcess) -> Steps:
    yield from p.lock(p.world.keys.semaphore("x"), shared=True, places=2)


def meets_and_leaves(p: SimProcess) -> Steps:
    yield from p.meet(p.world.base("x"), 2)
    yield from p.leave(p.world.base("x"))


def expects_a_batch(p: SimProcess) -> Steps:
    """As if the heir of class L had had one of this resource before."""
    yield from heirs.inherit(p.me, p.world.base("x"), heirs.heir("L"))


def works_off(p: SimProcess) -> Steps:
    yield from p.take_over_one("class:L")


def watches(_: SimProcess) -> Steps:
    """Does nothing but take over."""
    return
    yield


def _each(script: Script, names: str) -> dict[str, Script]:
    return dict.fromkeys(names, script)


#: By name. All their interleavings are explored, as on one server and as in a cluster.
SCENARIOS = {
    "two leavers with partials": Scenario(_each(stores_and_leaves, "ab"), kinds=(DEAF,)),
    "three leavers": Scenario(_each(leaves_with_data, "abc"), faults=0),
    "leaver and newcomer": Scenario(
        {"a": leaves, "b": stores_and_leaves},
        before=(("a", stores),),
        kinds=(DEAF, RAISES),
    ),
    "leaver and newcomer, two faults": Scenario(
        {"a": leaves, "b": stores_and_leaves},
        before=(("a", stores),),
        kinds=(DEAF, RAISES),
        faults=2,
    ),
    "executor dies, newcomer": Scenario(
        {"b": stores_and_leaves},
        before=(("a", stores_and_leaves),),
        kinds=("kill",),
        victims=("a",),
    ),
    "executor dies, two survivors": Scenario(
        {"b": watches, "c": watches},
        before=(("a", stores_and_leaves),),
        kinds=("kill",),
        victims=("a",),
    ),
    "a zombie completes": Scenario(
        {"b": watches},
        before=(("a", stores_and_leaves),),
        kinds=("pause",),
        victims=("a",),
    ),
    "a member dies": Scenario(
        {"a": stores, "b": leaves},
        before=(("b", stores),),
        kinds=("kill",),
        victims=("a",),
    ),
    "a member is paused": Scenario(
        {"a": stores, "b": watches},
        kinds=("pause",),
        victims=("a",),
    ),
    "the last member dies": Scenario(
        {"a": stores_and_leaves, "b": watches},
        kinds=("kill",),
        victims=("a",),
    ),
    "lock holder has died": Scenario({"b": locks}, before=(("a", locks),), dead="a", faults=0),
    "lock holder is paused": Scenario(
        {"b": watches}, before=(("a", locks),), kinds=("pause",), victims=("a",)
    ),
    "three want a lock": Scenario(_each(locks, "abc"), faults=0),
    "two want a lock, an answer is lost": Scenario(_each(locks, "ab"), kinds=(DEAF,)),
    "a waiter gives up": Scenario({"b": waits_in_vain, "c": locks}, (("a", locks),), faults=0),
    "two want a lock, one is cancelled": Scenario(_each(locks, "ab"), kinds=(CANCELLED,)),
    "a member is cancelled": Scenario(
        {"a": leaves_with_data, "b": stores_and_leaves}, kinds=(CANCELLED,), faults=2
    ),
    "compaction is cancelled": Scenario(
        {"a": compacts, "b": leaves},
        before=(("a", stores), ("b", stores)),
        kinds=(CANCELLED,),
    ),
    "two readers and a writer": Scenario(
        {"b": locks, "c": reads}, before=(("a", reads),), faults=0
    ),
    "three want two places": Scenario(
        _each(takes_a_place, "bc"), before=(("a", takes_a_place),), faults=0
    ),
    "two parties": Scenario(_each(meets_and_leaves, "ab"), kinds=(DEAF,)),
    "one of two parties dies": Scenario(
        _each(meets_and_leaves, "ab"), kinds=("kill",), victims=("a",)
    ),
    "recovery dies": Scenario(
        {"b": watches, "c": watches},
        before=(("a", stores_and_leaves),),
        dead="a",
        kinds=("kill",),
        victims=("b",),
    ),
    "compaction and leavers": Scenario(
        {"a": compacts, "b": leaves},
        before=(("a", stores), ("b", stores)),
        kinds=(DEAF, RAISES),
    ),
    "compaction by the last leaver, and a newcomer": Scenario(
        {"a": leaves, "b": compacts, "c": stores_and_leaves},
        before=(("a", stores), ("a", stores)),
        faults=0,
    ),
    "two compact": Scenario(
        _each(compacts, "ab"),
        before=(("a", stores), ("a", stores), ("b", stores)),
        kinds=(DEAF, RAISES),
    ),
    "compaction while a batch runs": Scenario(
        {"b": stores_twice_and_leaves, "c": compacts},
        before=(("a", stores_and_leaves),),
        faults=0,
    ),
    "compaction and a death": Scenario(
        {"b": compacts, "c": watches},
        before=(("a", stores), ("a", stores)),
        kinds=("kill",),
        victims=("a",),
    ),
    "compaction by a member that dies": Scenario(
        {"a": compacts, "b": watches},
        before=(("a", stores), ("a", stores)),
        kinds=("kill", "pause"),
        victims=("a",),
    ),
    "compaction of two classes, one of them unknown": Scenario(
        {"a": compacts, "c": stores_and_leaves},
        before=(("c", stores), ("a", stores), ("c", stores), ("a", stores), ("a", leaves)),
        labels={"a": ("K", ("K",)), "c": ("L", ("K", "L"))},
        kinds=(DEAF,),
    ),
    "a batch of an unknown class": Scenario(
        {"b": leaves, "c": watches},
        before=(("a", stores), ("b", stores), ("a", leaves)),
        labels={"a": ("L", ("K",)), "b": ("K", ("K",)), "c": ("L", ("K", "L"))},
        kinds=("kill",),
        victims=("b",),
    ),
    "a batch is left to an heir that is being worked off": Scenario(
        {"b": leaves, "c": works_off},
        before=(("a", stores), ("b", stores), ("a", leaves), ("c", expects_a_batch)),
        labels={"a": ("L", ("K",)), "b": ("K", ("K",)), "c": ("L", ("K", "L"))},
        faults=0,
    ),
}

#: Larger ones: some of their interleavings, and all of them if one asks for that.
LARGE = {
    "a waiter is cancelled": Scenario(
        {"b": locks, "c": locks}, before=(("a", locks),), kinds=(CANCELLED,)
    ),
    "a reader or a writer is cancelled": Scenario(
        {"b": locks, "c": reads}, before=(("a", reads),), kinds=(CANCELLED,)
    ),
    "compaction while a batch runs, two sessions later": Scenario(
        {"b": stores_and_leaves_twice, "c": compacts},
        before=(("a", stores_and_leaves),),
        kinds=(DEAF, RAISES),
    ),
    "compaction and a death or a pause": Scenario(
        {"b": compacts, "c": watches},
        before=(("a", stores), ("a", stores)),
        kinds=("kill", "pause"),
        victims=("a", "b"),
    ),
    "an answer is lost, then a pause": Scenario(
        {"a": leaves, "b": watches},
        before=(("a", stores),),
        kinds=("pause", DEAF),
        victims=("a",),
        faults=2,
    ),
    "executor and newcomer, any fault": Scenario(
        {"b": stores_and_leaves},
        before=(("a", stores_and_leaves),),
        kinds=("kill", "pause", DEAF, RAISES),
        victims=("a", "b"),
    ),
    "a zombie completes, and beats": Scenario(
        {"b": watches},
        before=(("a", stores_and_leaves),),
        kinds=("pause",),
        victims=("a",),
        beats=True,
    ),
    "a zombie completes, others come and go": Scenario(
        {"b": comes_and_goes},
        before=(("a", stores_and_leaves),),
        kinds=("pause",),
        victims=("a",),
        beats=True,
    ),
    "a member dies or is paused": Scenario(
        {"a": stores, "b": stores_and_leaves},
        kinds=("kill", "pause"),
        victims=("a",),
    ),
    "lock holder dies": Scenario(
        {"b": locks}, before=(("a", locks),), kinds=("kill",), victims=("a",)
    ),
    "lock holder has died, two want it": Scenario(
        _each(locks, "bc"), before=(("a", locks),), dead="a", faults=0
    ),
    "a writer, two readers": Scenario(_each(reads, "bc"), before=(("a", locks),), faults=0),
    "a reader dies, a writer waits": Scenario(
        {"b": locks, "c": reads}, before=(("a", reads),), kinds=("kill", "pause"), victims=("a",)
    ),
    "one of three who want two places dies": Scenario(
        _each(takes_a_place, "bc"),
        before=(("a", takes_a_place),),
        kinds=("kill", "pause", DEAF),
        victims=("a", "b"),
    ),
    "readers and writers, an answer is lost": Scenario(
        {"a": reads, "b": locks, "c": reads}, kinds=(DEAF,)
    ),
    "a waiter gives up or dies": Scenario(
        {"b": waits_in_vain, "c": locks},
        before=(("a", locks),),
        kinds=("kill", "pause", DEAF),
        victims=("b",),
    ),
    "a third party dies or is paused": Scenario(
        _each(meets_and_leaves, "abc"), kinds=("kill", "pause"), victims=("c",)
    ),
    "lock holder is paused, another one waits": Scenario(
        {"b": locks}, before=(("a", locks),), kinds=("pause",), victims=("a",)
    ),
    "lock holder or waiter dies or is paused": Scenario(
        _each(locks, "ab"), kinds=("kill", "pause"), victims=("a",)
    ),
    "recovery is paused": Scenario(
        {"b": watches, "c": watches},
        before=(("a", stores_and_leaves),),
        dead="a",
        kinds=("pause",),
        victims=("b",),
    ),
    "recovery dies or is paused": Scenario(
        {"b": watches, "c": watches},
        before=(("a", stores_and_leaves),),
        kinds=("kill", "pause"),
        victims=("a", "b"),
        faults=2,
    ),
    "an unknown class, death or pause": Scenario(
        {"b": leaves, "c": watches},
        before=(("a", stores), ("b", stores), ("a", leaves)),
        labels={"a": ("L", ("K",)), "b": ("K", ("K",)), "c": ("L", ("K", "L"))},
        kinds=("kill", "pause"),
        victims=("b",),
    ),
    "a batch is left to an heir that is being worked off, and one dies": Scenario(
        {"b": leaves, "c": works_off},
        before=(("a", stores), ("b", stores), ("a", leaves), ("c", expects_a_batch)),
        labels={"a": ("L", ("K",)), "b": ("K", ("K",)), "c": ("L", ("K", "L"))},
        kinds=("kill",),
        victims=("b", "c"),
    ),
}
