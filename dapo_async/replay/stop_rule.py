"""Nothing but rejects: rejects and accepts arrive from the buffer, a verdict that ends the run leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dapo_async.types import RejectReason


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why admission stopped for good."""

    rejected: Mapping[RejectReason, int]  # the consecutive rejects that led here

    @property
    def solved(self) -> bool:
        """Every answer of every group was correct: nothing is left to learn. Otherwise the filters are stuck."""
        return set(self.rejected) == {RejectReason.ALL_CORRECT}

    @property
    def reason(self) -> str:
        """One line for the summary: the counts per reason and, where the run is stuck, what to look at."""
        total = sum(self.rejected.values())
        if self.solved:
            return f"task solved: {total} groups in a row were all correct"
        by_reason = ", ".join(
            f"{reason.value} {count}" for reason, count in sorted(self.rejected.items())
        )
        return (
            f"the filters rejected {total} groups in a row ({by_reason}); read the run's rollouts: all_wrong means too hard or an answer that the "
            "verifier can't read; change the data, the template or the group size, or raise replay.max_rejected_in_a_row"
        )


class Patience:
    """Reaches a verdict after `limit` consecutive rejects; the verdict stands, whatever comes later."""

    def __init__(self, limit: int) -> None:
        assert limit > 0, limit
        self._limit = limit
        self._streak: Counter[RejectReason] = Counter()
        self.verdict: StopReason | None = None

    def accept(self) -> None:
        self._streak.clear()

    def reject(self, reason: RejectReason) -> None:
        self._streak[reason] += 1
        self._judge()

    def state(self) -> dict[str, int]:
        return {reason.value: count for reason, count in self._streak.items()}

    def restore(self, streak: Mapping[str, int]) -> None:
        self._streak = Counter({RejectReason(name): count for name, count in streak.items()})
        self._judge()

    def _judge(self) -> None:
        if self.verdict is None and self._streak.total() >= self._limit:
            self.verdict = StopReason(dict(self._streak))
