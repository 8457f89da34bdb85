"""How many sequences an engine runs at once, with `rollout.num_slots: auto`.

In: one observation a second. Out: the number of slots. A pure state machine: it reads no clock.
`rollout/sglang/engine.py` calls it.

The rule is additive increase, multiplicative decrease (AIMD), as in the congestion control of TCP
(Chiu and Jain 1989). Its unit of time is the round: as many sequences end as there are slots. More
slots show their effect on speed and memory only after that.

    start      the KV memory of the server / the longest sequence
    search     the slots double each round, as long as memory is left and the speed grows
    grow       later by `step` a round, while KV use is low and no request queues
    cut        requests queue for memory: to the number that runs, but at most by half;
               a sequence was retracted: the same, and at least by a tenth
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

HIGH_USE = 0.9  # of the KV memory: no growth beyond it
WORTH = 0.2  # doubled slots must make the engine at least so much faster
CUT, LARGEST_CUT = 0.9, 0.5  # of the slots remain after a retraction, and at least
PATIENCE = 3  # observations in which requests queue: a prefill takes less, or makes progress
QUEUE_SHARE = 0.1  # of the slots: shorter queues are no sign of too little memory
DRAINED = 0.9  # a queue that shrinks to this share within an observation waits for a prefill
FULL = 0.9  # of the slots are in use: else a larger number has no effect
PROBE_ROUNDS = 16  # so long after a cut the number that was cut is tried again


@dataclass(frozen=True, slots=True)
class Observation:
    """An engine at one moment. Counts and seconds are since its start."""

    running: int  # sequences that decode
    queued: int  # requests that wait at the server
    kv_use: float  # share of the KV memory
    retractions: int  # running sequences that lost their memory and were queued again
    ended: int  # sequences
    generated: int  # tokens
    running_s: float  # in which at least one sequence ran


def slots_at_start(capacity_tokens: int, longest: int) -> int:
    """So many of the longest sequences have memory for their keys and values at the same time."""
    return max(1, capacity_tokens // longest)


class SlotControl:
    """The number of slots of one engine, between `least` and `most`."""

    def __init__(self, *, start: int, least: int, most: int, step: int | None = None) -> None:
        """`step`: growth per round after the search; by default a quarter of `least`."""
        assert 1 <= least <= most, f"least {least}, most {most}"
        self._least, self._most = least, most
        self._step = step or max(1, least // 4)
        self.slots = min(max(start, least), most)
        self._searching = True
        self._before: tuple[int, float] | None = None  # slots and speed of the round before
        self._ceiling, self._rounds_since_cut = most, 0  # a number that was too large, less one
        self._knee = most  # more slots did not make the engine faster
        self._draining = False  # after a cut, until only `slots` requests are at the server
        self._crowded = 0  # successive observations with requests that queue for memory
        self._last: Observation | None = None
        self._ran: deque[int] = deque(maxlen=PATIENCE)  # sequences, in the newest observations
        self._round: Observation | None = None  # the observation that began it
        self._num_seen = self._num_full = 0  # observations of the round; of them, with full slots
        self._peak_use = 0.0  # of the KV memory, in the round

    def observe(self, now: Observation) -> int:
        """The number of slots from now on."""
        last, self._last = self._last, now
        self._ran.append(now.running)
        if last is None or now.ended < last.ended or now.retractions < last.retractions:
            self._start_round(now)  # the first observation, or the first after a restart
            return self.slots
        at_server = now.running + now.queued
        self._draining = self._draining and at_server > self.slots
        self._crowded = self._crowded + 1 if self._queues(now, last) else 0
        retracted = now.retractions > last.retractions
        if retracted or self._crowded >= PATIENCE:
            if not self._draining:
                self._cut(now, most=int(CUT * self.slots) if retracted else self.slots - 1)
            return self.slots
        self._num_seen += 1
        self._num_full += at_server >= FULL * self.slots
        self._peak_use = max(self._peak_use, now.kv_use)
        if self._round is not None and now.ended - self._round.ended >= self.slots:
            self._end_round(self._round, now)
        return self.slots

    def _queues(self, now: Observation, last: Observation) -> bool:
        """Whether requests queue for memory, and not only for their prefill."""
        return now.queued > max(1.0, QUEUE_SHARE * self.slots) and (
            now.queued >= DRAINED * last.queued
        )

    def _cut(self, now: Observation, *, most: int) -> None:
        fewest = int(LARGEST_CUT * self.slots)
        self._ceiling, self._rounds_since_cut = max(self._least, self.slots - 1), 0
        self.slots = max(self._least, fewest, min(most, max(self._ran)))
        self._draining, self._crowded = True, 0
        self._searching = False
        self._start_round(now)

    def _end_round(self, began: Observation, now: Observation) -> None:
        seconds = now.running_s - began.running_s
        speed = (now.generated - began.generated) / seconds if seconds > 0 else 0.0
        was_full = self._num_full >= FULL * self._num_seen
        crowded, use = self._crowded > 0, self._peak_use
        self._start_round(now)
        self._rounds_since_cut += 1
        if self._rounds_since_cut >= PROBE_ROUNDS:
            self._ceiling = self._most
        if not was_full or crowded:
            self._before = None
            return
        if self._searching and self._before is not None and not self._paid_off(speed):
            self.slots, self._knee = self._before[0], self._before[0]
            self._searching, self._before = False, None
            return
        self._before = (self.slots, speed)
        fits = int(self.slots * HIGH_USE / use) if use > 0 else self._most
        wanted = 2 * self.slots if self._searching else self.slots + self._step
        self._searching = self._searching and wanted <= min(fits, self._most)
        self.slots = max(self.slots, min(wanted, fits, self._ceiling, self._knee, self._most))

    def _paid_off(self, speed: float) -> bool:
        """Whether the newest growth made the engine faster."""
        assert self._before is not None
        slots, before = self._before
        growth = self.slots / slots - 1.0
        return growth <= 0 or speed >= before * (1.0 + WORTH * growth)

    def _start_round(self, now: Observation) -> None:
        self._round = now
        self._num_seen = self._num_full = 0
        self._peak_use = 0.0
