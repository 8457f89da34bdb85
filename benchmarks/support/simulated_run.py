"""A run in virtual time: the real buffer, pacer and slot demand; engines and learner are delays.

The unit of time is one token of one running sequence, whatever else runs. Lengths are drawn from
(seed, group), so all rules and bounds get the same groups. Two calls give the same result.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import NormalDist, mean

from dapo_async.replay import Pacer, ReplayBuffer, dynamic_sampling
from dapo_async.rollout.slot_demand import GroupInFlight, SlotDemand
from dapo_async.types import GroupFacts, TrainBatch

SHARED = 0.5  # of the variance of log lengths: all siblings of a group have it
PUBLISH = 0.05  # of a step, until every engine serves the new weights
UNLIMITED = 10_000  # a staleness bound that no run reaches


@dataclass(frozen=True, slots=True)
class Shape:
    """What a run has, and how long its responses are."""

    num_slots: int  # of one engine
    group_size: int
    groups_per_step: int
    max_staleness: int
    num_workers: int = 1
    tail: float = 1.0  # sigma of the lognormal lengths; 0: all equal
    mean_tokens: int = 500
    max_tokens: int = 2000  # longer responses are cut
    acceptance: float = 1.0  # share of the groups that filters keep
    split: float = 1.0  # what full slots produce, over what the learner can consume
    num_steps: int = 60
    by_siblings: bool = True  # the rule of the worker; False: it asks by whole groups

    @property
    def production(self) -> float:
        """Accepted groups per time unit of engines whose slots are all occupied."""
        sequences = self.num_workers * self.num_slots / self.mean_tokens
        return sequences / self.group_size * self.acceptance

    @property
    def step_time(self) -> float:
        """Of the learner."""
        return self.groups_per_step * self.split / self.production


@dataclass(slots=True)
class Outcome:
    """What a simulated run came to between its first and its last steps."""

    occupancy: float  # mean share of occupied slots
    rate: float  # groups per time unit, over min(production, consumption)
    staleness: float  # mean over groups, of their oldest version
    most_in_flight: int  # sequences on one engine


class WholeGroups:
    """The rule before `SlotDemand`: a group counts until its last sibling has ended."""

    def __init__(self, *, num_slots: int, group_size: int) -> None:
        self._capacity, self._count = -(-num_slots // group_size) + 1, 0

    @property
    def num_groups(self) -> int:
        return max(0, self._capacity - self._count)

    def start(self) -> WholeGroups:
        self._count += 1
        return self

    def end_siblings(self, count: int) -> None:
        """A sibling counts as long as its group."""

    def stop(self) -> None:
        self._count -= 1


@cache
def _scale(tail: float, cap: float) -> float:
    """The factor by which min(factor × exp(tail × z), cap) has mean 1 for a normal z."""
    normal = NormalDist()
    values = [math.exp(tail * normal.inv_cdf((k + 0.5) / 4000)) for k in range(4000)]
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        below = mean(min(middle * value, cap) for value in values) < 1
        low, high = (middle, high) if below else (low, middle)
    return low


def lengths(shape: Shape, group_id: int) -> Iterator[int]:
    """Of the siblings of a group, in tokens."""
    rng = random.Random(group_id)
    cap = shape.max_tokens / shape.mean_tokens
    common = math.sqrt(SHARED) * rng.gauss(0, 1)
    for _ in range(shape.group_size):
        z = common + math.sqrt(1 - SHARED) * rng.gauss(0, 1)
        share = min(_scale(shape.tail, cap) * math.exp(shape.tail * z), cap)
        yield max(1, round(share * shape.mean_tokens))


class _Engine:
    """Slots, and the siblings that wait for one in the order of their groups."""

    def __init__(self, shape: Shape) -> None:
        rule = SlotDemand if shape.by_siblings else WholeGroups
        self.demand = rule(num_slots=shape.num_slots, group_size=shape.group_size)
        self.running = 0
        self.waiting: deque[tuple[int, int]] = deque()  # group id, tokens


@dataclass(slots=True)
class _Open:
    """A group on an engine."""

    left: int  # siblings
    version: int  # served at its admission
    demand: GroupInFlight | WholeGroups


@dataclass(slots=True)
class _Window:
    """Sums since a moment."""

    since: float
    slot_time: float = 0.0
    groups: int = 0
    staleness: list[int] = field(default_factory=list)


class SimulatedRun:
    """One run of `shape`; `run` plays it to its end."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.now, self.version = shape, 0.0, 0
        self.buffer = ReplayBuffer(
            groups_per_step=shape.groups_per_step,
            max_staleness=shape.max_staleness,
            num_steps=shape.num_steps,
            filters=(dynamic_sampling,),
            max_rejected_in_a_row=10**9,
            incarnation="simulation",
        )
        self.buffer.serve(0)
        credits = (shape.max_staleness + 1) * shape.groups_per_step
        self.pacer = Pacer(groups_per_step=shape.groups_per_step, credits=credits)
        self.engines = [_Engine(shape) for _ in range(shape.num_workers)]
        self.turns = deque(range(shape.num_workers))  # the engine that waited longest is first
        self.open: dict[int, _Open] = {}
        self.events: list[tuple[float, int, str, int, int]] = []
        self.num_events = self.occupied = self.most_in_flight = 0
        self.asked = False
        self.training: TrainBatch | None = None
        self.trained: TrainBatch | None = None  # it waits for the end of the publish before
        self.publishing: TrainBatch | None = None
        self.window: _Window | None = None
        self.outcome: Outcome | None = None

    def run(self) -> Outcome:
        """From the first admission to the last step."""
        while True:
            self._publish()
            self._take()
            self._admit()
            if not self.events:
                break
            time, _, name, engine, group_id = heapq.heappop(self.events)
            if self.window is not None:
                self.window.slot_time += self.occupied * (time - self.now)
            self.now = time
            match name:
                case "end":
                    self._end_sibling(engine, group_id)
                case "step":
                    self._end_step()
                case "serve":
                    self._serve()
        assert self.buffer.steps_left == 0, self.buffer.explain_wait(self.version)
        assert self.buffer.counts.evicted == 0
        assert self.outcome is not None
        return self.outcome

    def _after(self, delay: float, name: str, engine: int = -1, group_id: int = -1) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (self.now + delay, self.num_events, name, engine, group_id))

    def _admit(self) -> None:
        """Each engine in turn gets what it asks for, as far as there are credits."""
        out = self.buffer.num_generating + self.buffer.num_buffered
        admissible = min(self.buffer.admissible(), self.pacer.room(self.now, out=out))
        for number in tuple(self.turns):
            engine = self.engines[number]
            count = min(admissible, engine.demand.num_groups)
            if count:
                self.turns.remove(number)
                self.turns.append(number)
            for _ in range(count):
                self._start(number, engine)
            admissible -= count
        start_s = self.pacer.next_start_s(self.now, out=out)
        if start_s is not None and start_s > self.now and self.buffer.admissible():
            self._after(start_s - self.now, "wake")

    def _start(self, number: int, engine: _Engine) -> None:
        group_id, size = self.buffer.admit(f"rollout-{number}"), self.shape.group_size
        assert self.buffer.served_version is not None
        self.open[group_id] = _Open(size, self.buffer.served_version, engine.demand.start())
        engine.waiting.extend((group_id, tokens) for tokens in lengths(self.shape, group_id))
        self._fill(number, engine)
        self.most_in_flight = max(self.most_in_flight, engine.running + len(engine.waiting))

    def _fill(self, number: int, engine: _Engine) -> None:
        while engine.waiting and engine.running < self.shape.num_slots:
            group_id, tokens = engine.waiting.popleft()
            engine.running += 1
            self.occupied += 1
            self._after(tokens, "end", number, group_id)

    def _end_sibling(self, number: int, group_id: int) -> None:
        engine, group = self.engines[number], self.open[group_id]
        engine.running -= 1
        self.occupied -= 1
        group.left -= 1
        group.demand.end_siblings(1)
        self._fill(number, engine)
        if group.left == 0:
            del self.open[group_id]
            group.demand.stop()
            kept = random.Random(-1 - group_id).random() < self.shape.acceptance
            accuracies = (1.0, 0.0) if kept else (0.0, 0.0)
            facts = GroupFacts(
                group_id=group_id,
                incarnation="simulation",
                oldest_version=group.version,
                num_versions=1,
                num_tokens=1,
                num_response_tokens=1,
                accuracies=accuracies,
                reasons=(),
            )
            self.buffer.offer(facts, payload=None)

    def _take(self) -> None:
        if self.training is not None or self.trained is not None or not self.buffer.steps_left:
            return
        if not self.asked:
            self.pacer.asks(self.now, finished=self.buffer.num_buffered)
            self.asked = True
        self.training = self.buffer.take(self.version)
        if self.training is None:
            return
        self.pacer.took(self.now)
        self.asked = False
        self._measure(self.training)
        self._after(self.shape.step_time, "step")

    def _measure(self, batch: TrainBatch) -> None:
        """The window is from a fifth of the steps to the step before admissions end."""
        shape, step = self.shape, self.version
        bound = min(shape.max_staleness, shape.num_steps // 5)
        first, last = shape.num_steps // 5, shape.num_steps - bound - 3
        if step == first:
            self.window = _Window(self.now)
        elif self.window is not None and step <= last:
            self.window.groups += len(batch.group_ids)
            self.window.staleness += [step - oldest for oldest in batch.oldest_versions]
            if step == last:
                self._close(self.window)

    def _close(self, window: _Window) -> None:
        shape, elapsed = self.shape, self.now - window.since
        ideal = shape.production / max(1.0, shape.split)
        self.outcome = Outcome(
            occupancy=window.slot_time / elapsed / (shape.num_workers * shape.num_slots),
            rate=window.groups / elapsed / ideal,
            staleness=mean(window.staleness),
            most_in_flight=self.most_in_flight,
        )
        self.window = None

    def _end_step(self) -> None:
        assert self.training is not None
        self.buffer.trained(self.training.group_ids)
        self.version += 1
        self.trained, self.training = self.training, None

    def _publish(self) -> None:
        """One publish at a time: the learner waits with its snapshot for the end of the last."""
        if self.trained is not None and self.publishing is None:
            self.publishing, self.trained = self.trained, None
            self._after(PUBLISH * self.shape.step_time, "serve")

    def _serve(self) -> None:
        assert self.publishing is not None
        self.buffer.serve(self.version if self.trained is None else self.version - 1)
        self.buffer.release(self.publishing.group_ids)
        self.publishing = None


def simulate(shape: Shape) -> Outcome:
    """Plays a run of `shape`."""
    return SimulatedRun(shape).run()


def both_rules(
    group_size: int, *, tail: float, max_staleness: int, num_steps: int
) -> tuple[Outcome, Outcome]:
    """One engine of 128 slots that asks by whole groups, and by siblings; a fast learner."""
    shape = Shape(
        num_slots=128,
        group_size=group_size,
        groups_per_step=256 // group_size,
        max_staleness=max_staleness,
        tail=tail,
        max_tokens=5000,
        split=0.01,
        num_steps=num_steps,
        by_siblings=False,
    )
    return simulate(shape), simulate(replace(shape, by_siblings=True))
