"""Metrics of a step beside the loss: per token of a microbatch, per rollout of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dapo_async.learner.batch_plan import RankShare
from dapo_async.learner.batching import Microbatch
from dapo_async.types import Group, StepMetrics


@torch.no_grad()
def token_metrics(
    batch: Microbatch, logprobs: Tensor, entropies: Tensor, *, learner_version: int
) -> StepMetrics:
    """Over the tokens in the loss: entropy (nats), probability of the token, staleness (versions).

    `logprobs`, `entropies` [N].
    """
    mask, count = batch.mask, float(batch.mask.sum())
    staleness = (learner_version - batch.behaviour_versions)[mask]
    sums = {
        "entropy": (float(entropies[mask].sum()), count),
        "probability": (float(logprobs[mask].exp().sum()), count),
        "staleness": (float(staleness.sum()), count),
    }
    return StepMetrics(sums=sums, maxima={"staleness_max": float(staleness.max())} if count else {})


def rollout_metrics(
    groups: Sequence[Group], share: RankShare, *, learner_version: int
) -> StepMetrics:
    """Means over a rank's rollouts: reward, accuracy, response length (tokens), two fractions.

    The fractions are those of truncated rollouts, and of rollouts with tokens of several versions.
    A group counts on the rank that has its first rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    versions = [rollout.completion.weight_versions.tolist() for rollout in rollouts]
    count = float(len(rollouts))
    sums = {
        "reward": sum(rollout.reward for rollout in rollouts),
        "accuracy": sum(rollout.accuracy for rollout in rollouts),
        "response_tokens": sum(rollout.num_tokens for rollout in rollouts),
        "truncated": sum(rollout.truncated for rollout in rollouts),
        "mixed_versions": sum(len(set(each)) > 1 for each in versions),
    }
    staleness = [learner_version - group.oldest_version for group in groups]
    totals = {
        "groups": float(sum(each.siblings[0] == 0 for each in share.groups)),
        "rollouts": count,
        "tokens": float(sum(rollout.num_tokens for rollout in rollouts)),
    }
    return StepMetrics(
        {name: (float(total), count) for name, total in sums.items()},
        {"group_staleness_max": float(max(staleness))} if staleness else {},
        totals,
    )
