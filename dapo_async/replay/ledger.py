"""Conservation: every admitted group ends exactly once.

The buffer books admissions and outcomes; the summary and the metrics read the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dapo_async.types import RejectReason


class GroupOutcome(StrEnum):
    """How an admitted group ends, unless it is rejected for a `RejectReason`."""

    TRAINED = "trained"
    EVICTED = "evicted"  # its deadline could not be kept: a fault
    FAILED = "failed"  # its worker or engine failed
    SKIPPED = "skipped"  # its step was non-finite and changed nothing
    UNUSED = "unused"  # the run ended first


@dataclass(frozen=True, slots=True)
class Counts:
    """The ledger at one instant: `admitted` equals the sum of everything else."""

    admitted: int
    trained: int = 0
    evicted: int = 0
    failed: int = 0
    skipped: int = 0
    unused: int = 0
    in_flight: int = 0  # generating, buffered or in the learner's step
    rejected: Mapping[RejectReason, int] = field(default_factory=dict)

    @property
    def ended(self) -> int:
        return (
            self.trained
            + self.evicted
            + self.failed
            + self.skipped
            + self.unused
            + sum(self.rejected.values())
        )

    def check(self) -> None:
        assert self.admitted == self.ended + self.in_flight, f"conservation broken: {self}"

    def flat(self) -> dict[str, int]:
        """One number per metric name: `trained`, `rejected.all_correct`, …; has every reason."""
        named = {outcome.value: getattr(self, outcome.value) for outcome in GroupOutcome}
        reasons = {
            f"rejected.{reason.value}": self.rejected.get(reason, 0) for reason in RejectReason
        }
        return {"admitted": self.admitted, **named, **reasons, "in_flight": self.in_flight}


def _ignore(group_id: int, outcome: GroupOutcome | RejectReason) -> None:
    """Nobody watches the ends."""


class Ledger:
    """Numbers the admitted groups 0, 1, 2, … and books one outcome for each.

    It stores the open groups only: an id below `admitted` that is not open has ended.
    """

    def __init__(self) -> None:
        self.admitted = 0
        # Called with the group and its outcome, after it was booked.
        self.on_end: Callable[[int, GroupOutcome | RejectReason], None] = _ignore
        self._open: set[int] = set()
        self._ended: Counter[GroupOutcome | RejectReason] = Counter()

    def admit(self) -> int:
        group_id = self.admitted
        self.admitted += 1
        self._open.add(group_id)
        return group_id

    def end(self, group_id: int, outcome: GroupOutcome | RejectReason) -> None:
        assert group_id in self._open, (
            f"group {group_id} is not open and can't end as {outcome.value}"
        )
        self._open.remove(group_id)
        self._ended[outcome] += 1
        self.on_end(group_id, outcome)

    def state(self) -> dict[str, Any]:
        return {
            "admitted": self.admitted,
            "ended": {outcome.value: count for outcome, count in self._ended.items()},
        }

    def restore(self, admitted: int, ended: Mapping[str, int], outstanding: Iterable[int]) -> None:
        """Continues from `state`; `outstanding`: the ids of the open groups."""
        reasons = {reason.value for reason in RejectReason}
        self.admitted, self._open = admitted, set(outstanding)
        self._ended = Counter(
            {
                RejectReason(name) if name in reasons else GroupOutcome(name): count
                for name, count in ended.items()
            }
        )
        self.counts.check()

    def knows(self, group_id: int) -> bool:
        return 0 <= group_id < self.admitted

    @property
    def counts(self) -> Counts:
        return Counts(
            admitted=self.admitted,
            trained=self._ended[GroupOutcome.TRAINED],
            evicted=self._ended[GroupOutcome.EVICTED],
            failed=self._ended[GroupOutcome.FAILED],
            skipped=self._ended[GroupOutcome.SKIPPED],
            unused=self._ended[GroupOutcome.UNUSED],
            in_flight=len(self._open),
            rejected={
                reason: self._ended[reason] for reason in RejectReason if self._ended[reason]
            },
        )
