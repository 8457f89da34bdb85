"""Time accounting of slots: every slot-second is occupied, queued, no_credit, tail or sync.

The engine records how many slots ran or were queued at a server. The rollout worker records when it
waits for an admission. The run's metrics read the sums.
"""

from __future__ import annotations

import threading

from dapo_async.rollout.engine import SlotUse
from dapo_async.utils.state_clock import StateClock


class SlotMeter:
    """Integrates slot use over time; thread-safe.

    The number of occupied slots is known only at the end of a decode step, but the worker may start
    or stop waiting for an admission during it. So until a step is recorded, the seconds with and
    without waiting are counted separately.
    """

    def __init__(self, clock: StateClock, *, slots: int) -> None:
        self._clock, self._slots, self._lock = clock, slots, threading.Lock()
        self._start_s = self._since_s = clock.now_s()
        self._running, self._queued, self._syncing, self._waiting = 0, 0, False, False
        self._unrecorded_s = {True: 0.0, False: 0.0}  # by `_waiting`
        self._sums = {"occupied": 0.0, "queued": 0.0, "no_credit": 0.0, "tail": 0.0, "sync": 0.0}

    def spent(self, *, running: int, queued: int = 0, syncing: bool = False) -> None:
        """Records the time since the last call: `running` slots were occupied and `queued` other
        ones queued at a server, or all were in sync.

        `read` assumes that the same holds until now.
        """
        with self._lock:
            self._running, self._queued, self._syncing = running, queued, syncing
            self._record()

    def starving(self, on: bool) -> None:
        """From now on the worker waits for an admission (on), or not."""
        with self._lock:
            self._advance()
            self._waiting = on

    def read(self) -> SlotUse:
        """The sums up to now."""
        with self._lock:
            self._record()
            return SlotUse(slots=self._slots, elapsed_s=self._since_s - self._start_s, **self._sums)

    def _advance(self) -> None:
        now_s = self._clock.now_s()
        self._unrecorded_s[self._waiting] += now_s - self._since_s
        self._since_s = now_s

    def _record(self) -> None:
        self._advance()
        waiting_s, other_s = self._unrecorded_s[True], self._unrecorded_s[False]
        self._unrecorded_s = {True: 0.0, False: 0.0}
        if self._syncing:
            self._sums["sync"] += self._slots * (waiting_s + other_s)
            return
        idle = self._slots - self._running - self._queued
        self._sums["occupied"] += self._running * (waiting_s + other_s)
        self._sums["queued"] += self._queued * (waiting_s + other_s)
        self._sums["no_credit"] += idle * waiting_s
        self._sums["tail"] += idle * other_s
