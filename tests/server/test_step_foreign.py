"""A key of ours that holds something else: the step raises, or does not need that key. Either way
the key and everything else stay as they are; nothing is half done."""

import pytest
import redis
from scenarios import SCENARIOS, prepare
from steps import Key, Lab, lab_fixture, refused  # noqa: F401 - the fixture is found by its name

from phonon.protocol.keys import TYPES

#: What each step cannot do without.
NEEDS = {
    "join": ("memory", "members", "modified", "registry"),
    "modify": ("memory", "members", "modified", "registry"),
    "meet": ("memory", "members", "modified", "registry", "parties"),
    "append": ("memory", "members", "modified", "registry", "partials"),
    "compact": ("memory", "running", "partials"),
    "leave": ("memory", "members", "modified", "running", "partials"),
    "complete": ("memory", "running"),
    "fail": ("memory", "running"),
    "resume": ("memory", "running"),
    "lock": ("memory", "lock"),
    "unlock": ("memory", "lock", "queue", "waiting"),
    "recover": (
        *("memory", "members", "modified", "running", "partials"),
        *("lock", "queue", "waiting"),
    ),
    "entrust": ("memory", "running"),
    "replay": ("memory", "parked"),
    "discard": ("memory", "parked"),
}
FOREIGN = Key(b"somebody else's", -1)


CASES = [
    pytest.param(
        name,
        suffix,
        id=f"{name}, {suffix}",
    )
    for name in SCENARIOS
    for suffix in [*(suffix.decode().removeprefix(":") for suffix in TYPES), "wake:b/1", "registry"]
]


def without_registry(dump: dict[str, Key], but: str = "") -> dict[str, Key]:
    return {name: key for name, key in dump.items() if name == but or ":holds" not in name}


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_step_that_meets_a_foreign_key_changes_nothing(lab: Lab, name: str, suffix: str) -> None:
    process, step, args = prepare(lab, name)
    foreign = "{@a}:holds" if suffix == "registry" else "{=x}:" + suffix
    lab.client.delete(f"{lab.namespace}:{foreign}")
    lab.client.set(f"{lab.namespace}:{foreign}", FOREIGN.content)
    before = lab.dump()
    try:
        process.do(step, *args)
        error = ""
    except redis.ResponseError as raised:
        error = str(raised)
    after = lab.dump()
    assert after.get(foreign) == FOREIGN
    if error:
        assert "WRONGTYPE" in error or "PHONONSTATE" in error
        assert without_registry(after, foreign) == without_registry(before, foreign)
    else:
        assert suffix not in NEEDS[step]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_step_that_was_refused_is_done_when_the_key_is_ours_again(lab: Lab, name: str) -> None:
    process, step, args = prepare(lab, name)
    key = process.base + b":memory"
    ours = lab.client.dump(key)
    lab.client.set(key, FOREIGN.content)
    with refused("WRONGTYPE"):
        process.do(step, *args)
    lab.client.delete(key)
    if ours:
        lab.client.restore(key, 60_000, ours)
    assert f"{step} {process.again()[0].decode()}" == name.partition(" (")[0]


def test_beat_and_alive_meet_a_foreign_key(lab: Lab) -> None:
    lab.client.set(lab.keys.processes, FOREIGN.content)
    with refused("WRONGTYPE"):
        lab.beat("a")
    with refused("WRONGTYPE"):
        lab.alive()
    assert lab.dump() == {"{*}:processes": FOREIGN}
