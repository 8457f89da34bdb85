"""How often, and after which pause, something that failed may be started again. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

REFILL_S = 1800.0  # a restart no longer counts after this time
LONGEST_PAUSE_S = 60.0  # before a restart


@dataclass(slots=True)
class RestartBudget:
    """At most `limit` restarts within `REFILL_S`.

    The first restart comes at once, each further one after a pause that doubles.
    """

    limit: int
    _starts_s: deque[float] = field(default_factory=deque)

    def spend(self, now_s: float) -> float | None:
        """Seconds to wait before the restart; None: the budget is used up."""
        while self._starts_s and now_s - self._starts_s[0] >= REFILL_S:
            self._starts_s.popleft()
        spent = len(self._starts_s)
        if spent >= self.limit:
            return None
        self._starts_s.append(now_s)
        return min(2.0 ** (spent - 1), LONGEST_PAUSE_S) if spent else 0.0

    @property
    def spent(self) -> int:
        """Restarts that count now."""
        return len(self._starts_s)
