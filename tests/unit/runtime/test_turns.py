"""Learner and engines take turns on shared devices, and never hold memory at the same time."""

from __future__ import annotations

import random

import pytest

from dapo_async.runtime.turns import Turn, Turns


def test_a_turn_ends_when_every_actor_of_its_side_has_released_its_memory() -> None:
    turns = Turns(engines=["rollout-0", "rollout-1"], ranks=["learner"])
    assert (turns.turn, turns.holders) == (Turn.ENGINES, ("rollout-0", "rollout-1"))
    assert turns.end() == ("rollout-0", "rollout-1")
    assert turns.turn.value == "to_learner"
    turns.released("rollout-1")
    with pytest.raises(AssertionError, match="rollout-0 still hold device memory"):
        turns.begin()
    turns.released("rollout-0")
    assert turns.begin() == ("learner",)
    assert (turns.turn.value, turns.holders) == ("learner", ("learner",))
    assert turns.end() == ("learner",)
    turns.released("learner")
    assert turns.begin() == ("rollout-0", "rollout-1")
    assert turns.turn.value == "engines"


def test_nobody_takes_or_gives_memory_out_of_turn() -> None:
    turns = Turns(engines=["rollout-0"], ranks=["learner"])
    with pytest.raises(AssertionError, match="it is the turn of engines already"):
        turns.begin()
    with pytest.raises(AssertionError, match="in its own turn"):
        turns.released("rollout-0")
    turns.end()
    with pytest.raises(AssertionError, match="a switch is under way: to_learner"):
        turns.end()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_tried_both_sides_never_hold_memory(seed: int) -> None:
    """Random calls, most of which are refused."""
    drawn, engines, ranks = random.Random(seed), ["e0", "e1", "e2"], ["r0", "r1"]
    turns, seen = Turns(engines=engines, ranks=ranks), set()
    for _ in range(400):
        call = drawn.choice(["end", "begin", "released"])
        try:
            if call == "released":
                turns.released(drawn.choice(engines + ranks))
            else:
                getattr(turns, call)()
        except AssertionError:
            continue
        held = set(turns.holders)
        assert not (held & {*engines} and held & {*ranks})
        if turns.turn is Turn.ENGINES:
            assert held == {*engines}
        if turns.turn is Turn.LEARNER:
            assert held == {*ranks}
        seen.add(turns.turn)
    assert seen == {*Turn}
