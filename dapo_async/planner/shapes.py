"""How the GPUs of a cluster can be used, and the scenario of each way.

In: a scenario with the rates of its own split, and what `plan` may change. Out: `Shape`s that fit,
each with its scenario. With many GPUs not every split is looked at: every few GPUs one, then finer
and finer ones around those with the shortest step on paper. `sweep` simulates the best of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.settings import Cluster

COARSE = 24  # splits per number of GPUs and kind of engine and learner that are looked at first
FINER = 4  # times, per look around the best ones
BEST = 3  # splits around which is looked
STEPS, WARM_UP = 36, 12  # of a simulation in a sweep
SMALLEST_ENGINES, SMALLEST_GROUPS = 4, 32  # of the smaller fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How GPUs are used."""

    gpus: int
    learner_gpus: int
    tensor_parallel: int  # of the learner
    engine_gpus: int  # of one engine
    slots: int  # of one engine
    context_parallel: int = 1  # of the learner

    @property
    def learner_unit(self) -> int:
        """GPUs of the learner that work on one microbatch."""
        return self.tensor_parallel * self.context_parallel

    @property
    def num_engines(self) -> int:
        return (self.gpus - self.learner_gpus) // self.engine_gpus


def scenario_of_shape(
    scenario: Scenario, cluster: Cluster, shape: Shape, max_staleness: int
) -> Scenario:
    """The scenario on another shape. Raises ValueError if the rates are unknown or do not fit."""
    rates = cluster.rates
    return replace(
        scenario,
        num_engines=shape.num_engines,
        engine=rates.engine_at(gpus=shape.engine_gpus, slots=shape.slots),
        learner=rates.learner_at(
            gpus=shape.learner_gpus,
            tensor_parallel=shape.tensor_parallel,
            context_parallel=shape.context_parallel,
        ),
        max_staleness=max_staleness,
        num_steps=STEPS + 2 * max_staleness,
        warm_up_steps=WARM_UP,
        outages=(),
        colocated=False,
    )


def smaller(scenario: Scenario) -> Scenario:
    """The same proportions with fewer engines and smaller batches.

    Step times are about equal. A smaller batch has more noise.
    """
    groups, engines = scenario.groups_per_step, scenario.num_engines
    factor = min(engines / SMALLEST_ENGINES, groups / SMALLEST_GROUPS)
    if factor <= 1:
        return scenario
    fewer = max(1, round(engines / factor))
    minibatch = max(1, round(groups * fewer / engines / scenario.num_minibatches))
    smaller_groups = minibatch * scenario.num_minibatches
    scale = groups / smaller_groups
    speed = scenario.learner
    return replace(
        scenario,
        num_engines=fewer,
        groups_per_step=smaller_groups,
        learner=replace(speed, token_s=scale * speed.token_s, group_s=scale * speed.group_s),
    )


class Shapes:
    """The shapes of a cluster that fit, with their scenarios at one staleness bound."""

    def __init__(self, scenario: Scenario, cluster: Cluster, max_staleness: int) -> None:
        """Raises ValueError if no shape is possible."""
        self._scenario, self._cluster, self._bound = scenario, cluster, max_staleness
        self.made: dict[Shape, Scenario] = {}
        self.step_s: dict[Shape, float] = {}  # on paper
        self.left_out: dict[str, int] = {}  # shapes, by the reason
        self._problem = ""
        for family in _families(cluster):
            self._look_at(family)
        if not self.made:
            raise ValueError(self._why_none())

    def _look_at(self, family: Family) -> None:
        """Coarsely, then around the best splits."""
        stride = -(-len(family.learners) // COARSE) or 1
        known: dict[int, float] = {}
        every = range(len(family.learners))
        places: Sequence[int] = every[::stride]
        while True:
            for place in places:
                if place not in known:
                    known[place] = self._add(family, family.learners[place])
            if stride == 1:
                return
            around, stride = stride, max(1, stride // FINER)
            best = [place for place in known if known[place] < float("inf")]
            best = sorted(best, key=known.__getitem__)[:BEST] or [*every]
            near = {
                place
                for middle in best
                for place in range(middle - around, middle + around + 1, stride)
            }
            places = sorted(near & set(every))

    def _add(self, family: Family, learner_gpus: int) -> float:
        """The shortest step of a split over the numbers of slots; infinite if none fits."""
        cluster, shortest_s = self._cluster, float("inf")
        for shape in family.shapes(learner_gpus, cluster.slots):
            if not cluster.rates.learner_fits(
                gpus=shape.learner_gpus,
                tensor_parallel=shape.tensor_parallel,
                context_parallel=shape.context_parallel,
            ):
                self._leave_out("the memory of the learner")
                continue
            try:
                made = scenario_of_shape(self._scenario, cluster, shape, self._bound)
            except ValueError as error:
                self._problem = str(error)
                if "plan." in self._problem:
                    raise
                self._leave_out("the memory of an engine")
                continue
            self.made[shape], self.step_s[shape] = made, closed_forms(made).step_s
            shortest_s = min(shortest_s, self.step_s[shape])
        return shortest_s

    def _leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def _why_none(self) -> str:
        cluster = self._cluster
        engine, gpus = min(cluster.engine_gpus), max(cluster.gpus)
        if self._problem:
            return self._problem
        if self.left_out:
            return (
                f"plan.gpus ({gpus}): the learner's ranks do not fit on the GPUs that an engine of "
                f"{engine} leaves; give more GPUs, or raise plan.tensor_parallel or "
                "plan.context_parallel"
            )
        least = min(cluster.tensor_parallel) * min(cluster.context_parallel)
        return (
            f"plan.gpus ({gpus}) leaves no GPU for one side: an engine takes {engine}, the learner "
            f"at least {least}; give more GPUs"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Shapes that differ in the GPUs of the learner, and in slots."""

    gpus: int
    engine_gpus: int
    tensor_parallel: int
    context_parallel: int
    learners: Sequence[int]  # possible GPUs of the learner, ascending

    def shapes(self, learner_gpus: int, slots: Sequence[int]) -> Iterator[Shape]:
        for each in slots:
            yield Shape(
                gpus=self.gpus,
                learner_gpus=learner_gpus,
                tensor_parallel=self.tensor_parallel,
                context_parallel=self.context_parallel,
                engine_gpus=self.engine_gpus,
                slots=each,
            )


def _families(cluster: Cluster) -> Iterator[Family]:
    """Whole engines use all GPUs that the learner does not."""
    for gpus, engine in product(cluster.gpus, cluster.engine_gpus):
        first = gpus % engine or engine
        for tensor_parallel, context_parallel in product(
            cluster.tensor_parallel, cluster.context_parallel
        ):
            unit = tensor_parallel * context_parallel
            yield Family(
                gpus=gpus,
                engine_gpus=engine,
                tensor_parallel=tensor_parallel,
                context_parallel=context_parallel,
                learners=[
                    learner
                    for learner in range(first, gpus - engine + 1, engine)
                    if learner % unit == 0
                ],
            )
