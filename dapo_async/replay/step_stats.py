"""What dynamic sampling kept between two takes: events arrive from the buffer, one `StepAcceptance` per step leaves for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dapo_async.types import Group, RejectReason


@dataclass(frozen=True, slots=True)
class StepAcceptance:
    """Offers since the take before; at staleness 0 also how often admission had to go round again for this step."""

    accepted: int = 0
    rejected: Mapping[RejectReason, int] = field(default_factory=dict)
    verdicts: Mapping[str, int] = field(
        default_factory=dict
    )  # rollouts of the accepted and the rejected groups by their verdict's reason
    refused: int = 0  # offers that no open admission was waiting for; not part of `offered`
    refill_waves: int | None = (
        None  # bursts of admissions that replaced rejected groups of the same step; None above staleness 0
    )

    @property
    def offered(self) -> int:
        """Groups that the filters saw."""
        return self.accepted + sum(self.rejected.values())

    @property
    def rate(self) -> float:
        """Accepted / offered; 1 when nothing was offered: no reject was seen."""
        return self.accepted / self.offered if self.offered else 1.0


class AcceptanceLog:
    """Counts one step at a time; `count_waves` at staleness 0, where no surplus hides a reject and each wave lengthens the step."""

    def __init__(self, *, count_waves: bool) -> None:
        self._count_waves = count_waves
        self._reset()

    def _reset(self) -> None:
        self._accepted = self._refused = self._waves = 0
        self._rejected: Counter[RejectReason] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._refill_due = False

    def accept(self, group: Group) -> None:
        self._verdicts.update(rollout.reason for rollout in group.rollouts if rollout.reason)
        self._accepted += 1

    def reject(self, reason: RejectReason, group: Group) -> None:
        self._verdicts.update(rollout.reason for rollout in group.rollouts if rollout.reason)
        self._rejected[reason] += 1
        self._refill_due = True

    def refuse(self) -> None:
        self._refused += 1

    def admit(self) -> None:
        """The first admission after a reject opens a wave; those right behind it belong to the same burst."""
        self._waves += self._refill_due
        self._refill_due = False

    def state(self) -> dict[str, Any]:
        rejected = {reason.value: count for reason, count in self._rejected.items()}
        return {
            "accepted": self._accepted,
            "rejected": rejected,
            "verdicts": dict(self._verdicts),
            "refused": self._refused,
            "waves": self._waves,
            "refill_due": self._refill_due,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._accepted, self._refused, self._waves = (
            state["accepted"],
            state["refused"],
            state["waves"],
        )
        self._rejected = Counter(
            {RejectReason(name): count for name, count in state["rejected"].items()}
        )
        self._refill_due, self._verdicts = state["refill_due"], Counter(state["verdicts"])

    @property
    def step(self) -> StepAcceptance:
        """The step so far."""
        return StepAcceptance(
            accepted=self._accepted,
            rejected=dict(self._rejected),
            verdicts=dict(self._verdicts),
            refused=self._refused,
            refill_waves=self._waves if self._count_waves else None,
        )

    def close_step(self) -> StepAcceptance:
        """The finished step; the next one starts from zero."""
        step = self.step
        self._reset()
        return step
