"""Whose turn it is on devices that learner and engines share. Pure: it waits for nothing.

    engines ──a batch is complete──▶ to_learner ──every engine is released──▶ learner
       ▲                                                                         │
       └────────every rank is released──── to_engines ◀──the snapshot is taken───┘

In a turn only actors of one side hold device memory; in between those of the side before give it
back, one after the other. `alternation.py` makes the calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Turn(StrEnum):
    """Who may hold device memory."""

    ENGINES = "engines"  # they generate until the batch of the next step is complete
    TO_LEARNER = "to_learner"  # engines stop and release their memory
    LEARNER = "learner"  # it trains one step, and takes the snapshot of its weights
    TO_ENGINES = "to_engines"  # the learner's ranks release their memory


NEXT = {
    Turn.ENGINES: Turn.TO_LEARNER,
    Turn.TO_LEARNER: Turn.LEARNER,
    Turn.LEARNER: Turn.TO_ENGINES,
    Turn.TO_ENGINES: Turn.ENGINES,
}


class Turns:
    """Follows a run from turn to turn. A step that would let both sides hold memory is refused."""

    def __init__(self, *, engines: Iterable[str], ranks: Iterable[str]) -> None:
        """The engines begin."""
        self.turn = Turn.ENGINES
        self._members = {Turn.ENGINES: tuple(engines), Turn.LEARNER: tuple(ranks)}
        self._holders = set(self._members[Turn.ENGINES])

    @property
    def holders(self) -> tuple[str, ...]:
        """The actors that hold device memory, or may."""
        return tuple(sorted(self._holders))

    def end(self) -> tuple[str, ...]:
        """The turn ends. Returns the actors that have to release their memory."""
        assert self.turn in self._members, f"a switch is under way: {self.turn.value}"
        self.turn = NEXT[self.turn]
        return self.holders

    def released(self, actor: str) -> None:
        """`actor` holds no device memory any more: it sleeps, or its process is gone."""
        assert self.turn not in self._members, f"{actor} gives its memory up in its own turn"
        self._holders.discard(actor)

    def begin(self) -> tuple[str, ...]:
        """The next turn begins. Returns the actors that may take memory now."""
        assert self.turn not in self._members, f"it is the turn of {self.turn.value} already"
        assert not self._holders, f"{', '.join(self.holders)} still hold device memory"
        self.turn = NEXT[self.turn]
        self._holders.update(self._members[self.turn])
        return self._members[self.turn]
