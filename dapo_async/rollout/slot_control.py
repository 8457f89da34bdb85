"""How many sequences an engine runs at once, with `rollout.num_slots: auto`.

In: one observation a second. Out: the number of slots. A pure state machine: it reads no clock.
`rollout/sglang/engine.py` calls it.

The rule is additive increase, multiplicative decrease (AIMD), as in the congestion control of TCP
(Chiu and Jain 1989). Its unit of time is the round: as many sequences end as there are slots. More
slots show their effect on speed and memory only after that.

    start      the KV memory of the server / the longest sequence
    search     the slots double each round while memory is left; a doubling that does not pay is
               taken back, and tried again later
    grow       after the first cut: by `step` a round, while KV use is low and no request queues
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
PROBE_ROUNDS = 16  # so long a number that was too large is not tried again


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
        # Slots and speed of the round before, if the slots were doubled since.
        self._before: tuple[int, float] | None = None
        self._ceiling, self._rounds_since_cut = most, 0  # a number that was too large, less one
        # Growth that did not make the engine faster is tried again after so many rounds.
        self._rounds_to_search = 0
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
        self._searching, self._before = False, None
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
        before, self._before = self._before, None
        if not was_full or crowded:
            return
        if before is not None and not _pays(before, (self.slots, speed)):
            self.slots, self._rounds_to_search = before[0], PROBE_ROUNDS
        self._rounds_to_search = max(0, self._rounds_to_search - 1)
        if self._rounds_to_search:
            return
        fits = int(self.slots * HIGH_USE / use) if use > 0 else self._most
        wanted = 2 * self.slots if self._searching else self.slots + self._step
        larger = min(wanted, fits, self._ceiling, self._most)
        if larger > self.slots:
            # A small step changes the speed by less than its noise.
            self._before = (self.slots, speed) if self._searching else None
            self.slots = larger

    def _start_round(self, now: Observation) -> None:
        self._round = now
        self._num_seen = self._num_full = 0
        self._peak_use = 0.0


def _pays(before: tuple[int, float], now: tuple[int, float]) -> bool:
    """Whether more slots made the engine faster: two pairs of slots and speed."""
    growth = now[0] / before[0] - 1.0
    return now[1] >= before[1] * (1.0 + WORTH * growth)
