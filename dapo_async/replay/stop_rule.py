"""Stops a run that gets only rejects. The buffer reports rejects and accepts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dapo_async.types import RejectReason


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why admission stopped for good."""

    rejected: Mapping[RejectReason, int]  # the consecutive rejects by reason

    @property
    def solved(self) -> bool:
        """All responses of all these groups were correct; otherwise the filters are stuck."""
        return set(self.rejected) == {RejectReason.ALL_CORRECT}

    @property
    def reason(self) -> str:
        """One line for the summary: the counts per reason and, when stuck, the remedy."""
        total = sum(self.rejected.values())
        if self.solved:
            return f"task solved: {total} groups in a row were all correct"
        by_reason = ", ".join(
            f"{reason.value} {count}" for reason, count in sorted(self.rejected.items())
        )
        return (
            f"the filters rejected {total} groups in a row ({by_reason}); read the run's rollouts: "
            "all_wrong means too hard or an answer that the verifier can't read; change the data, "
            "the template or the group size, or raise replay.groups_per_step: the run ends after "
            "32 times as many rejected groups in a row"
        )


class RejectStreak:
    """Sets `stop_reason` after `limit` consecutive rejects; it then stays set."""

    def __init__(self, limit: int) -> None:
        assert limit > 0, limit
        self._limit = limit
        self._streak: Counter[RejectReason] = Counter()
        self.stop_reason: StopReason | None = None

    def accept(self) -> None:
        self._streak.clear()

    def reject(self, reason: RejectReason) -> None:
        self._streak[reason] += 1
        self._check_limit()

    def state(self) -> dict[str, int]:
        return {reason.value: count for reason, count in self._streak.items()}

    def restore(self, streak: Mapping[str, int]) -> None:
        self._streak = Counter({RejectReason(name): count for name, count in streak.items()})
        self._check_limit()

    def _check_limit(self) -> None:
        if self.stop_reason is None and self._streak.total() >= self._limit:
            self.stop_reason = StopReason(dict(self._streak))
