"""Offers between two takes, counted per step.

The buffer reports events; the metrics read one `StepAcceptance` per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dapo_async.types import Group, GroupFacts, RejectReason

FAILED = "failed"  # as the reason of a verdict: the verifier gave none


@dataclass(frozen=True, slots=True)
class StepAcceptance:
    """The offers since the take before, counted in groups unless said otherwise."""

    accepted: int = 0
    rejected: Mapping[RejectReason, int] = field(default_factory=dict)
    # Rollouts of the accepted and the rejected groups, by the reason of their verdict.
    verdicts: Mapping[str, int] = field(default_factory=dict)
    refused: int = 0  # offers without an open admission; not part of `offered`
    # Bursts of admissions that replaced rejected groups of the same step; None above staleness 0.
    refill_waves: int | None = None

    @property
    def offered(self) -> int:
        """Groups that the filters judged."""
        return self.accepted + sum(self.rejected.values())

    @property
    def rate(self) -> float:
        """Accepted / offered; 1 when nothing was offered."""
        return self.accepted / self.offered if self.offered else 1.0


class AcceptanceLog:
    """Counts one step at a time.

    `count_waves`: at staleness 0 no surplus of groups hides a reject, and each wave of admissions
    lengthens the step.
    """

    def __init__(self, *, count_waves: bool) -> None:
        self._count_waves = count_waves
        self._reset()

    def _reset(self) -> None:
        self._accepted = self._refused = self._waves = 0
        self._rejected: Counter[RejectReason] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._refill_due = False

    def accept(self, group: Group | GroupFacts) -> None:
        self._count_verdicts(group)
        self._accepted += 1

    def reject(self, reason: RejectReason, group: Group | GroupFacts) -> None:
        self._count_verdicts(group)
        self._rejected[reason] += 1
        self._refill_due = True

    def refuse(self) -> None:
        self._refused += 1

    def admit(self) -> None:
        """The first admission after a reject opens a wave; the next ones belong to it."""
        self._waves += self._refill_due
        self._refill_due = False

    def state(self) -> dict[str, Any]:
        return {
            "accepted": self._accepted,
            "rejected": {reason.value: count for reason, count in self._rejected.items()},
            "verdicts": dict(self._verdicts),
            "refused": self._refused,
            "waves": self._waves,
            "refill_due": self._refill_due,
        }

    def reopened(self, closed: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The state as if the steps that were closed in the states `closed` were still open."""
        state = self.state()
        for before in closed:
            for name in ("rejected", "verdicts"):
                state[name] = dict(Counter(before[name]) + Counter(state[name]))
            for name in ("accepted", "refused", "waves"):
                state[name] += before[name]
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._accepted = state["accepted"]
        self._rejected = Counter(
            {RejectReason(name): count for name, count in state["rejected"].items()}
        )
        self._verdicts = Counter(state["verdicts"])
        self._refused = state["refused"]
        self._waves = state["waves"]
        self._refill_due = state["refill_due"]

    @property
    def step(self) -> StepAcceptance:
        """The current step so far."""
        return StepAcceptance(
            accepted=self._accepted,
            rejected=dict(self._rejected),
            verdicts=dict(self._verdicts),
            refused=self._refused,
            refill_waves=self._waves if self._count_waves else None,
        )

    def close_step(self) -> StepAcceptance:
        """Returns the finished step; the next one starts from zero."""
        step = self.step
        self._reset()
        return step

    def _count_verdicts(self, group: Group | GroupFacts) -> None:
        self._verdicts.update(reason for reason in group.reasons if reason)
        if group.num_failed:
            self._verdicts[FAILED] += group.num_failed
