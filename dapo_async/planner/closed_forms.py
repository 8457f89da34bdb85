"""What paper and pencil say about a scenario, beside the simulation.

With C sequences in flight, B rollouts per step, rho = production / consumption, and M = expected
longest response of a group over the expected response, a group whose version counts from its start
has a mean staleness of C·M/B + rho when the engines are the bottleneck (rho < 1; published by
Applied Compute, 2026). A group that starts when its version is served has S steps and the wait of
another one until its deadline, so S + 1 steps take at least the longest response of S + 1 batches,
one training and one publish. The forms know no variance between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapo_async.planner.outcome import Outcome
from dapo_async.planner.scenario import Scenario

CLOSE = 0.10  # a larger difference is explained
CLOSE_STALENESS = 0.1  # versions: a smaller difference is no difference
MOMENT_S = 1e-9
ITERATIONS = 50  # of two shares that depend on each other
NOTICEABLE = 0.03  # a share of time that a reason names


@dataclass(frozen=True, slots=True)
class ClosedForms:
    """Times in seconds."""

    generate_s: float  # of the groups of a step, engines full
    train_s: float  # with the control plane
    deadline_s: float  # S + 1 steps have room for the longest response
    step_s: float
    tokens_per_s: float  # trained response tokens
    group_staleness: float | None  # None: no form for this mode

    @property
    def rho(self) -> float:
        """Production over consumption: below 1 the engines are the bottleneck."""
        return self.train_s / self.generate_s


def closed_forms(scenario: Scenario) -> ClosedForms:
    """The step is the sum of both sides at staleness 0 and on shared GPUs, else the longer one."""
    mean, batch = scenario.mean_tokens, scenario.groups_per_step * scenario.group_size
    engine = scenario.engine
    credits = float((scenario.max_staleness + 1) * batch)
    if scenario.credit_steps is not None:
        credits = min(credits, scenario.credit_steps * batch)
    context = scenario.prompt_tokens + scenario.lengths.context_tokens * (
        mean / scenario.lengths.mean_tokens
    )
    in_kv = scenario.num_engines * engine.kv_tokens / (context + engine.reserve_tokens)
    in_flight = max(float(scenario.num_engines), min(float(scenario.num_slots), credits, in_kv))
    if scenario.max_staleness == 0:
        in_flight = min(in_flight, float(batch))
    per_engine = in_flight / scenario.num_engines
    token_s = per_engine / engine.tokens_per_s(per_engine, context)
    acceptance = sum(scenario.acceptance) / 2
    prefill = batch / scenario.group_size * scenario.prompt_tokens * engine.prefill_s
    generate_s = (batch * mean * token_s / in_flight + prefill / scenario.num_engines) / acceptance
    train_s = scenario.train_s + scenario.control_s
    if scenario.max_staleness == 0:
        # The last response of the batch decides; the longest one is a bound for it.
        longest = min(scenario.lengths.max_tokens, mean * scenario.lengths.longest_of(batch))
        generate_s += (longest - mean) * engine.step_s[1]
        step_s = generate_s + train_s + scenario.publish_s
        return ClosedForms(generate_s, train_s, 0.0, step_s, batch * mean / step_s, 0.0)
    generate_s += scenario.pause_s + _recomputing_s(scenario, per_engine * context)
    generate_s, train_s = _on_shared_cores(scenario, generate_s, train_s)
    steps = scenario.max_staleness + 1
    longest = min(scenario.lengths.max_tokens, mean * scenario.lengths.longest_of(steps * batch))
    # A minibatch is trained when its groups have ended: only the last one waits for the longest.
    last_s = train_s / scenario.num_minibatches
    deadline_s = (longest * token_s + last_s + scenario.publish_s) / steps
    step_s = max(generate_s, train_s, deadline_s)
    staleness = None
    if scenario.colocated:
        step_s = max(generate_s + train_s, deadline_s)
    elif deadline_s >= step_s:
        pass  # no published form
    elif generate_s > train_s:
        longest_share = scenario.lengths.longest_of(scenario.group_size)
        started = in_flight * longest_share / (batch / acceptance)
        publish = scenario.publish_s / step_s
        staleness = min(scenario.max_staleness, started + train_s / generate_s + publish)
    elif scenario.admission == "eager":
        staleness = float(scenario.max_staleness)
    tokens_per_s = batch * mean / step_s
    return ClosedForms(generate_s, train_s, deadline_s, step_s, tokens_per_s, staleness)


def balanced_share(scenario: Scenario, *, engine_gpus: int, learner_gpus: int) -> float:
    """The learner's share of the GPUs at which both sides take equally long.

    If both sides' times fall with their GPUs: T·g / (T·g + G·e) with the learner's time T on g GPUs
    and the engines' time G on e.
    """
    forms = closed_forms(scenario)
    trains = forms.train_s * learner_gpus
    return trains / (trains + forms.generate_s * engine_gpus)


def differences(scenario: Scenario, forms: ClosedForms, outcome: Outcome) -> list[str]:
    """Why the simulated step time or staleness differs from its closed form by more than 10 %."""
    lines = []
    if abs(outcome.step_s / forms.step_s - 1) > CLOSE:
        lines += _slower(scenario, forms, outcome) or [
            "lengths of the batches vary, and the slower side changes from step to step"
        ]
    paper, simulated = forms.group_staleness, outcome.group_staleness
    if paper is not None and abs(simulated - paper) > max(CLOSE * paper, CLOSE_STALENESS):
        lines.append(f"staleness: {_staler(scenario, forms, outcome)}")
    return lines


def _on_shared_cores(scenario: Scenario, generate_s: float, train_s: float) -> tuple[float, float]:
    """Both sides' seconds. A side works slower in the time in which the other one works, too."""
    generates_s, trains_s = generate_s, train_s
    for _ in range(ITERATIONS):
        both_s = generates_s * trains_s / max(generates_s, trains_s, MOMENT_S)
        generates_s = generate_s + both_s * (1 - 1 / scenario.engine_slowdown)
        trains_s = train_s + both_s * (1 - 1 / scenario.learner_slowdown)
    return generates_s, trains_s


def _recomputing_s(scenario: Scenario, context: float) -> float:
    """Of an engine per publish, for the keys and values of its running sequences."""
    if scenario.weight_update != "recompute":
        return 0.0
    return context * scenario.engine.prefill_s


def _slower(scenario: Scenario, forms: ClosedForms, outcome: Outcome) -> list[str]:
    """Where the simulated run loses time, or why it is faster."""
    engines, reasons = outcome.engines, []
    if outcome.step_s < forms.step_s:
        if scenario.max_staleness == 0:
            return ["the form waits for the longest response that a batch may have at all"]
        return ["fewer sequences run than the form assumes, so a decode step is shorter"]
    if outcome.learner["deadline"] > NOTICEABLE:
        reasons.append(
            f"the learner waits {outcome.learner['deadline']:.0%} of the time for late groups, "
            "because their deadline would be lost"
        )
    if engines["queued"] > NOTICEABLE:
        reasons.append(f"the KV cache leaves {engines['queued']:.0%} of the slots empty")
    if engines["sync"] + engines["tail"] > NOTICEABLE:
        lost = engines["sync"] + engines["tail"]
        reasons.append(f"weight updates cost {lost:.0%} of the slots' time")
    if engines["dead"] > NOTICEABLE:
        reasons.append(f"lost engines cost {engines['dead']:.0%} of the slots' time")
    if scenario.lengths.drift != 1.0:
        reasons.append("responses change their length during the run")
    if engines["no_credit"] > 0.1 and forms.rho < 1:
        reasons.append(
            f"credits or the end of a batch leave {engines['no_credit']:.0%} of the slots empty"
        )
    return reasons


def _staler(scenario: Scenario, forms: ClosedForms, outcome: Outcome) -> str:
    """Why groups are staler or fresher than the form says."""
    if outcome.group_staleness < (forms.group_staleness or 0.0):
        if outcome.engines["running"] < 1 - 2 * NOTICEABLE:
            return (
                f"only {outcome.engines['running']:.0%} of the slots run, the form takes all of "
                "them; fewer groups in flight are fresher"
            )
        return "the learner often has its batch before it asks, so groups wait less than rho steps"
    if outcome.learner["deadline"] > NOTICEABLE:
        return "the learner waits for late groups, and finished ones become older meanwhile"
    return (
        "a batch is not taken in the order of completion: groups whose deadline is near go first, "
        "and fresher ones wait"
    )
