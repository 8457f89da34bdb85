"""Runs of a simple shape on the planner's simulator, for benchmarks and tests.

The unit of time is one token of one running sequence, whatever else runs. Two calls give the same
result. The control plane takes no time: what a run of the same shape loses on top is its cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dapo_async.planner import EngineSpeed, LearnerSpeed, Lengths, Scenario, SimulatedRun
from dapo_async.replay.slot_demand import SlotDemand

UNLIMITED = 10_000  # a staleness bound that no run reaches
INDEPENDENT = Lengths(shared=0.0)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a run has, and how long its responses are."""

    num_slots: int  # of one engine
    group_size: int
    groups_per_step: int
    max_staleness: int
    num_workers: int = 1
    lengths: Lengths = field(default_factory=Lengths)
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

    @property
    def scenario(self) -> Scenario:
        """The same for the planner."""
        return Scenario(
            num_engines=self.num_workers,
            engine=EngineSpeed.constant(1.0, self.num_slots),
            learner=LearnerSpeed(
                token_s=0.0, group_s=self.step_time / self.groups_per_step, jitter=self.jitter
            ),
            lengths=self.lengths,
            group_size=self.group_size,
            groups_per_step=self.groups_per_step,
            num_minibatches=self.num_minibatches,
            max_staleness=self.max_staleness,
            num_steps=self.num_steps,
            warm_up_steps=round(self.warm_up * self.num_steps),
            acceptance=(self.acceptance, self.acceptance),
            admission="paced" if self.paced else "eager",
            publish_s=self.publish * self.step_time,
        )


@dataclass(frozen=True, slots=True)
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


def simulate(shape: Shape) -> Outcome:
    """Plays a run of `shape`."""
    rule = SlotDemand if shape.by_siblings else WholeGroups
    outcome = SimulatedRun(shape.scenario, demand=rule).run()
    assert outcome.counts.evicted == 0
    return Outcome(
        occupancy=outcome.occupancy,
        rate=outcome.groups_per_s * max(1.0, shape.split) / shape.production,
        staleness=outcome.staleness,
        learner_waits=outcome.learner["wait"],
        waits_for_deadlines=outcome.learner["deadline"],
        most_in_flight=outcome.most_in_flight,
    )


def fleet(
    *,
    split: float,
    response_steps: float,
    groups_per_step: int = 32,
    group_size: int = 8,
    acceptance: float = 0.75,
    lengths: Lengths = INDEPENDENT,
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
