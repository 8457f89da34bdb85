"""Finds the split of a cluster: which share of the GPUs generates, and which one trains.

In: a scenario with the measured rates of its own split, and the number of GPUs. Out: a `Plan`: the
fastest split, alternatives, the synchronous ways, and how the figures move when an assumption does.

The closed forms choose the splits to simulate. These are simulated on a smaller fleet of the same
proportions, and the best ones once more in full size. The learner's time per token is taken to fall
with its GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.outcome import Outcome
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.settings import Cluster
from dapo_async.planner.simulator import simulate

MOST_SPLITS = 24  # that the closed forms compare
SIMULATED = 5  # splits that are simulated
SMALLEST_ENGINES, SMALLEST_GROUPS = 4, 32  # of the smaller fleet
STEPS, WARM_UP = 36, 12  # of a simulation in a sweep
EQUAL = 0.02  # step times that differ less are equal: then the smaller staleness is better
NODE_GPUS = 8
PAYS = 0.05  # asynchrony pays if it saves more than this share of a step


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to use the GPUs, and what it came to."""

    learner_gpus: int
    engine_gpus: int  # of all engines
    scenario: Scenario
    outcome: Outcome

    @property
    def step_s(self) -> float:
        return self.outcome.step_s


@dataclass(frozen=True, slots=True)
class Plan:
    """The recommendation: the first candidate is the best one."""

    cluster: Cluster
    candidates: Sequence[Candidate]
    synchronous: Candidate  # engines and learner on their own GPUs, staleness 0
    colocated: Candidate  # engines and learner share all GPUs and take turns
    sensitivity: Mapping[str, float] = field(
        default_factory=dict
    )  # step time over that of the best

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def pays(self) -> bool:
        """Whether the best split is faster than both synchronous ways."""
        others = min(self.synchronous.step_s, self.colocated.step_s)
        return self.best.step_s < (1 - PAYS) * others


def find_plan(scenario: Scenario, cluster: Cluster) -> Plan:
    """Sweeps splits, staleness bounds and slots. Raises ValueError if no split is possible."""
    if cluster.gpus is None:
        raise ValueError("the scenario has no section plan; give plan.gpus, the GPUs to be split")
    splits = _splits(cluster)
    if not splits:
        raise ValueError(
            f"plan.gpus ({cluster.gpus}) leaves no GPU for one side: an engine takes "
            f"{cluster.engine_gpus}, the learner at least {cluster.fewest_learner_gpus}; give more "
            "GPUs"
        )
    at = partial(split_of, scenario, cluster)
    asynchronous = [bound for bound in cluster.max_staleness if bound > 0] or [1]
    by_form = sorted(splits, key=lambda gpus: closed_forms(at(gpus, asynchronous[-1])).step_s)[
        :SIMULATED
    ]
    tried = [
        _candidate(at(gpus, bound, slots), gpus, cluster, small=True)
        for gpus in by_form
        for bound in asynchronous
        for slots in cluster.slots
    ]
    best = [
        _candidate(each.scenario, each.learner_gpus, cluster, small=False)
        for each in _distinct(ranked(tried))
    ]
    by_sum = min(splits, key=lambda gpus: closed_forms(at(gpus, 0)).step_s)
    synchronous = _candidate(at(by_sum, 0), by_sum, cluster, small=True)
    colocated = _candidate(_on_all_gpus(scenario, cluster), cluster.gpus, cluster, small=True)
    plan = Plan(cluster, ranked(best), synchronous, colocated)
    return replace(plan, sensitivity=dict(_sensitivity(plan.best, cluster)))


def split_of(
    scenario: Scenario,
    cluster: Cluster,
    learner_gpus: int,
    max_staleness: int,
    slots: int | None = None,
) -> Scenario:
    """The scenario on another split, with as many engines as the other GPUs can hold."""
    assert cluster.gpus is not None
    engine = scenario.engine
    if slots is not None and slots != engine.num_slots:
        engine = replace(engine, step_s=_resized(engine.step_s, slots))
    return replace(
        scenario,
        num_engines=(cluster.gpus - learner_gpus) // cluster.engine_gpus,
        engine=engine,
        learner=replace(
            scenario.learner,
            token_s=scenario.learner.token_s * cluster.learner_gpus / learner_gpus,
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


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first four, each split once."""
    chosen: list[Candidate] = []
    for candidate in candidates:
        splits = [each.learner_gpus for each in chosen]
        if candidate.learner_gpus not in splits:
            chosen.append(candidate)
    return chosen[:4]


def _splits(cluster: Cluster) -> list[int]:
    """GPUs of the learner, so that whole engines use the others."""
    assert cluster.gpus is not None
    unit = cluster.engine_gpus
    first = cluster.gpus % unit or unit
    possible = range(first, cluster.gpus - unit + 1, unit)
    every = [gpus for gpus in possible if gpus >= cluster.fewest_learner_gpus]
    stride = -(-len(every) // MOST_SPLITS) or 1
    return every[::stride]


def _candidate(
    scenario: Scenario, learner_gpus: int, cluster: Cluster, *, small: bool
) -> Candidate:
    engine_gpus = scenario.num_engines * cluster.engine_gpus
    outcome = simulate(smaller(scenario) if small else scenario)
    return Candidate(learner_gpus, engine_gpus, scenario, outcome)


def _on_all_gpus(scenario: Scenario, cluster: Cluster) -> Scenario:
    """Synchronous and colocated: both sides on all GPUs."""
    assert cluster.gpus is not None
    whole = split_of(scenario, replace(cluster, gpus=2 * cluster.gpus), cluster.gpus, 0)
    return replace(whole, colocated=True)


def _sensitivity(best: Candidate, cluster: Cluster) -> Iterator[tuple[str, float]]:
    """What if an assumption is wrong: step time over that of the best split."""
    scenario = best.scenario
    before = simulate(smaller(scenario)).step_s
    longer = replace(
        scenario.lengths,
        mean_tokens=min(2 * scenario.lengths.mean_tokens, 0.9 * scenario.lengths.max_tokens),
    )
    lost = max(1, NODE_GPUS // cluster.engine_gpus)
    changes: dict[str, Scenario] = {
        "responses twice as long": replace(scenario, lengths=longer),
        "acceptance 30 %": replace(scenario, acceptance=(0.3, 0.3)),
    }
    if scenario.num_engines > lost:
        name = f"{lost} of {scenario.num_engines} engines lost"
        changes[name] = replace(scenario, num_engines=scenario.num_engines - lost)
    longest = scenario.prompt_tokens + scenario.lengths.max_tokens
    if longest <= scenario.engine.kv_tokens / 2 < float("inf"):
        half = replace(scenario.engine, kv_tokens=scenario.engine.kv_tokens / 2)
        changes["half of the KV cache"] = replace(scenario, engine=half)
    for name, changed in changes.items():
        yield name, simulate(smaller(changed)).step_s / before


def _resized(step_s: tuple[float, ...], slots: int) -> tuple[float, ...]:
    """Step times for another number of slots; along the line of the last quarter above it."""
    if slots < len(step_s):
        return step_s[: slots + 1]
    quarter = max(1, len(step_s) // 4)
    slope = (step_s[-1] - step_s[-1 - quarter]) / quarter
    more = (step_s[-1] + slope * (n - len(step_s) + 1) for n in range(len(step_s), slots + 1))
    return (*step_s, *more)
