"""Law 6 for slots: every slot-second of an engine is occupied, without credit, tail or sync.

The engine's thread books what its slots did, the rollout worker tells when it waits for an admission, the tracker reads.
"""

from __future__ import annotations

import threading

from dapo_async.rollout.engine import SlotUse
from dapo_async.utils.state_clock import StateClock


class SlotMeter:
    """Integrates slot use over time; thread-safe.

    How many slots a decode step occupies is known at its end, but hunger starts and ends in the midst of it: until a booking, hungry and other
    seconds are counted apart.
    """

    def __init__(self, clock: StateClock, *, slots: int) -> None:
        self._clock, self._slots, self._lock = clock, slots, threading.Lock()
        self._start_s = self._since_s = clock.now_s()
        self._running, self._syncing, self._starving = 0, False, False
        self._unbooked_s = {True: 0.0, False: 0.0}  # by whether an admission was being waited for
        self._sums = {"occupied": 0.0, "no_credit": 0.0, "tail": 0.0, "sync": 0.0}

    def spent(self, *, running: int, syncing: bool = False) -> None:
        """Books the time since the last booking: `running` slots were occupied, or all waited for weights. `read` assumes that it goes on so."""
        with self._lock:
            self._running, self._syncing = running, syncing
            self._book()

    def starving(self, on: bool) -> None:
        """From now on an admission is waited for, or none: what is idle is without credit, or tail."""
        with self._lock:
            self._advance()
            self._starving = on

    def read(self) -> SlotUse:
        """The sums up to now."""
        with self._lock:
            self._book()
            return SlotUse(slots=self._slots, elapsed_s=self._since_s - self._start_s, **self._sums)

    def _advance(self) -> None:
        now_s = self._clock.now_s()
        self._unbooked_s[self._starving] += now_s - self._since_s
        self._since_s = now_s

    def _book(self) -> None:
        self._advance()
        starved_s, other_s = self._unbooked_s[True], self._unbooked_s[False]
        self._unbooked_s = {True: 0.0, False: 0.0}
        if self._syncing:
            self._sums["sync"] += self._slots * (starved_s + other_s)
            return
        idle = self._slots - self._running
        self._sums["occupied"] += self._running * (starved_s + other_s)
        self._sums["no_credit"] += idle * starved_s
        self._sums["tail"] += idle * other_s
