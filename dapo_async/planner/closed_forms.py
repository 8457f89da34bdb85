"""What paper and pencil say about a scenario, beside the simulation.

With C sequences in flight, B rollouts per step, rho = production / consumption, and M = expected
longest response of a group over the expected response, a group whose version counts from its start
has a mean staleness of C·M/B + rho when the engines are the bottleneck (rho < 1; published by
Applied Compute, 2026). The forms know no deadlines, no KV limit and no variance between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapo_async.planner.outcome import Outcome
from dapo_async.planner.scenario import Scenario

CLOSE = 0.10  # a larger difference is explained


@dataclass(frozen=True, slots=True)
class ClosedForms:
    """Times in seconds."""

    generate_s: float  # of the groups of a step, engines full
    train_s: float
    step_s: float
    group_staleness: float | None  # None: no form for this mode

    @property
    def rho(self) -> float:
        """Production over consumption: below 1 the engines are the bottleneck."""
        return self.train_s / self.generate_s


def closed_forms(scenario: Scenario) -> ClosedForms:
    """The step is the sum of both sides at staleness 0, else the longer one."""
    mean, batch = scenario.lengths.mean_tokens, scenario.groups_per_step * scenario.group_size
    credits = (scenario.max_staleness + 1) * batch
    in_flight = min(scenario.num_slots, credits)
    if scenario.max_staleness == 0:
        in_flight = min(in_flight, batch)
    per_engine = in_flight / scenario.num_engines
    context = scenario.prompt_tokens + mean / 2
    token_s = per_engine / scenario.engine.tokens_per_s(per_engine, context)
    acceptance = sum(scenario.acceptance) / 2
    prefill = batch / scenario.group_size * scenario.prompt_tokens * scenario.engine.prefill_s
    generate_s = (batch * mean * token_s / in_flight + prefill / scenario.num_engines) / acceptance
    train_s = scenario.train_s
    if scenario.max_staleness == 0:
        # The last response of the batch decides; the longest one is a bound for it.
        longest = min(scenario.lengths.max_tokens, mean * scenario.lengths.longest_of(batch))
        generate_s += (longest - mean) * scenario.engine.step_s[1]
        step_s = generate_s + train_s + scenario.publish_s
        return ClosedForms(generate_s, train_s, step_s, 0.0)
    generate_s += scenario.pause_s
    step_s = max(generate_s, train_s)
    staleness = None
    if generate_s > train_s:
        longest_share = scenario.lengths.longest_of(scenario.group_size)
        started = in_flight * longest_share / (batch / acceptance)
        publish = scenario.publish_s / step_s
        staleness = min(scenario.max_staleness, started + train_s / generate_s + publish)
    elif scenario.admission == "eager":
        staleness = float(scenario.max_staleness)
    return ClosedForms(generate_s, train_s, step_s, staleness)


def differences(scenario: Scenario, forms: ClosedForms, outcome: Outcome) -> list[str]:
    """Why the simulated step time differs from the closed form, if by more than 10 %."""
    if abs(outcome.step_s / forms.step_s - 1) <= CLOSE:
        return []
    reasons = []
    if outcome.learner["deadline"] > 0.03:
        reasons.append(
            f"the learner waits {outcome.learner['deadline']:.0%} of the time for late groups, "
            "because their deadline would be lost"
        )
    if outcome.engines["queued"] > 0.03:
        reasons.append(f"the KV cache leaves {outcome.engines['queued']:.0%} of the slots empty")
    if outcome.engines["sync"] + outcome.engines["tail"] > 0.03:
        lost = outcome.engines["sync"] + outcome.engines["tail"]
        reasons.append(f"weight updates cost {lost:.0%} of the slots' time")
    if outcome.engines["dead"] > 0.03:
        reasons.append(f"lost engines cost {outcome.engines['dead']:.0%} of the slots' time")
    if scenario.lengths.drift != 1.0:
        reasons.append("responses change their length during the run")
    if outcome.engines["no_credit"] > 0.1 and forms.rho < 1:
        reasons.append(
            f"credits or the end of a batch leave {outcome.engines['no_credit']:.0%} of the slots "
            "empty"
        )
    return reasons or ["lengths of the batches vary, and the slower side changes from step to step"]
