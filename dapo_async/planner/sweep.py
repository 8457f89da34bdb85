"""Finds the split of a cluster: which share of the GPUs generates, and which one trains.

In: a scenario with the rates of its own split, and what `plan` may change. Out: a `Plan`: the
fastest split, alternatives, the synchronous ways, and how the figures move when an assumption does.

1. `shapes` leaves out what does not fit.
2. The closed forms choose the shapes to simulate.
3. These are simulated on a smaller fleet of the same proportions with the largest staleness bound,
   the best ones with each bound, and the best of these with each update mode.
4. The best ones are simulated once more in full size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.outcome import Outcome
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.sensitivity import sensitivity
from dapo_async.planner.settings import Cluster
from dapo_async.planner.shapes import Shape, Shapes, scenario_of_shape, smaller
from dapo_async.planner.simulator import simulate

APART = 0.02  # of the GPUs, between two splits that are simulated
SIMULATED = 5  # shapes that are simulated
SHOWN = 4  # splits that are simulated in full size
EQUAL = 0.02  # step times that differ less are equal: then the smaller staleness is better
PAYS = 0.05  # asynchrony pays if it saves more than this share of a step


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
    # What changes → step time over that of the best, or why it cannot run.
    sensitivity: Mapping[str, float | str] = field(default_factory=dict)

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
    shapes = Shapes(scenario, cluster, bounds[-1])
    made, chosen = shapes.made, _by_closed_form(shapes)
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
        shapes.left_out,
    )
    changes = sensitivity(
        plan.best.scenario,
        engine_gpus=plan.best.shape.engine_gpus,
        node_gpus=cluster.rates.node_gpus,
    )
    return replace(plan, sensitivity=dict(changes))


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest first; of about equally fast ones, the one with the least staleness."""
    left, ordered = sorted(candidates, key=lambda each: each.step_s), []
    while left:
        equal = [each for each in left if each.step_s <= (1 + EQUAL) * left[0].step_s]
        equal.sort(key=lambda each: (round(each.outcome.staleness, 1), each.step_s))
        ordered.append(equal[0])
        left.remove(equal[0])
    return ordered


def _by_closed_form(shapes: Shapes) -> list[tuple[Shape, Scenario]]:
    """The fastest splits on paper, each with its best other sizes.

    With several numbers of GPUs, also the cheapest ones, which are mostly smaller.
    """
    made, step_s = shapes.made, shapes.step_s
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
    """The best `SIMULATED` splits, with at most three numbers of slots each.

    Splits of many GPUs differ by some percent of them, because neighbours are equally fast.
    """
    splits: dict[tuple[int, int], list[Shape]] = {}
    for shape in shapes:
        split = shape.gpus, shape.learner_gpus
        if split in splits:
            splits[split].append(shape)
        elif len(splits) < SIMULATED and all(
            shape.gpus != gpus or abs(shape.learner_gpus - learner) >= APART * gpus
            for gpus, learner in splits
        ):
            splits[split] = [shape]
    return [shape for several in splits.values() for shape in several[:3]]


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
