"""Metrics of a minibatch: of the tokens of its passes, and of its rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_async.algorithm import sums_and_counts
from dapo_async.learner.batch_plan import RankShare
from dapo_async.learner.batching import Microbatch
from dapo_async.learner.mismatch import mismatch_metrics
from dapo_async.model import Mesh, ModelConfig
from dapo_async.model.mixture import Routing
from dapo_async.types import Group, StepMetrics


@torch.no_grad()
def token_sums(
    batch: Microbatch, logprobs: Tensor, entropies: Tensor, *, learner_version: int
) -> dict[str, Tensor]:
    """Over the tokens in the loss: entropy (nats), probability of the token, staleness (versions).

    `logprobs`, `entropies` [N]. The names say how each adds up, as those of the loss's diagnostics.
    """
    staleness = (learner_version - batch.behaviour_versions).masked_fill(~batch.mask, 0)
    return {
        "entropy_sum": entropies.masked_fill(~batch.mask, 0.0).sum(),
        "probability_sum": logprobs.exp().masked_fill(~batch.mask, 0.0).sum(),
        "staleness_sum": staleness.sum(),
        "staleness_max": staleness.max(),
    }


# Sums of the loss's diagnostics over all ranks, for the rules of `algorithm.guards`.
GUARDED = ("behaviour_kl_k3_sum", "behaviour_ratio_sum", "behaviour_chi2_sum", "num_tokens")


@dataclass(frozen=True, slots=True)
class WholeSums:
    """Of a minibatch over all ranks: its loss, the norm of its gradient, and sums over tokens."""

    loss: float
    grad_norm: float
    num_tokens: float
    kl_sum: float
    ratio_sum: float
    chi2_sum: float


class PassSums:
    """The sums of all passes of a minibatch. They stay on the device until one read at its end.

    A read would make the host wait for the device in every pass.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._load = ExpertLoad(model)
        self._names: list[tuple[str, ...]] = []  # of the loss and tokens, of the mismatch
        self._rows: list[Tensor] = []  # one per pass, the loss first

    def add(
        self,
        loss: Tensor,
        token_sums: Mapping[str, Tensor],
        mismatch: Mapping[str, Tensor],
        routing: Routing | None = None,
    ) -> None:
        if routing is not None:
            self._load.add(routing)
        self._names = [tuple(token_sums), tuple(mismatch)]
        values = [loss, *token_sums.values(), *mismatch.values()]
        self._rows.append(torch.stack([value.double() for value in values]))

    def read(self, gradient_norm: Tensor, mesh: Mesh) -> tuple[StepMetrics, WholeSums]:
        """Metrics of these passes, and what they add up to over all ranks."""
        rows = torch.stack(self._rows)
        of_tokens, of_mismatch = self._names
        places = [0, *(1 + of_tokens.index(name) for name in GUARDED)]
        # Over all axes, although ranks with the same groups have equal numbers: so every rank
        # gets the same bits, and decides alike.
        whole = mesh.every.sum(rows.sum(0)[places]) / mesh.ranks_per_batch
        load = self._load.whole(mesh).to(rows)
        every = [load, rows.flatten(), whole, gradient_norm.double().reshape(1)]
        read = torch.cat(every).tolist()
        *values, loss, kl, ratio, chi2, num_tokens, norm = read[len(load) :]
        metrics, size = self._load.metrics(read[: len(load)]), rows.shape[1]
        for start in range(0, len(values), size):
            row = values[start + 1 : start + size]
            middle = len(of_tokens)
            metrics = metrics + sums_and_counts(dict(zip(of_tokens, row[:middle], strict=True)))
            if of_mismatch:
                gaps = dict(zip(of_mismatch, row[middle:], strict=True))
                metrics = metrics + mismatch_metrics(gaps)
        return metrics, WholeSums(loss, norm, num_tokens, kl, ratio, chi2)


class ExpertLoad:
    """How the pairs of token and expert of a minibatch spread over the experts.

    All tokens of the passes count, prompts and padding included. Nothing for a dense model.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._layers, self._num_experts = model.mixture_layers, model.num_experts
        self._counts: Tensor | None = None  # [M · E + 1] int64; at the end the replaced pairs

    def add(self, routing: Routing) -> None:
        if not self._layers:
            return
        counts = routing.load(self._num_experts).flatten()
        counts = torch.cat((counts, routing.replaced().reshape(1)))
        self._counts = counts if self._counts is None else self._counts + counts

    def whole(self, mesh: Mesh) -> Tensor:
        """The counts over all ranks; empty for a dense model."""
        if self._counts is None:
            return torch.zeros(0)
        return mesh.every.sum(self._counts) // mesh.tp.size  # whose ranks have the same tokens

    def metrics(self, counts: Sequence[float]) -> StepMetrics:
        """From what `whole` gave. Equal on all ranks."""
        if not counts:
            return StepMetrics()
        *loads, replaced = counts
        sums = {"experts_replaced": (replaced, sum(loads))}
        size, highest, most_dead = self._num_experts, 0.0, 0.0
        for number, layer in enumerate(self._layers):
            load = loads[number * size : (number + 1) * size]
            uneven, dead = max(load) * size / sum(load), load.count(0.0) / size
            sums |= {
                f"expert_load.{layer}": (uneven, 1.0),
                f"experts_dead.{layer}": (dead, 1.0),
            }
            highest, most_dead = max(highest, uneven), max(most_dead, dead)
        maxima = {"expert_load_max": highest, "experts_dead_max": most_dead}
        return StepMetrics(sums, maxima)


def rollout_metrics(
    groups: Sequence[Group], share: RankShare, *, learner_version: int
) -> StepMetrics:
    """Means over a rank's rollouts: reward, accuracy, response length (tokens), two fractions.

    The fractions are those of truncated rollouts, and of rollouts with tokens of several versions.
    A group counts on the rank that has its first rollout. One whose rewards are all equal has
    advantages of 0.
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
    own = [each for each in share.groups if each.siblings[0] == 0]
    staleness = [learner_version - group.oldest_version for group in groups]
    totals = {
        "groups": float(len(own)),
        "groups_equal_rewards": float(sum(len({*each.rewards}) == 1 for each in own)),
        "rollouts": count,
        "tokens": float(sum(rollout.num_tokens for rollout in rollouts)),
    }
    return StepMetrics(
        {name: (float(total), count) for name, total in sums.items()},
        {"group_staleness_max": float(max(staleness))} if staleness else {},
        totals,
    )
