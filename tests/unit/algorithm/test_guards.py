"""Rules on numbers: which minibatches and steps they find, and what the modes do with them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from dapo_async.algorithm.guards import (
    KEPT_BATCHES,
    NO_VARIANCE_STEPS,
    Guard,
    MinibatchFacts,
    RunGuards,
    broken_by_minibatch,
)

HEALTHY = MinibatchFacts(
    loss=-0.01,
    grad_norm=0.5,
    num_tokens=1000.0,
    kl_sum=5.0,
    ratio_sum=1000.0,
    chi2_sum=50.0,
    num_rollouts=64.0,
    num_truncated=63.0,
)
VALUES = {"entropy": 2.0, "accuracy": 0.5, "grad_norm": 0.5}


def test_a_healthy_minibatch_breaks_no_rule() -> None:
    assert broken_by_minibatch(HEALTHY) == ()
    assert HEALTHY.effective_share == pytest.approx(1000 / 1050)
    nothing = MinibatchFacts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert (nothing.effective_share, broken_by_minibatch(nothing)) == (1.0, ())


@pytest.mark.parametrize(
    ("change", "guard"),
    [
        ({"loss": math.nan}, Guard.NON_FINITE),
        ({"grad_norm": math.inf}, Guard.NON_FINITE),
        ({"kl_sum": 501.0}, Guard.EXPLODING_RATIO),
        ({"ratio_sum": 100.0, "chi2_sum": -500.0}, Guard.FEW_EFFECTIVE),  # 100²/1000/500 = 0.02
        ({"num_truncated": 64.0}, Guard.ALL_TRUNCATED),
    ],
)
def test_each_rule_of_a_minibatch_is_found_at_its_limit(
    change: dict[str, float], guard: Guard
) -> None:
    assert broken_by_minibatch(replace(HEALTHY, **change)) == (guard,)


def test_a_few_rollouts_may_all_be_cut_by_chance() -> None:
    assert broken_by_minibatch(replace(HEALTHY, num_rollouts=15.0, num_truncated=15.0)) == ()
    assert broken_by_minibatch(replace(HEALTHY, kl_sum=500.0)) == ()


def test_a_rule_is_named_when_it_begins_and_counted_in_every_step() -> None:
    guards = RunGuards()
    bad = VALUES | {"guard.few_effective": 1.0, "behaviour_ess": 0.012}
    assert guards.after_step(0, VALUES, mismatches=0) == []
    assert guards.after_step(1, bad, mismatches=0) == [
        "step 2: effective samples 1.2% of the tokens (guard few_effective)"
    ]
    assert guards.after_step(2, bad, mismatches=0) == []
    assert guards.after_step(3, VALUES, mismatches=0) == []
    assert len(guards.after_step(4, bad, mismatches=0)) == 1
    assert guards.counts == {"few_effective": 3}
    assert guards.stop_reason is None


def test_collapse_of_the_entropy_is_none_once_the_task_is_learned() -> None:
    for accuracy, found in ((0.5, 1), (0.95, 0)):
        guards = RunGuards()
        guards.after_step(0, VALUES, mismatches=0)
        low = VALUES | {"entropy": 0.039, "accuracy": accuracy}
        assert len(guards.after_step(1, low, mismatches=0)) == found
    guards = RunGuards()
    guards.after_step(0, {"grad_norm": 0.5}, mismatches=0)  # a skipped step has no entropy
    assert guards.after_step(1, VALUES | {"entropy": 0.039}, mismatches=0) == []


def test_equal_rewards_are_a_fault_only_after_many_steps() -> None:
    # The gradient of a KL term is not 0.
    guards, none = RunGuards(), VALUES | {"groups": 4.0, "groups_equal_rewards": 4.0}
    some = none | {"groups_equal_rewards": 3.0}
    for step in range(NO_VARIANCE_STEPS - 1):
        assert guards.after_step(step, none, mismatches=0) == []
    (line,) = guards.after_step(NO_VARIANCE_STEPS - 1, none, mismatches=0)
    assert "have been equal for 20 steps" in line
    assert guards.after_step(NO_VARIANCE_STEPS, some, mismatches=0) == []
    assert guards.after_step(NO_VARIANCE_STEPS + 1, none, mismatches=0) == []


def test_a_resumed_run_goes_on_with_what_its_guards_have_seen() -> None:
    guards, equal = RunGuards(), VALUES | {"groups": 4.0, "groups_equal_rewards": 4.0}
    for step in range(NO_VARIANCE_STEPS - 1):
        guards.after_step(step, equal, mismatches=step > 5)
    guards.to_keep({"guard.all_truncated": 1.0})
    state = json.loads(json.dumps(guards.state()))
    for _ in range(KEPT_BATCHES - 1):
        guards.to_keep({"guard.all_truncated": 1.0})
    full = json.loads(json.dumps(guards.state()))

    resumed = RunGuards.resumed("stop", state)
    assert resumed.counts == {"checksum_mismatch": 1}
    low = equal | {"entropy": 0.039}
    lines = resumed.after_step(NO_VARIANCE_STEPS - 1, low, mismatches=0)
    assert [line.partition("(guard ")[2] for line in lines] == ["entropy_collapse)", "no_variance)"]
    again = RunGuards.resumed("warn", resumed.state())
    assert again.after_step(NO_VARIANCE_STEPS, low, mismatches=0) == [], "both are known"
    assert again.counts == {"checksum_mismatch": 1, "entropy_collapse": 2, "no_variance": 2}
    assert RunGuards.resumed("warn", full).to_keep({"guard.all_truncated": 1.0}) == ()
    assert RunGuards.resumed("warn", {}) == RunGuards(), "of an earlier version"


def test_each_engine_with_wrong_weights_is_counted_in_the_step_that_follows() -> None:
    guards = RunGuards()
    assert guards.after_step(0, VALUES, mismatches=0) == []
    assert len(guards.after_step(1, VALUES, mismatches=1)) == 1
    assert guards.after_step(2, VALUES, mismatches=1) == []
    assert guards.counts == {"checksum_mismatch": 1}


def test_stop_has_a_reason_with_the_remedy() -> None:
    guards = RunGuards("stop")
    guards.after_step(6, VALUES | {"guard.all_truncated": 1.0}, mismatches=0)
    assert guards.stop_reason == (
        "step 7: all responses are cut at rollout.max_response_tokens (train.guards=stop); read "
        "the batches in guarded/ and non_finite/, and continue with train.guards=warn, or from an "
        "older checkpoint with --from"
    )


def test_only_the_first_batches_of_each_rule_are_kept() -> None:
    guards, bad = RunGuards(), {"guard.all_truncated": 1.0, "guard.few_effective": 0.0}
    kept = [guards.to_keep(bad) for _ in range(KEPT_BATCHES + 2)]
    assert kept == [(Guard.ALL_TRUNCATED,)] * KEPT_BATCHES + [()] * 2
    assert guards.to_keep({"guard.few_effective": 1.0}) == (Guard.FEW_EFFECTIVE,)
