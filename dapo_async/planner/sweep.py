"""Finds the split of a cluster: which share of the GPUs generates, and which one trains.

In: a scenario with the rates of its own split, and what `plan` may change. Out: a `Plan`: the
fastest split, alternatives, the synchronous ways, and how the figures move when an assumption does.

1. Shapes whose weights, KV cache or learner ranks do not fit are left out.
2. The closed forms choose the shapes to simulate.
3. These are simulated on a smaller fleet of the same proportions with the largest staleness bound,
   the best ones with each bound, and the best of these with each update mode.
4. The best ones are simulated once more in full size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.outcome import Outcome
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.settings import Cluster
from dapo_async.planner.simulator import simulate

MOST_SPLITS = 24  # per number of GPUs and kind of engine that the closed forms compare
SIMULATED = 5  # shapes that are simulated
SHOWN = 4  # splits that are simulated in full size
SMALLEST_ENGINES, SMALLEST_GROUPS = 4, 32  # of the smaller fleet
STEPS, WARM_UP = 36, 12  # of a simulation in a sweep
EQUAL = 0.02  # step times that differ less are equal: then the smaller staleness is better
PAYS = 0.05  # asynchrony pays if it saves more than this share of a step


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to use the GPUs, and what it came to."""

    shape: Shape
    scenario: Scenario
    outcome: Outcome

    @property
    def step_s(self) -> float:
        return self.outcome.step_s

    @property
    def learner_gpus(self) -> int:
        return self.shape.learner_gpus

    @property
    def engine_gpus(self) -> int:
        """Of all engines."""
        return self.scenario.num_engines * self.shape.engine_gpus

    @property
    def gpu_s_per_token(self) -> float:
        """GPU seconds per trained token: what a token costs."""
        return self.shape.gpus / self.outcome.trained_tokens_per_s


@dataclass(frozen=True, slots=True)
class Plan:
    """The recommendation: the first candidate is the best one."""

    cluster: Cluster
    candidates: Sequence[Candidate]
    synchronous: Candidate  # engines and learner on their own GPUs, staleness 0
    colocated: Candidate  # engines and learner share all GPUs and take turns
    tried: Sequence[Candidate] = ()  # on the smaller fleet
    left_out: Mapping[str, int] = field(default_factory=dict)  # shapes, by the reason
    # What changes → step time over that of the best.
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def cheapest(self) -> Candidate:
        """The least GPU seconds per trained token."""
        return min(self.candidates, key=lambda each: each.gpu_s_per_token)

    @property
    def pays(self) -> bool:
        """Whether the best split is faster than both synchronous ways."""
        others = min(self.synchronous.step_s, self.colocated.step_s)
        return self.best.step_s < (1 - PAYS) * others


def find_plan(scenario: Scenario, cluster: Cluster) -> Plan:
    """Sweeps splits, kinds of engine and learner, slots, staleness bounds and update modes.

    Raises ValueError if no shape is possible.
    """
    if not cluster.gpus:
        raise ValueError("the scenario has no section plan; give plan.gpus, the GPUs to be split")
    bounds = sorted(bound for bound in cluster.max_staleness if bound > 0) or [1]
    made, left_out = _shapes(scenario, cluster, bounds[-1])
    chosen = _by_closed_form(made)
    tried = [_candidate(shape, whole, small=True) for shape, whole in chosen]
    tried += [
        _candidate(each.shape, replace(each.scenario, max_staleness=bound), small=True)
        for each in _distinct(ranked(tried))
        for bound in bounds[:-1]
    ]
    modes = [mode for mode in cluster.weight_update if mode != scenario.weight_update]
    tried += [
        _candidate(each.shape, replace(each.scenario, weight_update=mode), small=True)  # type: ignore[arg-type]
        for each in _distinct(ranked(tried))
        for mode in modes
    ]
    best = [_candidate(each.shape, each.scenario, small=False) for each in _distinct(ranked(tried))]
    most = max(shape.gpus for shape in made)
    synchronous = min(
        ((shape, _synchronous(whole)) for shape, whole in made.items() if shape.gpus == most),
        key=lambda each: closed_forms(each[1]).step_s,
    )
    shape = synchronous[0]
    plan = Plan(
        cluster,
        ranked(best),
        _candidate(*synchronous, small=True),
        _candidate(shape, _on_all_gpus(scenario, cluster, shape), small=True),
        tried,
        left_out,
    )
    return replace(plan, sensitivity=dict(_sensitivity(plan.best, cluster.rates.node_gpus)))


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


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest first; of about equally fast ones, the one with the least staleness."""
    left, ordered = sorted(candidates, key=lambda each: each.step_s), []
    while left:
        equal = [each for each in left if each.step_s <= (1 + EQUAL) * left[0].step_s]
        equal.sort(key=lambda each: (round(each.outcome.staleness, 1), each.step_s))
        ordered.append(equal[0])
        left.remove(equal[0])
    return ordered


def _shapes(
    scenario: Scenario, cluster: Cluster, max_staleness: int
) -> tuple[dict[Shape, Scenario], dict[str, int]]:
    """The possible shapes with their scenarios, and how many are left out by reason."""
    made: dict[Shape, Scenario] = {}
    left_out: dict[str, int] = {}
    problem = ""
    for shape in _splits(cluster):
        if not cluster.rates.learner_fits(
            gpus=shape.learner_gpus,
            tensor_parallel=shape.tensor_parallel,
            context_parallel=shape.context_parallel,
        ):
            reason = "the memory of the learner"
        else:
            try:
                made[shape] = scenario_of_shape(scenario, cluster, shape, max_staleness)
                continue
            except ValueError as error:
                reason, problem = "the memory of an engine", str(error)
                if "plan." in problem:
                    raise
        left_out[reason] = left_out.get(reason, 0) + 1
    if made:
        return made, left_out
    engine, gpus = min(cluster.engine_gpus), max(cluster.gpus)
    if problem:
        raise ValueError(problem)
    if left_out:
        raise ValueError(
            f"plan.gpus ({gpus}): the learner's ranks do not fit on the GPUs that an engine of "
            f"{engine} leaves; give more GPUs, or raise plan.tensor_parallel or "
            "plan.context_parallel"
        )
    raise ValueError(
        f"plan.gpus ({gpus}) leaves no GPU for one side: an engine takes {engine}, the learner at "
        f"least {min(cluster.tensor_parallel) * min(cluster.context_parallel)}; give more GPUs"
    )


def _splits(cluster: Cluster) -> Iterator[Shape]:
    """Whole engines use all GPUs that the learner does not."""
    for gpus in cluster.gpus:
        for engine in cluster.engine_gpus:
            first = gpus % engine or engine
            for tensor_parallel, context_parallel in product(
                cluster.tensor_parallel, cluster.context_parallel
            ):
                possible = [
                    learner
                    for learner in range(first, gpus - engine + 1, engine)
                    if learner % (tensor_parallel * context_parallel) == 0
                ]
                stride = -(-len(possible) // MOST_SPLITS) or 1
                for learner in possible[::stride]:
                    for slots in cluster.slots:
                        yield Shape(
                            gpus=gpus,
                            learner_gpus=learner,
                            tensor_parallel=tensor_parallel,
                            context_parallel=context_parallel,
                            engine_gpus=engine,
                            slots=slots,
                        )


def _by_closed_form(made: Mapping[Shape, Scenario]) -> list[tuple[Shape, Scenario]]:
    """The fastest splits on paper, each with its best other sizes.

    With several numbers of GPUs, also the cheapest ones, which are mostly smaller.
    """
    step_s = {shape: closed_forms(scenario).step_s for shape, scenario in made.items()}
    chosen: dict[tuple[int, int, int], Shape] = {}
    for shape in sorted(made, key=lambda each: step_s[each]):
        chosen.setdefault((shape.gpus, shape.learner_gpus, shape.slots), shape)
    fastest = list(chosen.values())
    cheapest = sorted(fastest, key=lambda each: step_s[each] * each.gpus)
    several = len({shape.gpus for shape in made}) > 1
    picked = dict.fromkeys(_splits_first(fastest)[: SIMULATED * 2])
    if several:
        picked |= dict.fromkeys(_splits_first(cheapest)[:SIMULATED])
    return [(shape, made[shape]) for shape in picked]


def _splits_first(shapes: Sequence[Shape]) -> list[Shape]:
    """The best `SIMULATED` splits, with at most three numbers of slots each."""
    splits: dict[tuple[int, int], list[Shape]] = {}
    for shape in shapes:
        splits.setdefault((shape.gpus, shape.learner_gpus), []).append(shape)
    return [shape for several in list(splits.values())[:SIMULATED] for shape in several[:3]]


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first four, each split once; and the cheapest one."""
    chosen: dict[tuple[int, int], Candidate] = {}
    for candidate in candidates:
        chosen.setdefault((candidate.shape.gpus, candidate.learner_gpus), candidate)
    first = list(chosen.values())[:SHOWN]
    cheapest = min(chosen.values(), key=lambda each: each.gpu_s_per_token)
    if cheapest not in first and len({each.shape.gpus for each in chosen.values()}) > 1:
        first.append(cheapest)
    return first


def _candidate(shape: Shape, scenario: Scenario, *, small: bool) -> Candidate:
    return Candidate(shape, scenario, simulate(smaller(scenario) if small else scenario))


def _on_all_gpus(scenario: Scenario, cluster: Cluster, shape: Shape) -> Scenario:
    """Synchronous and colocated: both sides on all GPUs."""
    gpus = shape.gpus - shape.gpus % shape.engine_gpus
    gpus -= gpus % shape.learner_unit
    both = replace(shape, gpus=2 * gpus, learner_gpus=max(gpus, shape.learner_unit))
    return replace(_synchronous(scenario_of_shape(scenario, cluster, both, 0)), colocated=True)


def _synchronous(scenario: Scenario) -> Scenario:
    """At staleness 0. All groups that a step needs, rejected ones too, are generated at once.

    So no group has to wait for the end of a rejected one, as synchronous systems do it.
    """
    share = sum(scenario.acceptance) / 2
    minibatch = math.ceil(scenario.groups_per_step / share / scenario.num_minibatches)
    groups = minibatch * scenario.num_minibatches
    trained, speed = scenario.groups_per_step / groups, scenario.learner
    return replace(
        scenario,
        max_staleness=0,
        groups_per_step=groups,
        acceptance=(1.0, 1.0),
        learner=replace(speed, token_s=trained * speed.token_s, group_s=trained * speed.group_s),
    )


def _sensitivity(best: Candidate, node_gpus: int) -> Iterator[tuple[str, float]]:
    """What if an assumption is wrong: step time over that of the best split."""
    scenario = best.scenario
    before = simulate(smaller(scenario)).step_s
    longer = replace(
        scenario.lengths,
        mean_tokens=min(2 * scenario.lengths.mean_tokens, 0.9 * scenario.lengths.max_tokens),
    )
    lost = max(1, node_gpus // best.shape.engine_gpus)
    changes: dict[str, Scenario] = {
        "responses twice as long": replace(scenario, lengths=longer),
        "acceptance 30 %": replace(scenario, acceptance=(0.3, 0.3)),
    }
    if scenario.num_engines > lost:
        name = f"one node lost ({lost} of {scenario.num_engines} engines)"
        changes[name] = replace(scenario, num_engines=scenario.num_engines - lost)
    longest = scenario.prompt_tokens + scenario.lengths.max_tokens
    if longest <= scenario.engine.kv_tokens / 2 < float("inf"):
        half = replace(scenario.engine, kv_tokens=scenario.engine.kv_tokens / 2)
        changes["half of the KV cache"] = replace(scenario, engine=half)
    for name, changed in changes.items():
        yield name, simulate(smaller(changed)).step_s / before
