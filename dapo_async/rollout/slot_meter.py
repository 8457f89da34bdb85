"""Time accounting of an engine, in seconds and in slot-seconds; both add up to the elapsed time.

At each moment the engine is in one state, and so is each of its slots:

    dead        the worker can't use the engine: it was lost, or its weights are wrong
    asleep      the learner has the device (model.placement=shared)
    sync        weights are loaded
    running     a sequence runs (its slot: occupied)
    evaluation  a sequence for a held-out prompt runs, and no other one
    queued      none runs, but requests wait at a server, mostly for memory for keys and values
    no_credit   none runs or waits, and the worker waits for an admission
    tail        the same, but it waits for none: mostly before an update with `drain`

The engine records how many sequences ran or were queued, and when it sleeps. The rollout worker
records when it waits
for an admission and when it can't use the engine. The run's metrics read the sums.
"""

from __future__ import annotations

import threading

from dapo_async.rollout.engine import SlotUse, TimeUse
from dapo_async.utils.state_clock import StateClock


class SlotMeter:
    """Integrates the use of an engine over time; thread-safe.

    The number of occupied slots is known only at the end of a decode step, but the worker may start
    or stop waiting for an admission during it. So until a step is recorded, the seconds are counted
    separately by what the worker does.
    """

    def __init__(self, clock: StateClock, *, slots: int) -> None:
        self._clock, self._slots, self._lock = clock, slots, threading.Lock()
        self._start_s = self._since_s = clock.now_s()
        self._running = self._queued = self._heldout = 0
        self._syncing = self._waiting = self._dead = self._asleep = False
        # By whether the slots are dead or asleep (None: neither), and by `_waiting`.
        self._unrecorded_s: dict[tuple[str | None, bool], float] = {}
        self._slot_s = dict.fromkeys(SLOT_STATES, 0.0)
        self._time_s = dict.fromkeys(TIME_STATES, 0.0)

    def spent(
        self, *, running: int, queued: int = 0, heldout: int = 0, syncing: bool = False
    ) -> None:
        """Records the time since the last call: `running` slots were occupied, `heldout` of them by
        held-out prompts, and `queued` other ones queued at a server; or all were in sync.

        `slots` and `time` assume that the same holds until now.
        """
        with self._lock:
            self._running, self._queued, self._syncing = running, queued, syncing
            self._heldout = heldout
            self._record()

    def resize(self, slots: int) -> None:
        """From now on the engine has so many slots."""
        with self._lock:
            self._record()
            self._slots = slots

    def starving(self, on: bool) -> None:
        """From now on the worker waits for an admission (on), or not."""
        with self._lock:
            self._advance()
            self._waiting = on

    def dead(self, on: bool) -> None:
        """From now on the worker can't use the engine (on), or can."""
        with self._lock:
            self._advance()
            self._dead = on

    def asleep(self, on: bool) -> None:
        """From now on the engine has no device memory (on), or has it again."""
        with self._lock:
            self._advance()
            self._asleep = on

    def slots(self) -> SlotUse:
        """The slot-seconds up to now."""
        with self._lock:
            self._record()
            return SlotUse(slots=self._slots, elapsed_s=self._elapsed_s, **self._slot_s)

    def time(self) -> TimeUse:
        """The seconds up to now."""
        with self._lock:
            self._record()
            return TimeUse(elapsed_s=self._elapsed_s, **self._time_s)

    @property
    def _elapsed_s(self) -> float:
        return self._since_s - self._start_s

    def _advance(self) -> None:
        out = "dead" if self._dead else "asleep" if self._asleep else None
        now_s, worker = self._clock.now_s(), (out, self._waiting)
        before_s = self._unrecorded_s.get(worker, 0.0)
        self._unrecorded_s[worker] = before_s + now_s - self._since_s
        self._since_s = now_s

    def _record(self) -> None:
        self._advance()
        for (out, waiting), seconds in self._unrecorded_s.items():
            self._time_s[self._state(out, waiting)] += seconds
            for state, count in self._slot_states(out, waiting).items():
                self._slot_s[state] += count * seconds
        self._unrecorded_s.clear()

    def _state(self, out: str | None, waiting: bool) -> str:
        """Of the engine."""
        if out or self._syncing:
            return out or "sync"
        if self._running:
            return "running" if self._running > self._heldout else "evaluation"
        if self._queued:
            return "queued"
        return "no_credit" if waiting else "tail"

    def _slot_states(self, out: str | None, waiting: bool) -> dict[str, int]:
        """How many slots are in each state.

        After a cut, more requests than slots may be at the server: each counts as a slot.
        """
        in_use = self._running + self._queued
        slots = max(self._slots, in_use)
        if out or self._syncing:
            return {out or "sync": slots}
        return {
            "occupied": self._running - self._heldout,
            "evaluation": self._heldout,
            "queued": self._queued,
            "no_credit" if waiting else "tail": slots - in_use,
        }


REST = ("evaluation", "queued", "no_credit", "tail", "sync", "dead", "asleep")
SLOT_STATES = ("occupied", *REST)
TIME_STATES = ("running", *REST)
