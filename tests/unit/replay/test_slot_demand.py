"""The rule that keeps slots full: how many groups an engine should get."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dapo_async.replay.slot_demand import GroupInFlight, SlotDemand


@pytest.mark.parametrize(
    ("num_slots", "group_size", "groups"), [(6, 3, 3), (7, 3, 4), (1, 3, 2), (128, 16, 9)]
)
def test_empty_engine_gets_what_fills_its_slots_and_one_group_more(
    num_slots: int, group_size: int, groups: int
) -> None:
    demand = SlotDemand(num_slots=num_slots, group_size=group_size)
    assert demand.num_groups == groups
    for left in reversed(range(groups)):
        demand.start()
        assert demand.num_groups == left
    demand.start()  # more than it asked for: a wave in lockstep
    assert demand.num_groups == 0


def test_a_group_is_asked_for_when_as_many_siblings_of_any_groups_have_ended() -> None:
    demand = SlotDemand(num_slots=6, group_size=3)
    groups = [demand.start() for _ in range(3)]
    groups[0].end_siblings(2)  # 7 sequences are in flight, 9 are the aim
    assert (demand.in_flight, demand.num_groups) == (7, 1)
    groups[2].end_siblings(2)
    assert (demand.in_flight, demand.num_groups) == (5, 2)


def test_a_group_that_leaves_takes_the_siblings_that_are_left_with_it() -> None:
    demand = SlotDemand(num_slots=6, group_size=3)
    one, other = demand.start(), demand.start()
    one.end_siblings(2)
    one.stop()
    assert demand.in_flight == 3
    one.stop()
    one.end_siblings(1)  # came late
    assert demand.in_flight == 3
    other.end_siblings(3)
    other.stop()
    assert demand.in_flight == 0


def test_more_ends_than_siblings_are_an_error_of_the_engine() -> None:
    demand = SlotDemand(num_slots=6, group_size=3)
    with pytest.raises(AssertionError, match="4 siblings ended, 3 were left"):
        demand.start().end_siblings(4)


class Slots(RuleBasedStateMachine):
    """An engine with a queue of siblings, a worker that asks, and credits that come and go."""

    @initialize(num_slots=st.integers(1, 12), group_size=st.integers(1, 6))
    def begin(self, num_slots: int, group_size: int) -> None:
        self.num_slots, self.group_size, self.credits = num_slots, group_size, 0
        self.demand = SlotDemand(num_slots=num_slots, group_size=group_size)
        self.groups: list[GroupInFlight] = []
        self.running: list[int] = []  # one group per slot
        self.waiting: deque[int] = deque()  # one group per sibling, in the order of admission
        self.started: list[int] = []

    def fill(self) -> None:
        """The worker starts what it asks for, as far as there are credits; the engine fills up."""
        while self.credits and self.demand.num_groups:
            self.credits -= 1
            self.waiting.extend([len(self.groups)] * self.group_size)
            self.groups.append(self.demand.start())
        while self.waiting and len(self.running) < self.num_slots:
            self.started.append(self.waiting[0])
            self.running.append(self.waiting.popleft())

    @rule(count=st.integers(1, 20))
    def give_credits(self, count: int) -> None:
        self.credits += count
        self.fill()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end_sibling(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.running) - 1))
        self.groups[self.running.pop(position)].end_siblings(1)
        self.fill()

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        group = data.draw(st.integers(0, len(self.groups) - 1))
        self.running = [each for each in self.running if each != group]
        self.waiting = deque(each for each in self.waiting if each != group)
        self.groups[group].stop()
        self.fill()

    @invariant()
    def holds(self) -> None:
        in_flight = len(self.running) + len(self.waiting)
        assert self.demand.in_flight == in_flight
        assert in_flight <= self.num_slots + 2 * self.group_size - 1
        if self.credits:
            assert len(self.running) == self.num_slots, "a slot is idle beside a free credit"
            assert len(self.waiting) >= self.group_size
        assert self.started == sorted(self.started), "siblings started out of order"


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
