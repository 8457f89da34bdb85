"""The number of slots follows memory, queue and speed: simulated engines and a recorded trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest

from dapo_async.rollout.slot_control import Observation, SlotControl, slots_at_start

PROMPT = 20


@dataclass
class SimulatedServer:
    """Decodes 20 steps a second, up to `knee` sequences at full speed each, then slower.

    A request starts if its prompt and half of what others may still need fit. When memory is full,
    the youngest sequences lose theirs and queue again.
    """

    capacity: int  # tokens
    mean: float = 200.0
    knee: int = 10_000
    reserved: float = 0.1  # of `longest`, for each running sequence that may still grow
    longest: int = 800
    demand: int = 10_000  # sequences that the worker would run
    seed: int = 0
    running: list[list[int]] = field(default_factory=list)  # length so far, length at the end
    queue: list[list[int]] = field(default_factory=list)
    retractions: int = 0
    ended: int = 0
    generated: int = 0
    running_s: float = 0.0

    def __post_init__(self) -> None:
        self._noise = np.random.default_rng(self.seed)

    @property
    def used(self) -> int:
        return sum(length + PROMPT for length, _ in self.running)

    def second(self, slots: int) -> Observation:
        speed = 20.0 / max(1.0, len(self.running) / self.knee)
        for _ in range(round(speed)):
            self._refill(slots)
            self._step()
        self.running_s += 1.0
        return Observation(
            running=len(self.running),
            queued=len(self.queue),
            kv_use=self.used / self.capacity,
            retractions=self.retractions,
            ended=self.ended,
            generated=self.generated,
            running_s=self.running_s,
        )

    def _refill(self, slots: int) -> None:
        while len(self.running) + len(self.queue) < min(slots, self.demand):
            length = int(min(self.longest, 1 + self._noise.exponential(self.mean)))
            self.queue.append([0, length])
        while self.queue:
            growth = self.reserved * self.longest * (len(self.running) + 1)
            if self.used + self.queue[0][0] + PROMPT + growth > self.capacity:
                return
            self.running.append(self.queue.pop(0))

    def _step(self) -> None:
        while self.used + len(self.running) > self.capacity and len(self.running) > 1:
            self.queue.insert(0, self.running.pop())
            self.retractions += 1
        for sequence in self.running:
            sequence[0] += 1
        self.generated += len(self.running)
        self.ended += sum(length >= end for length, end in self.running)
        self.running = [each for each in self.running if each[0] < each[1]]


def play(server: SimulatedServer, control: SlotControl, seconds: int) -> list[int]:
    """The number of slots after each second."""
    return [control.observe(server.second(control.slots)) for _ in range(seconds)]


@cache
def best_speed(capacity: int) -> float:
    """Tokens per second with the best fixed number of slots."""
    servers = {slots: SimulatedServer(capacity=capacity) for slots in (64, 128, 256)}
    for slots, server in servers.items():
        for _ in range(100):
            server.second(slots)
    return max(server.generated for server in servers.values()) / 100


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("start", "capacity"), [(8, 16_000), (64, 16_000), (400, 16_000), (8, 60_000)]
)
def test_slots_converge_to_what_the_memory_holds(start: int, capacity: int, seed: int) -> None:
    server = SimulatedServer(capacity=capacity, seed=seed)
    control = SlotControl(start=start, least=8, most=1024)
    slots = play(server, control, 400)
    settled = slots[150:]
    # Each sequence reserves 80 tokens besides its own; memory for so many of the mean length.
    fits = capacity / (PROMPT + server.mean / 2 + 80)
    assert 0.5 * fits < np.mean(settled) < 1.3 * fits, (np.mean(settled), fits)
    assert max(settled) / min(settled) < 1.7, "it oscillates"
    assert server.generated / 400 > 0.8 * best_speed(capacity)


def test_slots_stop_growing_where_more_make_the_engine_no_faster() -> None:
    server = SimulatedServer(capacity=10_000_000, knee=32)
    slots = play(server, SlotControl(start=8, least=8, most=1024), 400)
    settled = slots[100:]
    usual = int(np.median(settled))
    assert 32 <= usual <= 128
    assert set(settled) == {usual, 2 * usual}, "it tries the double now and then"
    assert settled.count(2 * usual) < 0.25 * len(settled)


def test_slots_that_nobody_fills_do_not_grow() -> None:
    server = SimulatedServer(capacity=10_000_000, demand=40)
    slots = play(server, SlotControl(start=64, least=8, most=1024), 100)
    assert set(slots) == {64}


def seen(**changes: float) -> Observation:
    values = {
        "running": 64, "queued": 0, "kv_use": 0.5, "retractions": 0, "ended": 0, "generated": 0,
        "running_s": 0.0,
    }  # fmt: skip
    return Observation(**{**values, **changes})  # type: ignore[arg-type]


def test_a_retraction_cuts_at_once_and_only_once_until_the_surplus_has_left() -> None:
    control = SlotControl(start=64, least=16, most=1024)
    control.observe(seen())
    assert control.observe(seen(retractions=2, running=60, queued=4)) == 57
    for second in range(5):
        again = seen(retractions=3 + second, running=60, queued=4)
        assert control.observe(again) == 57, "the requests at the server are not fewer yet"
    for _ in range(3):
        control.observe(seen(retractions=7, running=50))
    assert control.observe(seen(retractions=8, running=50, queued=7)) == 50


def test_a_lasting_queue_cuts_to_what_runs_but_at_most_by_half() -> None:
    control = SlotControl(start=64, least=8, most=1024)
    slots = [control.observe(seen(running=16, queued=48)) for _ in range(4)]
    assert slots == [64, 64, 64, 32]
    slots = [control.observe(seen(running=16, queued=16)) for _ in range(4)]
    assert slots[-1] == 16


def test_a_queue_that_shrinks_is_a_prefill() -> None:
    control = SlotControl(start=64, least=8, most=1024)
    control.observe(seen())
    for queued in (60, 48, 36, 24, 12, 0):
        assert control.observe(seen(running=64 - queued, queued=queued)) == 64


def test_slots_stay_between_one_group_and_the_most() -> None:
    control = SlotControl(start=5, least=16, most=24)
    assert control.slots == 16
    for retractions in range(20):
        assert control.observe(seen(running=2, queued=0, retractions=retractions)) == 16
    assert SlotControl(start=500, least=16, most=24).slots == 24
    server = SimulatedServer(capacity=1_000_000)
    assert max(play(server, SlotControl(start=16, least=16, most=24), 100)) == 24


def test_a_restarted_server_begins_with_the_slots_of_before() -> None:
    control = SlotControl(start=64, least=8, most=1024)
    control.observe(seen(retractions=9, ended=900))
    assert control.observe(seen(retractions=0, ended=900)) == 64
    assert control.observe(seen(retractions=1, ended=901)) == 57


def test_start_is_memory_over_the_longest_sequence() -> None:
    assert slots_at_start(790_000, 4096) == 192
    assert slots_at_start(100, 4096) == 1
