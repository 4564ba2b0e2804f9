"""candidates, session, compact: which partials are merged, and how they are replaced."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from model import Batch, Model, Violation
from steps import Lab, lab_fixture, settled  # noqa: F401 - the fixture is found by its name
from witness import expect

from conftest import Redis
from phonon.protocol.compaction import COMPACT_AT, WORTHWHILE, window
from phonon.protocol.library import text


def fill(lab: Lab, resource: str, sizes: list[int], due: int = 0) -> Model:
    """Have partials of these sizes; the result is what should be there."""
    base = lab.keys.base(resource).decode()
    partials = [b"%d" % (i % 10) * size for i, size in enumerate(sizes)]
    lab.client.rpush(f"{base}:partials", *partials)
    if due:
        lab.client.hset(f"{base}:running", "due", due)
    batch = Batch(1, b"z", [], 0, due=due)
    return Model(partials=partials, batch=batch)


def check_candidates(lab: Lab) -> None:
    """They are those that the model says, whatever there is."""
    rng = random.Random(1)  # noqa: S311 - repeatable, no secret
    for i in range(300):
        sizes = [rng.choice((1, 2, 3, 5, 9, 20, 50)) for _ in range(rng.randint(1, 12))]
        due = rng.choice((0, rng.randint(0, len(sizes))))
        model = fill(lab, f"r{i}", sizes, due)
        first, last = rng.choice(((0, 63), (rng.randint(0, 9), rng.randint(0, 15))))
        answer = lab.process("a", f"r{i}").ask("candidates", first, last)
        if first < len(sizes):
            expect(
                f"{first} to {last} of {sizes}, {due} due", answer, model.candidates(first, last)
            )


def test_candidates_are_as_the_model_says(lab: Lab) -> None:
    check_candidates(lab)


MUTATIONS = {
    "of two sessions": ("if first < due and due <= last then", "if false then"),
    "of the smaller part": (
        "    if due - first > last + 1 - due then",
        "    if due - first > last + 2 - due then",
    ),
    "of any size": ("if size <= 2 * behind then", "if i < last then"),
    "no larger than what is behind": ("if size <= 2 * behind then", "if size <= behind then"),
    "only up to the first large one": (
        "      begin = i\n    end",
        "      begin = i\n    elseif i < last then\n      break\n    end",
    ),
    "one too few": (
        "{ begin, last - begin + 1 }, begin, last",
        "{ begin, last - begin }, begin, last",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_faults_in_the_choice_of_candidates_show(server: Redis, namespace: str, name: str) -> None:
    old, new = MUTATIONS[name]
    body = text()
    assert body.count(old) == 1, "the library has changed: adapt the mutation"
    lab = Lab(server, namespace, body.replace(old, new))
    try:
        with pytest.raises(Violation):
            check_candidates(lab)
    finally:
        lab.close()


def test_nothing_is_no_candidate(lab: Lab) -> None:
    a = lab.process("a")
    assert a.ask("candidates", 0, 63) == [0, 0]
    a.append(b"1")
    assert a.ask("candidates", 0, 63)[1:] == [0], "one alone cannot be merged"
    assert a.ask("session", 1, 5) == []


def test_answers_are_of_bounded_size(server: Redis, namespace: str) -> None:
    lab = Lab(server, namespace, text().replace("BYTES = 1024 * 1024", "BYTES = 10"))
    try:
        a = lab.process("a")
        partials = [b"1234", b"5678", b"90ab", b"0" * 12, b"c"]
        for partial in partials:
            a.append(partial)
        assert a.ask("candidates", 0, 63) == [0, 5, *partials[:2]]
        assert a.ask("session", 2, 4) == [b"90ab"]
        assert a.ask("session", 3, 4) == [b"0" * 12], "one at least"
    finally:
        lab.close()


def test_what_is_merged_at_once_is_bounded(server: Redis, namespace: str) -> None:
    lab = Lab(server, namespace, text().replace("16 * 1024 * 1024", "10"))
    try:
        a = lab.process("a")
        for partial in (b"1234", b"567", b"890", b"abc"):
            a.append(partial)
        assert a.ask("candidates", 0, 63) == [1, 3, b"567", b"890", b"abc"]
    finally:
        lab.close()


def test_append_says_when_there_are_many(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    answers = [(a, b)[i % 2].append(b"1") for i in range(2 * COMPACT_AT)]
    many = {i: answer for i, answer in enumerate(answers, 1) if len(answer) > 2}
    assert many == {n: [b"stored", 0, n] for n in (COMPACT_AT, 2 * COMPACT_AT)}


def test_modifications_stay_what_they_are(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    b.append(b"2")
    b.append(b"3")
    before = lab.dump()
    assert b.compact(0, [b"1", b"2", b"3"], b"123") == [b"compacted", 0, 1]
    after = lab.dump()
    assert after.pop("{=x}:partials").content == [b"123"]
    before.pop("{=x}:partials")
    del after["{=x}:memory"], before["{=x}:memory"]
    assert after == before


def test_a_digest_is_of_each_partial(lab: Lab) -> None:
    a = lab.process("a")
    a.append(b"12")
    a.append(b"3")
    for others in ([b"1", b"23"], [b"12", b"4"], [b"3", b"12"], [b"12", b"3", b""]):
        assert a.compact(0, others, b"?") == [b"changed", 0]
    assert a.compact(0, [b"12", b"3"], b"!") == [b"compacted", 0, 1]


def test_binary_and_large_partials(lab: Lab) -> None:
    a = lab.process("a")
    partials = [bytes(range(256)) * 4000, b"\r\n\0", b"\xff" * 10]
    for partial in partials:
        a.append(partial)
    first, n, *found = a.ask("candidates", 0, 63)
    assert (first, n, found) == (1, 2, partials[1:]), "the large one is left for later"
    assert a.ask("session", 0, 2) == partials
    assert a.compact(0, partials, b"m") == [b"compacted", 0, 1]


@pytest.mark.parametrize("due", range(6))
def test_never_across_the_end_of_a_session(lab: Lab, due: int) -> None:
    """Partials 1 and 2 of five are merged; some of the five are due."""
    a, b = lab.process("a"), lab.process("b")
    token = b.batch(b"running")
    for i in range(5):
        a.append(b"%d" % i)
        if i + 1 == due:
            a.leave()
    answer = a.compact(1, [b"1", b"2"], b"12")
    if due == 2:
        assert answer == [b"changed", 0]
        expected = [b"0", b"1"]
    else:
        assert answer == [b"compacted", 0, 4]
        expected = [b"0", b"12", b"3", b"4"][: due - (due > 2)]
    again = b.complete(token)
    assert (again[-1] if due else []) == expected
    assert again[0] == (b"again" if due else b"done")


def test_a_stranger_and_a_dead_one_may_merge(lab: Lab) -> None:
    """They become responsible for nothing."""
    a, b = lab.process("a"), lab.process("b")
    a.append(b"1")
    a.append(b"2")
    lab.tombstone(b)
    assert b.compact(0, [b"1", b"2"], b"12") == [b"compacted", 0, 1]
    assert lab.dump()["{=x}:members"].content.keys() == {b"a"}


def test_a_batch_of_the_same_content_is_left_alone(lab: Lab) -> None:
    a = lab.process("a")
    for partial in (b"1", b"2"):
        a.append(partial)
    a.leave()
    before = settled(lab.dump())
    assert a.compact(0, [b"1", b"2"], b"12") == [b"changed", 0]
    before["{=x}:memory"] = settled(lab.dump())["{=x}:memory"]
    assert settled(lab.dump()) == before


def test_a_server_without_memory_merges(own_server: Redis) -> None:
    lab = Lab(own_server, "full")
    a = lab.process("a")
    partials = [b"%d" % i * 1000 for i in range(10)]
    for partial in partials:
        a.append(partial)
    lab.client.config_set("maxmemory", 1)
    assert a.ask("candidates", 0, 63)[:2] == [0, 10]
    assert a.compact(0, partials, b"m") == [b"compacted", 0, 1]
    lab.client.config_set("maxmemory", 0)
    lab.close()


# -- how much work it is


def grow(n: int, size: Callable[[list[int]], int], count: Callable[[list[int]], int]) -> Any:
    """Append n partials of one byte, with the rules of candidates and flow, by numbers alone.

    Returns:
        The longest list, and the bytes that were read.
    """
    sizes: list[int] = []
    longest, read = 0, 0
    for _ in range(n):
        sizes.append(1)
        longest = max(longest, len(sizes))
        if len(sizes) % COMPACT_AT:
            continue
        model = Model(partials=[b"0" * some for some in sizes])
        first, some, *chosen = model.candidates(len(sizes) - window(len(sizes)), len(sizes) - 1)
        read += sum(map(len, chosen))
        left = count(sizes[first:])
        if chosen and (some - left) * WORTHWHILE >= some:
            sizes[first:] = [size(sizes[first:])] * left
    return longest, read


def test_what_adds_up_is_cheap() -> None:
    longest, read = grow(20_000, size=lambda _: 1, count=lambda _: 1)
    assert longest == COMPACT_AT
    assert read < 3 * 20_000


def test_what_grows_is_read_a_logarithm_of_times() -> None:
    longest, read = grow(20_000, size=sum, count=lambda _: 1)
    assert longest == COMPACT_AT
    assert read < 16 * 20_000


def test_what_nobody_here_can_merge_is_looked_at_a_logarithm_of_times() -> None:
    longest, read = grow(8_192, size=sum, count=len)
    assert longest == 8_192
    assert read < 8 * 8_192


def test_a_window_is_now_and_then_large() -> None:
    assert [window(64 * n) for n in (1, 2, 3, 4, 5, 6, 8)] == [64, 128, 64, 256, 64, 128, 512]
