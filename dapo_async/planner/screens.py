"""What the commands `simulate` and `plan` print and write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dapo_async.planner.closed_forms import closed_forms, differences
from dapo_async.planner.from_run import Measured
from dapo_async.planner.outcome import Outcome
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.sweep import Candidate, Plan

BAR = 40  # characters of a full bar


def simulation_lines(scenario: Scenario, outcome: Outcome) -> Iterator[str]:
    """The figures of a simulated run, the closed forms beside them."""
    forms = closed_forms(scenario)
    yield (
        f"run        {scenario.num_engines} engines x {scenario.engine.num_slots} slots, "
        f"{scenario.groups_per_step} groups of {scenario.group_size} per step, "
        f"staleness bound {scenario.max_staleness}"
    )
    yield (
        f"step       {outcome.step_s:.4g} s; closed form {forms.step_s:.4g} s "
        f"(generation {forms.generate_s:.4g} s, training {forms.train_s:.4g} s)"
    )
    for reason in differences(scenario, forms, outcome):
        yield f"           differs: {reason}"
    yield (
        f"tokens/s   {outcome.trained_tokens_per_s:,.0f} trained, "
        f"{outcome.generated_tokens_per_s:,.0f} generated; acceptance {outcome.acceptance:.0%}"
    )
    form = "" if forms.group_staleness is None else f"; closed form {forms.group_staleness:.2f}"
    yield (
        f"staleness  {outcome.staleness:.2f} per token, {outcome.group_staleness:.2f} per group, "
        f"at most {outcome.group_staleness_max}{form}"
    )
    groups = sum(outcome.histogram.values())
    for staleness, count in outcome.histogram.items():
        yield f"           {staleness:>2} {'#' * round(BAR * count / groups)} {count / groups:.0%}"
    yield f"learner    {shares(outcome.learner)}"
    yield f"engines    {shares(outcome.engines)}"
    if outcome.num_retracted:
        yield f"KV cache   full {outcome.num_retracted} times; a response went back to the queue"


def measured_line(measured: Measured, outcome: Outcome) -> str:
    """A run's own figures beside those of its simulation."""
    idle_learner = 1 - outcome.learner["train"]
    return (
        f"measured   {measured.step_s:.4g} s per step in the last {measured.steps}, simulated "
        f"{outcome.step_s:.4g} s ({outcome.step_s / measured.step_s - 1:+.0%}); staleness "
        f"{measured.staleness:.2f}, simulated {outcome.staleness:.2f}; idle learner "
        f"{measured.idle_learner:.0%}, simulated {idle_learner:.0%}"
    )


def shares(values: Any) -> str:
    """Named shares of time, without those below half a percent."""
    named = (f"{name.replace('_', ' ')} {value:.0%}" for name, value in values.items())
    return ", ".join(text for text in named if not text.endswith(" 0%"))


def as_json(scenario: Scenario, outcome: Outcome) -> dict[str, Any]:
    """All figures of a simulated run."""
    figures = asdict(outcome)
    del figures["rows"], figures["publishes"]
    figures["counts"] = outcome.counts.flat()
    figures["histogram"] = {str(key): value for key, value in outcome.histogram.items()}
    return {
        **figures,
        "closed_forms": asdict(closed_forms(scenario)),
        "steps": [{**asdict(row), "staleness": row.staleness} for row in outcome.rows],
    }


def plan_lines(plan: Plan) -> Iterator[str]:
    """The split, the reason, the expected figures, and the alternatives."""
    best = plan.best
    scenario, outcome = best.scenario, best.outcome
    yield (
        f"split      {best.engine_gpus} GPUs generate ({scenario.num_engines} engines, "
        f"{scenario.engine.num_slots} slots each), {best.learner_gpus} train; "
        f"max_staleness {scenario.max_staleness}"
    )
    yield f"because    {reason(best)}"
    yield (
        f"expected   {outcome.step_s:.4g} s per step, {outcome.trained_tokens_per_s:,.0f} trained "
        f"tokens/s, staleness {outcome.staleness:.2f}{price(plan, best)}"
    )
    yield f"idle       learner {1 - outcome.learner['train']:.0%}, slots {idle(outcome):.0%}"
    forms = closed_forms(scenario)
    yield f"paper      {forms.step_s:.4g} s per step by the closed form"
    for text in differences(scenario, forms, outcome):
        yield f"           differs: {text}"
    ways = {"split": plan.synchronous, "all GPUs in turns": plan.colocated}
    for name, way in ways.items():
        yield (
            f"synchronous, {name}: {way.step_s:.4g} s per step, "
            f"{way.step_s / best.step_s:.2f} times as long"
        )
    if not plan.pays:
        yield "asynchrony does not pay here: it saves less than 5 % of a step"
    yield (
        "others     learner GPUs  engine GPUs  slots  bound  step s  staleness  idle learner  slots"
    )
    for each in plan.candidates[1:]:
        figures = each.outcome
        yield (
            f"           {each.learner_gpus:>12}  {each.engine_gpus:>11}  "
            f"{each.scenario.engine.num_slots:>5}  {each.scenario.max_staleness:>5}  "
            f"{each.step_s:>6.4g}  {figures.staleness:>9.2f}  "
            f"{1 - figures.learner['train']:>12.0%}  {idle(figures):>5.0%}"
        )
    for name, ratio in plan.sensitivity.items():
        yield f"if         {name}: {ratio:.2f} times the step time"
    yield f"overrides  {' '.join(overrides(plan))}"


def reason(candidate: Candidate) -> str:
    """What limits the speed of a split, in one sentence."""
    outcome = candidate.outcome
    if outcome.learner["deadline"] > 0.1:
        return (
            f"the learner waits {outcome.learner['deadline']:.0%} of the time for late groups: "
            "responses are long for this staleness bound"
        )
    if outcome.engines["queued"] > 0.2:
        return f"the KV cache is full and leaves {outcome.engines['queued']:.0%} of the slots empty"
    if outcome.learner["train"] > 0.95:
        return "the learner is busy all the time; engines have the rest of the GPUs"
    if outcome.engines["running"] > 0.9:
        return "the engines are busy all the time; the learner has the fewest GPUs that keep up"
    return (
        f"both sides are about equally fast: the learner works {outcome.learner['train']:.0%} of "
        f"the time, {outcome.engines['running']:.0%} of the slots run"
    )


def idle(outcome: Outcome) -> float:
    """Share of the slots that run nothing."""
    return 1 - outcome.engines["running"]


def price(plan: Plan, candidate: Candidate) -> str:
    """The cost of a million trained tokens, if the price of a GPU is known."""
    if plan.cluster.gpu_hour is None or plan.cluster.gpus is None:
        return ""
    per_s = plan.cluster.gpu_hour * plan.cluster.gpus / 3600
    return f", {1e6 * per_s / candidate.outcome.trained_tokens_per_s:.3g} per million tokens"


def overrides(plan: Plan) -> list[str]:
    """The best split as overrides of `dapo-async train`."""
    scenario = plan.best.scenario
    values = {
        "rollout.num_workers": scenario.num_engines,
        "rollout.tensor_parallel": plan.cluster.engine_gpus,
        "rollout.num_slots": scenario.engine.num_slots,
        "rollout.max_response_tokens": scenario.lengths.max_tokens,
        "rollout.weight_update": scenario.weight_update,
        "learner.data_parallel": plan.best.learner_gpus,
        "learner.num_minibatches": scenario.num_minibatches,
        "replay.groups_per_step": scenario.groups_per_step,
        "replay.group_size": scenario.group_size,
        "replay.max_staleness": scenario.max_staleness,
        "replay.admission": scenario.admission,
    }
    return [f"{name}={value}" for name, value in values.items()]


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The recommendation with the figures of every candidate."""

    def figures(candidate: Candidate) -> dict[str, Any]:
        written = as_json(candidate.scenario, candidate.outcome)
        del written["steps"]
        return {
            "learner_gpus": candidate.learner_gpus,
            "engine_gpus": candidate.engine_gpus,
            "num_engines": candidate.scenario.num_engines,
            "slots": candidate.scenario.engine.num_slots,
            "max_staleness": candidate.scenario.max_staleness,
            **written,
        }

    return {
        "candidates": [figures(each) for each in plan.candidates],
        "synchronous": figures(plan.synchronous),
        "colocated": figures(plan.colocated),
        "asynchrony_pays": plan.pays,
        "sensitivity": dict(plan.sensitivity),
        "overrides": overrides(plan),
    }
