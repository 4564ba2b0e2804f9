"""Memberships that a refusal after a rebirth leaves in doubt."""

from types import SimpleNamespace
from typing import Any

from phonon._core.flows import Send
from phonon._core.members import Members
from phonon._protocol.operations import Code
from phonon._protocol.partitions import Partitions, encode_resource
from phonon.errors import ServerError


def lab() -> tuple[Members, Any]:
    measures = SimpleNamespace(opened=0)
    partitions = Partitions("memberships")
    identity: Any = SimpleNamespace(id=b"first", partitions=partitions, measures=measures)
    return Members(identity), identity


def test_what_a_rebirth_has_joined_is_joined_again_after_a_refusal() -> None:
    """A leave may have come before the refused call, so this process may be a member or not."""
    members, identity = lab()
    joining = members.join("resource")
    next(joining)
    identity.id = b"second"
    again = joining.send([ServerError("refused")])
    assert isinstance(again, Send)
    (operation,) = again.operations
    assert operation.words[:2] == (int(Code.JOIN), encode_resource("resource"))
    try:
        joining.send([1])
    except ServerError as error:
        assert str(error) == "refused"  # noqa: PT017 - thrown by a generator that is sent to
    else:
        raise AssertionError("the caller has to be told")
    assert members.is_sure("resource")


def test_what_has_been_left_is_not_joined_again() -> None:
    members, identity = lab()
    (entry,) = members.entering(["resource"])
    identity.id = b"second"
    members.leaving("resource")
    members.entered("resource", entry, failed=True)
    assert list(members.settle_doubts()) == []
    assert members.held == {}


def test_a_refusal_without_a_rebirth_leaves_no_membership() -> None:
    members, _ = lab()
    (entry,) = members.entering(["resource"])
    members.entered("resource", entry, failed=True)
    assert list(members.settle_doubts()) == []
    assert members.held == {}
