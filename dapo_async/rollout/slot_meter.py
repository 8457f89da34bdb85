"""Law 6 for slots: every slot-second of an engine is occupied, without credit, tail or sync."""

from __future__ import annotations

import threading

from dapo_async.clock import StateClock
from dapo_async.rollout.engine import SlotUse


class SlotMeter:
    """Integrates slot use over time; thread-safe."""

    def __init__(self, clock: StateClock, *, slots: int) -> None:
        self._clock, self._slots, self._lock = clock, slots, threading.Lock()
        self._start_s = self._since_s = clock.now_s()
        self._running, self._syncing = 0, False
        self._sums = {"occupied": 0.0, "no_credit": 0.0, "tail": 0.0, "sync": 0.0}

    def spent(self, *, running: int, syncing: bool = False) -> None:
        """Books the time since the last booking: `running` slots were occupied, or all waited for weights. `read` assumes that it goes on so."""
        with self._lock:
            self._running, self._syncing = running, syncing
            self._book()

    def read(self) -> SlotUse:
        """The sums up to now."""
        with self._lock:
            self._book()
            return SlotUse(slots=self._slots, elapsed_s=self._since_s - self._start_s, **self._sums)

    def _book(self) -> None:
        now_s = self._clock.now_s()
        passed_s, self._since_s = now_s - self._since_s, now_s
        if self._syncing:
            self._sums["sync"] += self._slots * passed_s
            return
        self._sums["occupied"] += self._running * passed_s
        self._sums["tail" if self._running else "no_credit"] += (self._slots - self._running) * passed_s
