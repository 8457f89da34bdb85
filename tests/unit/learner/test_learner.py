"""The learner's step against its formulas.

Token-mean exactness, minibatches, proximal modes, skipped steps, the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learner_world import (
    LENGTHS,
    LR,
    VERSION,
    Naive,
    PassBeforeEveryMinibatch,
    StepOutcome,
    dense_logprobs,
    microbatches_of,
    outcome,
    rank_of,
    sequences_of,
    synthetic_groups,
    tiny_decoder,
)
from torch import Tensor

from dapo_async.algorithm import OBJECTIVES
from dapo_async.algorithm.objectives import Objective, Surrogate, Terms
from dapo_async.learner import LearnerRank
from dapo_async.learner.batching import Microbatch
from dapo_async.learner.optimizer import warmed_up
from dapo_async.learner.rank import MinibatchCounts
from dapo_async.types import Group

NUM_TOKENS = sum(map(sum, LENGTHS))  # 75 response tokens in 12 rollouts
CUTS = (1, 20, 40, 10_000)  # tokens per microbatch: one sequence each … everything in one
Form = dict[str, Any]  # knobs of the section algorithm
FORMS: list[Form] = [
    {},
    {"overlong_filtering": True},
    {"objective": "gspo"},
    {"objective": "cispo", "clip_high": 0.1},
    {"correction": "m2po"},
    {"proximal": "interpolate"},
    {"proximal": "behaviour"},
    {"normalize_std": False, "correction_band": (None, 1.1)},
    {"sequence_band": (0.9, 1.1), "overlong_filtering": True},
    {"entropy_bonus": 0.3, "overlong_filtering": True},
    {"loss_mean": "sequence"},
    {"loss_mean": "sequence", "entropy_bonus": 0.3, "overlong_filtering": True},
    {"kl_coef": 0.5, "kl_estimator": "k1"},
    {"kl_coef": 0.5, "kl_estimator": "k2", "overlong_filtering": True},
    {"kl_coef": 0.5, "loss_mean": "sequence", "sequence_band": (0.9, 1.1)},
]
STALE_FORMS: list[Form] = [  # with several minibatches the clips act
    {},
    {"overlong_filtering": True, "correction": "m2po"},
    {"proximal": "interpolate"},
    {"objective": "gspo", "sequence_band": (0.9, 1.1)},
    {"objective": "gspo", "clip_low": 0.01, "clip_high": 0.01},
    {"objective": "cispo", "clip_low": 0.02, "clip_high": 0.02},
    {"loss_mean": "sequence", "overlong_filtering": True},
    {"kl_coef": 0.5, "correction": "m2po", "loss_mean": "sequence"},
]


def assert_same(one: StepOutcome, other: StepOutcome) -> None:
    assert one.metrics == pytest.approx(other.metrics, rel=2e-5, abs=1e-6)
    for ours, theirs in zip(one.first_moments, other.first_moments, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    for name, ours in one.weights.items():
        # AdamW divides a gradient by its own size. Rounding of gradients near 0 therefore changes a
        # weight, by at most a small part of LR.
        torch.testing.assert_close(ours, other.weights[name], rtol=0, atol=0.01 * LR, msg=name)


def assert_equals_the_naive_step(
    rank: LearnerRank, naive: Naive, groups: Sequence[Group]
) -> StepOutcome:
    expected, done = naive.step(groups), outcome(rank, groups)
    # Each update passes the rounding described above on to the next minibatch.
    amplified = 1 if naive.learner.num_minibatches == 1 else 20
    assert {name: done.metrics[name] for name in expected} == pytest.approx(
        expected, rel=2e-5 * amplified, abs=1e-6 * amplified
    )
    for name, parameter in naive.decoder.named_parameters():
        torch.testing.assert_close(
            done.weights[name], parameter.detach(), rtol=0, atol=0.01 * LR * amplified, msg=name
        )
    return done


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loss_gradient_weights_and_metrics_do_not_depend_on_microbatches_or_order(
    form: Form,
) -> None:
    groups = synthetic_groups()
    at_once = outcome(rank_of(algorithm=form), groups)
    for tokens in CUTS:
        assert_same(outcome(rank_of(algorithm=form, microbatch_tokens=tokens), groups), at_once)
        assert_same(
            outcome(rank_of(algorithm=form, microbatch_tokens=tokens), groups[::-1]), at_once
        )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_step_equals_one_dense_forward_per_rollout_and_a_mean_over_all_tokens(form: Form) -> None:
    done = assert_equals_the_naive_step(
        rank_of(algorithm=form, microbatch_tokens=40), Naive(algorithm=form), synthetic_groups()
    )
    masked = 9 + 11 if "overlong_filtering" in form else 0  # the two truncated rollouts
    assert done.metrics["loss_tokens"] == NUM_TOKENS - masked


def test_an_own_objective_is_a_function_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def reinforce(terms: Terms) -> Surrogate:
        return Surrogate(terms.advantage * terms.current, {})

    monkeypatch.setitem(OBJECTIVES, "reinforce", Objective(reinforce, dual_clip=False))
    groups = synthetic_groups()
    own = outcome(rank_of(algorithm={"objective": "reinforce"}), groups)
    unclipped = outcome(
        rank_of(algorithm={"objective": "cispo", "clip_low": 1.0, "clip_high": 1e9}), groups
    )  # whose ratio is 1 before the update
    for ours, theirs in zip(own.first_moments, unclipped.first_moments, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


class AveragesMicrobatchMeans(LearnerRank):
    """A broken learner: each microbatch divides by its own tokens, then all are averaged."""

    num_microbatches = 0

    def _loss(
        self,
        batch: Microbatch,
        logprobs: Tensor,
        entropies: Tensor,
        start_logprobs: Tensor | None,
        keep: Tensor | None,
        counts: MinibatchCounts,
        reference_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = replace(counts, num_tokens=float(batch.mask.sum()) * self.num_microbatches)
        return super()._loss(batch, logprobs, entropies, start_logprobs, keep, own)


def test_averaging_the_means_of_microbatches_is_detected() -> None:
    groups = synthetic_groups()
    at_once = outcome(rank_of(), groups)
    broken = rank_of(kind=AveragesMicrobatchMeans, microbatch_tokens=30)
    assert isinstance(broken, AveragesMicrobatchMeans)
    broken.num_microbatches = len(microbatches_of(sequences_of(groups), 30))
    assert broken.num_microbatches == 4
    done = outcome(broken, groups)
    assert done.metrics["loss"] == pytest.approx(
        at_once.metrics["loss"], rel=1e-5
    )  # reported from sums and counts: it can't tell
    assert done.metrics["grad_norm"] != pytest.approx(at_once.metrics["grad_norm"], rel=1e-2)
    with pytest.raises(AssertionError):
        assert_same(replace(done, metrics=at_once.metrics), at_once)
    with pytest.raises(AssertionError):
        assert_same(
            replace(done, metrics=at_once.metrics, first_moments=at_once.first_moments), at_once
        )


class PassAfterTheFirstUpdate(LearnerRank):
    """A broken learner: every minibatch takes its own logprobs for the proximal ones."""

    def _loss(
        self,
        batch: Microbatch,
        logprobs: Tensor,
        entropies: Tensor,
        start_logprobs: Tensor | None,
        keep: Tensor | None,
        counts: MinibatchCounts,
        reference_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super()._loss(batch, logprobs, entropies, logprobs.detach(), keep, counts)


def test_microbatches_hold_whole_sequences_within_the_limit_and_a_longer_one_alone() -> None:
    rows = sequences_of(synthetic_groups())
    lengths = sorted(row.num_tokens for row in rows)
    # Without the last token of each response, which predicts nothing.
    assert lengths == [2, 4, 5, 6, 7, 10, 10, 10, 10, 12, 14, 15]
    assert [batch.lengths for batch in microbatches_of(rows, 14)] == [
        (15,),
        (14,),
        (2, 5, 10),  # 13 tokens: the prompt of two tokens counts once
        (6, 10),
        (12,),
        (10,),
        (10,),
        (4, 7),
    ]
    # 77 tokens with each prompt once fit two microbatches of at most 40.
    batches = microbatches_of(rows, 40)
    assert [batch.lengths for batch in batches] == [
        (2, 5, 10, 10, 12, 15),
        (4, 6, 7, 10, 10, 14),
    ]
    assert [len(batch.token_ids) for batch in batches] == [40, 37]


@pytest.mark.parametrize("num_minibatches", [2, 4])
@pytest.mark.parametrize("form", STALE_FORMS, ids=str)
def test_minibatches_are_sequential_updates_with_the_proximal_policy_of_the_start(
    form: Form, num_minibatches: int
) -> None:
    knobs: dict[str, Any] = {"algorithm": form, "num_minibatches": num_minibatches}
    done = assert_equals_the_naive_step(
        rank_of(**knobs, microbatch_tokens=30), Naive(**knobs), synthetic_groups()
    )
    assert (
        done.metrics["current_log_ratio_max"] > 0.01
    )  # the later minibatches meet a policy that has moved
    assert done.metrics["clip_low_fraction"] + done.metrics["clip_high_fraction"] > 0


def test_a_proximal_policy_taken_before_each_minibatch_is_detected() -> None:
    """A broken setting: the proximal policy `current` moves with the minibatches."""
    with pytest.raises(AssertionError):
        assert_equals_the_naive_step(
            rank_of(algorithm={"proximal": "current"}, num_minibatches=2),
            Naive(num_minibatches=2),
            synthetic_groups(),
        )


PASS_FORMS: list[Form] = [
    {},
    {"correction": "m2po"},
    {"correction": "mask", "correction_band": (0.8, 1.3)},
    {"objective": "gspo", "overlong_filtering": True},
    {"loss_mean": "sequence", "entropy_bonus": 0.1},
]


def counted_outcome(rank: LearnerRank, groups: Sequence[Group]) -> tuple[StepOutcome, int]:
    """What a step leaves behind, and how many forward passes it has made."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    rank.decoder.model.norm.register_forward_hook(count)
    return outcome(rank, groups), passes


def assert_equal_bits(one: StepOutcome, other: StepOutcome) -> None:
    assert one.metrics == other.metrics
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@pytest.mark.parametrize("num_minibatches", [1, 3])
@pytest.mark.parametrize("form", PASS_FORMS, ids=str)
def test_the_first_minibatch_needs_no_proximal_pass_and_no_bit_changes(
    form: Form, num_minibatches: int
) -> None:
    knobs: dict[str, Any] = {"num_minibatches": num_minibatches, "microbatch_tokens": 20}
    groups, rank = synthetic_groups(), rank_of(algorithm=form, **knobs)
    parts = {1: [groups], 3: [groups[:1], groups[1:2], groups[2:]]}[num_minibatches]
    microbatches = [len(rank.share_of(part).passes) for part in parts]
    assert microbatches[-1] > 1
    done, passes = counted_outcome(rank, groups)
    extra, most = counted_outcome(
        rank_of(kind=PassBeforeEveryMinibatch, algorithm=form, **knobs), groups
    )
    assert_equal_bits(done, extra)
    assert most == 2 * sum(microbatches)
    assert passes == most - (0 if form.get("correction") == "m2po" else microbatches[0])


def test_current_is_recompute_bit_for_bit_with_as_many_forward_passes() -> None:
    results = {
        mode: counted_outcome(
            rank_of(algorithm={"proximal": mode}, microbatch_tokens=40), synthetic_groups()
        )
        for mode in ("current", "recompute")
    }
    assert {mode: passes for mode, (_, passes) in results.items()} == {"current": 2, "recompute": 2}
    assert_equal_bits(results["current"][0], results["recompute"][0])
    assert results["current"][0].metrics["current_log_ratio_max"] == 0.0


def test_proximal_logprobs_taken_after_the_first_update_are_detected() -> None:
    late = rank_of(kind=PassAfterTheFirstUpdate, num_minibatches=2)
    with pytest.raises(AssertionError):
        assert_equals_the_naive_step(late, Naive(num_minibatches=2), synthetic_groups())


def test_metrics_are_token_means_of_the_dense_policy() -> None:
    groups, decoder = synthetic_groups(), tiny_decoder()
    pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
    tables = [
        dense_logprobs(
            decoder, group.prompt.token_ids, rollout.completion.token_ids, group.temperature
        )
        for group, rollout in pairs
    ]
    logprobs, entropies = (
        torch.cat([table[part] for table in tables]).detach().numpy() for part in (0, 1)
    )
    behaviour = np.concatenate([rollout.completion.behaviour_logprobs for _, rollout in pairs])
    staleness = VERSION - np.concatenate(
        [rollout.completion.weight_versions for _, rollout in pairs]
    )
    expected = {
        "entropy": entropies.mean(),
        "probability": np.exp(logprobs).mean(),
        "staleness": staleness.mean(),
        "staleness_max": 3.0,
        "behaviour_log_ratio_max": np.abs(logprobs - behaviour).max(),
        "behaviour_kl_k1": (behaviour - logprobs).mean(),
        "weight_truncated_fraction": (logprobs - behaviour > np.log(2.0)).mean(),
        "response_tokens": 75 / 12,
        "truncated": 2 / 12,
        "accuracy": 7 / 12,
        "reward": (1 - 2 + 3 * 0.5 + 2 - 1 - 1 + 1 - 1.3) / 12,
        "mixed_versions": sum(
            len(set(rollout.completion.weight_versions.tolist())) > 1 for _, rollout in pairs
        )
        / 12,
        "group_staleness_max": 3.0,
        "groups": 4.0,
        "groups_equal_rewards": 1.0,
        "rollouts": 12.0,
        "tokens": 75.0,
        "skipped": 0.0,
        "lr": LR,
    }
    done = outcome(rank_of(microbatch_tokens=20), groups).metrics
    assert {name: done[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < done["weight_truncated_fraction"] < 1


def with_a_bad_number(
    groups: Sequence[Group], *, behaviour: float | None = None, reward: float | None = None
) -> list[Group]:
    """The groups with one bad number in the last rollout: a behaviour logprob or the reward."""
    rollout = groups[3].rollouts[2]
    logprobs = rollout.completion.behaviour_logprobs.copy()
    logprobs[1] = logprobs[1] if behaviour is None else behaviour
    bad = replace(
        rollout,
        completion=replace(rollout.completion, behaviour_logprobs=logprobs),
        reward=rollout.reward if reward is None else reward,
    )
    return [*groups[:3], replace(groups[3], rollouts=(*groups[3].rollouts[:2], bad))]


@pytest.mark.parametrize(
    "bad", [{"behaviour": np.nan}, {"reward": np.inf}, {"reward": np.nan}], ids=str
)
@pytest.mark.parametrize("proximal", ["recompute", "current", "interpolate", "behaviour"])
def test_a_step_that_is_not_finite_is_skipped_and_leaves_nothing_behind(
    bad: dict[str, float], proximal: str
) -> None:
    groups, before = synthetic_groups(), tiny_decoder().state_dict()
    rank = rank_of(algorithm={"proximal": proximal}, microbatch_tokens=40)
    metrics = rank.step(with_a_bad_number(groups, **bad))
    assert metrics.totals["skipped"] == 1.0
    assert "grad_norm" not in metrics.sums
    assert rank.version == VERSION + 1
    assert all(
        torch.equal(weight, before[name]) for name, weight in rank.decoder.state_dict().items()
    )
    fresh = rank_of(algorithm={"proximal": proximal}, microbatch_tokens=40, version=VERSION + 1)
    assert_same(outcome(rank, groups), outcome(fresh, groups))


def test_garbage_in_a_filtered_rollout_skips_nothing() -> None:
    form = {"overlong_filtering": True}
    groups = synthetic_groups()
    clean, rollout = outcome(rank_of(algorithm=form), groups), groups[0].rollouts[1]
    garbage = replace(
        rollout,
        completion=replace(rollout.completion, behaviour_logprobs=np.full(9, np.nan, np.float32)),
    )
    groups[0] = replace(groups[0], rollouts=(groups[0].rollouts[0], garbage, groups[0].rollouts[2]))
    assert_same(outcome(rank_of(algorithm=form), groups), clean)


def test_a_bad_second_minibatch_keeps_the_update_of_the_first() -> None:
    groups = synthetic_groups()
    rank, naive = rank_of(num_minibatches=2), Naive(num_minibatches=2)
    naive.step(groups, kept_minibatches=1)
    totals = rank.step(with_a_bad_number(groups, behaviour=np.nan)).totals
    assert totals["non_finite"] == 1.0
    assert (
        totals["skipped"] == 0.0
    )  # the first minibatch has moved the weights: these groups were trained
    for name, parameter in naive.decoder.named_parameters():
        torch.testing.assert_close(
            rank.decoder.state_dict()[name], parameter.detach(), rtol=0, atol=0.01 * LR
        )


def test_a_bad_first_minibatch_skips_the_others_too() -> None:
    version, before = VERSION + 1, tiny_decoder().state_dict()
    rank = rank_of(num_minibatches=2, version=version)
    assert (
        rank.step([*reversed(with_a_bad_number(synthetic_groups(), behaviour=np.nan))]).totals[
            "skipped"
        ]
        == 1.0
    )
    assert all(
        torch.equal(weight, before[name]) for name, weight in rank.decoder.state_dict().items()
    )


def saved_bytes(rank: LearnerRank, groups: Sequence[Group]) -> tuple[int, StepOutcome]:
    """Bytes that the forward passes of one step keep for the backward passes, without weights."""
    weights, held = {parameter.data_ptr() for parameter in rank.decoder.parameters()}, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal held
        held += 0 if tensor.data_ptr() in weights else tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        done = outcome(rank, groups)
    return held, done


def test_recomputed_layers_keep_less_and_change_no_bit() -> None:
    held, done = saved_bytes(rank_of(), synthetic_groups())
    one_of_two = rank_of()
    one_of_two.decoder.recompute("all", num_layers=1)
    for rank in (rank_of(recompute="mlp"), one_of_two, rank_of(recompute="all")):
        less, same = saved_bytes(rank, synthetic_groups())
        assert same.metrics == done.metrics
        assert all(torch.equal(weight, done.weights[name]) for name, weight in same.weights.items())
        assert less < held
        held = less


def test_the_learning_rate_warms_up_linearly_from_the_first_step_on() -> None:
    assert [warmed_up(1.0, step=step, warmup_steps=4) for step in range(6)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]
    assert warmed_up(1.0, step=0, warmup_steps=0) == 1.0
    rank, groups = rank_of(lr=0.5, warmup_steps=5, version=1), synthetic_groups(versions=(0, 1))
    assert rank.step(groups).maxima["lr"] == pytest.approx(0.2)  # the second of five steps
    assert rank._optimizer.lr == 0.2


def test_without_any_advantage_only_weight_decay_moves_and_only_matrices() -> None:
    groups = [
        replace(group, rollouts=tuple(replace(rollout, reward=0.25) for rollout in group.rollouts))
        for group in synthetic_groups()
    ]
    before = tiny_decoder().state_dict()
    done = outcome(rank_of(weight_decay=0.1), groups)
    assert (done.metrics["loss"], done.metrics["grad_norm"]) == (0.0, 0.0)
    for name, weight in done.weights.items():
        expected = before[name] * (1 - LR * 0.1) if weight.ndim == 2 else before[name]
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)


def test_the_global_gradient_norm_is_clipped_and_reported_as_it_was_before() -> None:
    def clipped(limit: float) -> tuple[float, float]:
        done = outcome(rank_of(grad_clip=limit), synthetic_groups())
        # exp_avg is 0.1 of the first gradient that AdamW saw
        return done.metrics["grad_norm"], 10 * float(
            torch.cat([moment.flatten() for moment in done.first_moments]).norm()
        )

    free, seen = clipped(1e9)
    assert seen == pytest.approx(free, rel=1e-5)
    assert clipped(free / 4) == pytest.approx((free, free / 4), rel=1e-5)


def test_bfloat16_activations_train_float32_master_weights() -> None:
    groups = synthetic_groups()
    exact, half = rank_of(), rank_of(activations=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in half.decoder.state_dict().items()}
    exact_metrics, half_metrics = exact.step(groups).flat(), half.step(groups).flat()
    moved = [
        not torch.equal(before[name], tensor) for name, tensor in half.decoder.state_dict().items()
    ]
    assert all(moved)
    assert all(parameter.dtype is torch.float32 for parameter in half.decoder.parameters())
    # Eight bits of mantissa: about 1 % on a gradient norm, and never equal to the exact one.
    assert half_metrics["grad_norm"] == pytest.approx(exact_metrics["grad_norm"], rel=0.05)
    assert half_metrics["grad_norm"] != exact_metrics["grad_norm"]
