"""What the commands `simulate` and `plan` print and write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dapo_async.planner.closed_forms import balanced_share, closed_forms, differences
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
    yield (
        f"tokens/s   {outcome.trained_tokens_per_s:,.0f} trained, "
        f"{outcome.generated_tokens_per_s:,.0f} generated; acceptance {outcome.acceptance:.0%}"
    )
    yield (
        f"staleness  {outcome.staleness:.2f} per token, {outcome.group_staleness:.2f} per group, "
        f"at most {outcome.group_staleness_max}"
    )
    groups = sum(outcome.histogram.values())
    for staleness, count in outcome.histogram.items():
        yield f"           {staleness:>2} {'#' * round(BAR * count / groups)} {count / groups:.0%}"
    yield from closed_form_lines(scenario, outcome)
    yield f"learner    {shares(outcome.learner)}"
    yield f"engines    {shares(outcome.engines)}"
    if outcome.num_retracted:
        yield f"KV cache   full {outcome.num_retracted} times; a response went back to the queue"


def measured_line(measured: Measured, scenario: Scenario, outcome: Outcome) -> str:
    """A run's own figures beside those of its simulation."""
    control = ""
    if scenario.control_s:
        control = f"; of a step {scenario.control_s:.2g} s are the control plane"
    simulated_idle = idle_learner(outcome)
    return (
        f"measured   {measured.step_s:.4g} s per step in the last {measured.steps}, simulated "
        f"{outcome.step_s:.4g} s ({outcome.step_s / measured.step_s - 1:+.0%}); staleness "
        f"{measured.staleness:.2f}, simulated {outcome.staleness:.2f}; idle learner "
        f"{measured.idle_learner:.0%}, simulated {simulated_idle:.0%}{control}"
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
    scenario, outcome, shape = best.scenario, best.outcome, best.shape
    yield (
        f"split      {best.engine_gpus} GPUs generate: {scenario.num_engines} engines of "
        f"{shape.engine_gpus}, {scenario.engine.num_slots} slots each, {scenario.weight_update}; "
        f"{best.learner_gpus} train"
    )
    yield (
        f"           tensor_parallel {shape.tensor_parallel}, context_parallel "
        f"{shape.context_parallel} of the learner, max_staleness {scenario.max_staleness}"
    )
    yield f"because    {reason(best)}"
    yield (
        f"expected   {outcome.step_s:.4g} s per step, {outcome.trained_tokens_per_s:,.0f} trained "
        f"tokens/s, staleness {outcome.staleness:.2f}{price(plan, best)}"
    )
    yield f"idle       learner {idle_learner(outcome):.0%}, slots {idle(outcome):.0%}"
    yield from closed_form_lines(scenario, outcome, best)
    yield from _synchronous_lines(plan)
    yield from _other_lines(plan)
    for name, ratio in plan.sensitivity.items():
        what = ratio if isinstance(ratio, str) else f"{ratio:.2f} times the step time"
        yield f"if         {name}: {what}"
    if plan.left_out:
        named = ", ".join(f"{count} by {why}" for why, count in plan.left_out.items())
        yield f"left out   {named}"
    yield f"overrides  {' '.join(overrides(plan))}"


def closed_form_lines(
    scenario: Scenario, outcome: Outcome, candidate: Candidate | None = None
) -> Iterator[str]:
    """The closed forms beside the simulated figures, and why they differ."""
    forms = closed_forms(scenario)
    staleness = "none for this mode"
    if forms.group_staleness is not None:
        staleness = f"{forms.group_staleness:.2f} ({outcome.group_staleness:.2f})"
    yield (
        f"paper      closed forms (simulated): step {forms.step_s:.4g} s ({outcome.step_s:.4g}), "
        f"{forms.tokens_per_s:,.0f} tokens/s ({outcome.trained_tokens_per_s:,.0f}),"
    )
    yield (f"           staleness per group {staleness}")
    if candidate is not None:
        share = balanced_share(
            scenario, engine_gpus=candidate.engine_gpus, learner_gpus=candidate.learner_gpus
        )
        total = candidate.engine_gpus + candidate.learner_gpus
        yield (
            f"           both sides are equally fast with {share * total:.1f} GPUs for the learner "
            f"({candidate.learner_gpus} chosen)"
        )
    for text in differences(scenario, forms, outcome):
        yield f"           differs: {text}"


def _synchronous_lines(plan: Plan) -> Iterator[str]:
    ways = {"split": plan.synchronous, "all GPUs in turns": plan.colocated}
    for name, way in ways.items():
        gpus = "" if way.shape.gpus == plan.best.shape.gpus else f" on {way.shape.gpus} GPUs"
        yield (
            f"synchronous, {name}: {way.step_s:.4g} s per step{gpus}, "
            f"{way.step_s / plan.best.step_s:.2f} times as long"
        )
    if not plan.pays:
        yield "asynchrony does not pay here: it saves less than 5 % of a step"


def _other_lines(plan: Plan) -> Iterator[str]:
    """The alternatives, the fastest first; then the cheapest one."""
    yield (
        "others     learner (cp x tp)  engines (each)  slots  bound  update     step s  stale  "
        "idle learner, slots  GPU ms/token"
    )
    for each in plan.candidates[1:]:
        figures, shape = each.outcome, each.shape
        learner = f"{each.learner_gpus} ({shape.context_parallel} x {shape.tensor_parallel})"
        engines = f"{each.engine_gpus} ({shape.engine_gpus})"
        yield (
            f"           {learner:>17}  {engines:>14}  {shape.slots:>5}  "
            f"{each.scenario.max_staleness:>5}  {each.scenario.weight_update:<9}  "
            f"{each.step_s:>6.4g}  {figures.staleness:>5.2f}  "
            f"{idle_learner(figures):>12.0%}  {idle(figures):>5.0%}  "
            f"{1000 * each.gpu_s_per_token:>12.3g}"
        )
    cheapest = plan.cheapest
    if cheapest is not plan.best:
        saved = 1 - cheapest.gpu_s_per_token / plan.best.gpu_s_per_token
        if saved > 0.01:
            yield (
                f"cheapest   {cheapest.learner_gpus} + {cheapest.engine_gpus} GPUs: {saved:.0%} "
                f"less per trained token, {cheapest.step_s:.4g} s per step"
                f"{price(plan, cheapest)}"
            )


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


def idle_learner(outcome: Outcome) -> float:
    """Share of the time in which the learner does not train."""
    return max(0.0, 1 - outcome.learner["train"])


def idle(outcome: Outcome) -> float:
    """Share of the slots that run nothing."""
    return 1 - outcome.engines["running"]


def price(plan: Plan, candidate: Candidate) -> str:
    """The cost of a million trained tokens, if the price of a GPU is known."""
    if plan.cluster.gpu_hour is None:
        return ""
    cost = 1e6 * candidate.gpu_s_per_token * plan.cluster.gpu_hour / 3600
    return f", {cost:.3g} per million tokens"


def overrides(plan: Plan) -> list[str]:
    """The best split as overrides of `dapo-async train`."""
    scenario, shape = plan.best.scenario, plan.best.shape
    values: dict[str, int | str] = {
        "model.placement": "separate",
        "rollout.num_workers": scenario.num_engines,
        "rollout.tensor_parallel": shape.engine_gpus,
        "rollout.num_slots": scenario.engine.num_slots,
        "rollout.max_response_tokens": scenario.lengths.max_tokens,
        "rollout.weight_update": scenario.weight_update,
        "learner.data_parallel": shape.learner_gpus // shape.learner_unit,
        "learner.tensor_parallel": shape.tensor_parallel,
        "learner.context_parallel": shape.context_parallel,
        "learner.num_minibatches": scenario.num_minibatches,
        "replay.groups_per_step": scenario.groups_per_step,
        "replay.group_size": scenario.group_size,
        "replay.max_staleness": scenario.max_staleness,
        "replay.admission": scenario.admission,
    }
    if shape.engine_gpus > 1:
        values["rollout.engine"] = "sglang"  # the native engine has one GPU
    return [f"{name}={value}" for name, value in values.items()]


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The recommendation with the figures of every candidate."""

    def figures(candidate: Candidate) -> dict[str, Any]:
        written = as_json(candidate.scenario, candidate.outcome)
        del written["steps"]
        return {
            "gpus": candidate.shape.gpus,
            "learner_gpus": candidate.learner_gpus,
            "learner_tensor_parallel": candidate.shape.tensor_parallel,
            "learner_context_parallel": candidate.shape.context_parallel,
            "engine_gpus": candidate.engine_gpus,
            "gpus_per_engine": candidate.shape.engine_gpus,
            "weight_update": candidate.scenario.weight_update,
            "gpu_s_per_token": candidate.gpu_s_per_token,
            "num_engines": candidate.scenario.num_engines,
            "slots": candidate.scenario.engine.num_slots,
            "max_staleness": candidate.scenario.max_staleness,
            **written,
        }

    return {
        "candidates": [figures(each) for each in plan.candidates],
        "synchronous": {
            "step_s": plan.synchronous.step_s,
            "learner_gpus": plan.synchronous.learner_gpus,
        },
        "colocated": {"step_s": plan.colocated.step_s},
        "asynchrony_pays": plan.pays,
        "left_out": dict(plan.left_out),
        "sensitivity": dict(plan.sensitivity),
        "overrides": overrides(plan),
    }
