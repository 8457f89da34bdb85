"""How many groups a rollout worker asks for, from the number of sequences on its engine.

In: events (a group starts, siblings end, a group leaves). Out: the number of groups to ask for. The
engine starts siblings in the order of their groups, one for each slot that becomes free.
"""

from __future__ import annotations


class SlotDemand:
    """Counts the sequences in flight of one engine: running ones and siblings that wait for a slot.

    With S slots and groups of G siblings, the worker asks until S + G sequences are in flight.
    So every slot runs and at least one group waits, and a free slot gets its next sequence at the
    next decode step. Groups are never split, so at most S + 2G − 1 sequences are in flight.

    Counting whole groups would leave slots empty: if response lengths differ much, most siblings of
    a group end long before its last one.
    """

    def __init__(self, *, num_slots: int, group_size: int) -> None:
        self._aim, self._group_size = num_slots + group_size, group_size
        self.in_flight = 0

    def resize(self, num_slots: int) -> None:
        """From now on the engine has so many slots."""
        self._aim = num_slots + self._group_size

    @property
    def num_groups(self) -> int:
        """How many groups the engine should get now."""
        return max(0, -(-(self._aim - self.in_flight) // self._group_size))

    def start(self) -> GroupInFlight:
        """A group goes to the engine."""
        self.in_flight += self._group_size
        return GroupInFlight(self, self._group_size)


class GroupInFlight:
    """One group on the engine, counted by its `SlotDemand`."""

    def __init__(self, demand: SlotDemand, num_siblings: int) -> None:
        self._demand, self._left = demand, num_siblings

    def end_siblings(self, count: int) -> None:
        """`count` siblings ended. After `stop` this does nothing."""
        if self._left:
            assert count <= self._left, f"{count} siblings ended, {self._left} were left"
            self._left -= count
            self._demand.in_flight -= count

    def stop(self) -> None:
        """The group leaves the engine: finished, aborted or failed."""
        self._demand.in_flight -= self._left
        self._left = 0
