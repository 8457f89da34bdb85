"""A run in virtual time: the real buffer, pacer and slot demand; engines and learner are delays.

The unit of time is one token of one running sequence, whatever else runs. Lengths are drawn from
(seed, group), so all rules and bounds get the same groups. Two calls give the same result. The
control plane takes no time: what a run of the same shape loses on top is its cost.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import NormalDist, fmean
from typing import Any

from dapo_async.replay import Pacer, ReplayBuffer, dynamic_sampling
from dapo_async.rollout.slot_demand import GroupInFlight, SlotDemand
from dapo_async.types import GroupFacts, TrainBatch

SEEDS = 10**6  # between the groups of two seeds
UNLIMITED = 10_000  # a staleness bound that no run reaches


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long responses are: lognormal, and cut."""

    tail: float = 1.0  # sigma of the lognormal; 0: all equal
    shared: float = 0.5  # of the variance of log lengths: all siblings of a group have it
    mean_tokens: int = 500
    max_tokens: int = 2000  # longer responses are cut
    seed: int = 0

    def of_group(self, group_id: int, group_size: int) -> tuple[int, ...]:
        """Of the siblings, in tokens."""
        return _lengths(self, group_id, group_size)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a run has, and how long its responses are."""

    num_slots: int  # of one engine
    group_size: int
    groups_per_step: int
    max_staleness: int
    num_workers: int = 1
    lengths: Lengths = Lengths()
    acceptance: float = 1.0  # share of the groups that filters keep
    split: float = 1.0  # what full slots produce, over what the learner can consume
    num_minibatches: int = 1
    num_steps: int = 60
    warm_up: float = 0.2  # of the steps: not measured
    publish: float = 0.05  # of a step, until every engine serves the new weights
    jitter: float = 0.0  # a step takes up to this share longer or shorter
    paced: bool = True  # False: eager admission
    by_siblings: bool = True  # the rule of the worker; False: it asks by whole groups

    @property
    def production(self) -> float:
        """Accepted groups per time unit of engines whose slots are all occupied."""
        sequences = self.num_workers * self.num_slots / self.lengths.mean_tokens
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
    staleness: float  # mean over tokens
    learner_waits: float  # share of time
    waits_for_deadlines: float  # of these: enough groups are finished, but none may be left over
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
        below = fmean(min(middle * value, cap) for value in values) < 1
        low, high = (middle, high) if below else (low, middle)
    return low


@cache
def _lengths(lengths: Lengths, group_id: int, group_size: int) -> tuple[int, ...]:
    rng = random.Random(lengths.seed * SEEDS + group_id)
    cap = lengths.max_tokens / lengths.mean_tokens
    factor = _scale(lengths.tail, cap)
    common = math.sqrt(lengths.shared) * rng.gauss(0, 1)
    drawn = []
    for _ in range(group_size):
        z = common + math.sqrt(1 - lengths.shared) * rng.gauss(0, 1)
        share = min(factor * math.exp(lengths.tail * z), cap)
        drawn.append(max(1, round(share * lengths.mean_tokens)))
    return tuple(drawn)


def is_kept(shape: Shape, group_id: int) -> bool:
    """Whether filters keep the group."""
    seed = -1 - shape.lengths.seed * SEEDS - group_id
    return random.Random(seed).random() < shape.acceptance


class _Engine:
    """Slots, and the siblings that wait for one in the order of their groups."""

    def __init__(self, shape: Shape) -> None:
        rule = SlotDemand if shape.by_siblings else WholeGroups
        self.demand = rule(num_slots=shape.num_slots, group_size=shape.group_size)
        self.running = 0
        self.waiting: deque[tuple[int, int]] = deque()  # group id, tokens


@dataclass(slots=True)
class _Open:
    """A group that was admitted and is not trained."""

    left: int  # siblings on the engine
    version: int  # served at its admission
    demand: GroupInFlight | WholeGroups
    tokens: int = 0  # of the siblings that have ended
    versions: float = 0.0  # sum over these tokens


@dataclass(slots=True)
class _Window:
    """Sums since a moment."""

    since: float
    slot_time: float = 0.0
    learner_waits: float = 0.0
    waits_for_deadlines: float = 0.0
    groups: int = 0
    tokens: int = 0
    staleness: float = 0.0  # over tokens


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
            num_minibatches=shape.num_minibatches,
        )
        credits = (shape.max_staleness + 1) * shape.groups_per_step
        self.pacer = Pacer(groups_per_take=self.buffer.groups_per_take, credits=credits)
        self.engines = [_Engine(shape) for _ in range(shape.num_workers)]
        self.turns = deque(range(shape.num_workers))  # the engine that waited longest is first
        self.open: dict[int, _Open] = {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = self.occupied = self.most_in_flight = 0
        self.served, self.served_since = 0, 0.0  # the version that all engines serve
        self.past_versions = 0.0  # integral of the served version until then
        self.buffer.serve(0)
        self.wakes_at = 0.0  # the last time that the pacer named
        self.asked = False
        self.ahead = 0  # the version whose minibatch is taken next
        self.next_batch: TrainBatch | None = None  # taken; the learner has not got it
        self.training: TrainBatch | None = None
        self.of_step: tuple[int, ...] = ()  # trained groups of the open step
        self.trained: tuple[int, ...] = ()  # of a step that waits for the end of the publish before
        self.publishing: tuple[int, ...] = ()
        self.steps = random.Random(shape.lengths.seed)
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
            time, _, happens = heapq.heappop(self.events)
            if self.window is not None:
                self._account(self.window, time - self.now)
            self.now = time
            happens()
        assert self.buffer.steps_left == 0, self.buffer.explain_wait(self.version)
        assert self.buffer.counts.evicted == 0
        assert self.outcome is not None
        return self.outcome

    def _account(self, window: _Window, elapsed: float) -> None:
        window.slot_time += self.occupied * elapsed
        if self.asked:
            window.learner_waits += elapsed
            if self.buffer.num_buffered >= self.buffer.groups_per_take:
                window.waits_for_deadlines += elapsed

    def _after(self, delay: float, happens: Callable[[], None]) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (self.now + delay, self.num_events, happens))

    @property
    def num_out(self) -> int:
        """Groups that generate or are finished, and that the learner has not got."""
        ahead = len(self.next_batch.group_ids) if self.next_batch is not None else 0
        return self.buffer.num_generating + self.buffer.num_buffered + ahead

    def _admit(self) -> None:
        """Each engine in turn gets what it asks for, as far as there are credits."""
        admissible = self.buffer.admissible()
        if self.shape.paced:
            room = self.pacer.room(self.now, out=self.num_out, served_version=self.served)
            admissible = min(admissible, room)
        for number in tuple(self.turns):
            engine = self.engines[number]
            count = min(admissible, engine.demand.num_groups)
            if count:
                self.turns.remove(number)
                self.turns.append(number)
            for _ in range(count):
                self._start(number, engine)
            admissible -= count
        start = self.pacer.next_start_s(self.now, served_version=self.served)
        if start is not None and start != self.wakes_at:
            self.wakes_at = start
            self._after(start - self.now, lambda: None)

    def _start(self, number: int, engine: _Engine) -> None:
        group_id, size = self.buffer.admit(f"rollout-{number}"), self.shape.group_size
        self.open[group_id] = _Open(size, self.served, engine.demand.start())
        lengths = self.shape.lengths.of_group(group_id, size)
        engine.waiting.extend((group_id, tokens) for tokens in lengths)
        self._fill(engine)
        self.most_in_flight = max(self.most_in_flight, engine.running + len(engine.waiting))

    def _fill(self, engine: _Engine) -> None:
        while engine.waiting and engine.running < self.shape.num_slots:
            group_id, tokens = engine.waiting.popleft()
            engine.running += 1
            self.occupied += 1
            ends = partial(self._end_sibling, engine, group_id, tokens, self._versions())
            self._after(tokens, ends)

    def _versions(self) -> float:
        """The integral of the served version until now."""
        return self.past_versions + self.served * (self.now - self.served_since)

    def _end_sibling(self, engine: _Engine, group_id: int, tokens: int, before: float) -> None:
        group = self.open[group_id]
        engine.running -= 1
        self.occupied -= 1
        group.left -= 1
        group.tokens += tokens
        group.versions += self._versions() - before
        group.demand.end_siblings(1)
        self._fill(engine)
        if group.left == 0:
            group.demand.stop()
            self._offer(group_id, group.version)

    def _offer(self, group_id: int, version: int) -> None:
        kept = is_kept(self.shape, group_id)
        if not kept:
            del self.open[group_id]
        facts = GroupFacts(
            group_id=group_id,
            incarnation="simulation",
            oldest_version=version,
            num_versions=1,
            num_tokens=1,
            num_response_tokens=1,
            accuracies=(1.0, 0.0) if kept else (0.0, 0.0),
            reasons=(),
        )
        self.buffer.offer(facts, payload=None)

    def _take(self) -> None:
        is_idle = self.training is None and not self.trained
        has_more = self.next_batch is not None or self.buffer.steps_left
        if is_idle and has_more and not self.asked:
            finished = self.num_out - self.buffer.num_generating
            engines_wait = any(engine.demand.num_groups for engine in self.engines)
            self.pacer.asks(
                self.now, version=self.version, finished=finished, engines_wait=engines_wait
            )
            self.asked = True
        self._take_ahead()
        if self.asked and self.next_batch is not None:
            batch, self.next_batch, self.asked = self.next_batch, None, False
            self.training, self.ahead = batch, batch.learner_version + batch.closes_step
            self.pacer.took(self.now)
            self._measure(batch)
            jitter = 1 + self.shape.jitter * self.steps.uniform(-1, 1)
            minibatch_time = self.shape.step_time / self.shape.num_minibatches
            self._after(minibatch_time * jitter, self._end_minibatch)
            self._take_ahead()

    def _take_ahead(self) -> None:
        """As the replay actor: the next batch is taken as soon as it is complete."""
        if self.next_batch is None and self.buffer.steps_left and self.buffer.can_take(self.ahead):
            self.next_batch = self.buffer.take(self.ahead)

    def _measure(self, batch: TrainBatch) -> None:
        """The window is from the warm-up to the step before admissions end."""
        shape, step = self.shape, self.version
        bound = min(shape.max_staleness, shape.num_steps // 5)
        first, last = round(shape.warm_up * shape.num_steps), shape.num_steps - bound - 3
        groups = [self.open.pop(group_id) for group_id in batch.group_ids]
        if step == first and self.window is None:
            self.window = _Window(self.now)
        elif self.window is not None and step <= last:
            self.window.groups += len(groups)
            self.window.tokens += sum(group.tokens for group in groups)
            self.window.staleness += sum(step * group.tokens - group.versions for group in groups)
            if step == last and batch.closes_step:
                self._close(self.window)

    def _close(self, window: _Window) -> None:
        shape, elapsed = self.shape, self.now - window.since
        ideal = shape.production / max(1.0, shape.split)
        self.outcome = Outcome(
            occupancy=window.slot_time / elapsed / (shape.num_workers * shape.num_slots),
            rate=window.groups / elapsed / ideal,
            staleness=window.staleness / window.tokens,
            learner_waits=window.learner_waits / elapsed,
            waits_for_deadlines=window.waits_for_deadlines / elapsed,
            most_in_flight=self.most_in_flight,
        )
        self.window = None

    def _end_minibatch(self) -> None:
        assert self.training is not None
        batch, self.training = self.training, None
        self.buffer.trained(batch.group_ids)
        self.of_step += batch.group_ids
        if batch.closes_step:
            self.version += 1
            self.trained, self.of_step = self.of_step, ()

    def _publish(self) -> None:
        """One publish at a time: the learner waits with its snapshot for the end of the last."""
        if self.trained and not self.publishing:
            self.publishing, self.trained = self.trained, ()
            self._after(self.shape.publish * self.shape.step_time, self._serve)

    def _serve(self) -> None:
        self.past_versions, self.served_since = self._versions(), self.now
        self.served = self.version - bool(self.trained)
        self.buffer.serve(self.served)
        self.buffer.release(self.publishing)
        self.publishing = ()


def simulate(shape: Shape) -> Outcome:
    """Plays a run of `shape`."""
    return SimulatedRun(shape).run()


def fleet(
    *,
    split: float,
    response_steps: float,
    groups_per_step: int = 32,
    group_size: int = 8,
    acceptance: float = 0.75,
    lengths: Lengths = Lengths(shared=0.0),
    **others: Any,
) -> Shape:
    """Two engines with as many slots as give `split`, if a mean response takes `response_steps`."""
    sequences = split * groups_per_step / acceptance * group_size * response_steps
    return Shape(
        num_workers=2,
        num_slots=max(1, round(sequences / 2)),
        groups_per_step=groups_per_step,
        group_size=group_size,
        acceptance=acceptance,
        split=split,
        lengths=lengths,
        **others,
    )


def both_rules(
    group_size: int, *, tail: float, max_staleness: int, num_steps: int
) -> tuple[Outcome, Outcome]:
    """One engine of 128 slots that asks by whole groups, and by siblings; a fast learner."""
    shape = Shape(
        num_slots=128,
        group_size=group_size,
        groups_per_step=256 // group_size,
        max_staleness=max_staleness,
        lengths=Lengths(tail=tail, max_tokens=5000),
        split=0.01,
        num_steps=num_steps,
        by_siblings=False,
    )
    return simulate(shape), simulate(replace(shape, by_siblings=True))
