"""Synthetic groups for a tiny random decoder, and a naive form of the learner's step.

The naive form runs one dense forward pass per rollout: nothing is packed or cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.algorithm import summarise
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.learner.batch_plan import RankShare, share_minibatch
from dapo_async.learner.batching import (
    Microbatch,
    TrainingSequence,
    pack_share,
    training_sequences,
)
from dapo_async.model import Decoder, ModelConfig
from dapo_async.types import Completion, FinishReason, Group, GroupFacts, Prompt, Rollout

TINY_JSON = {
    "model_type": "qwen2",
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TINY = ModelConfig.from_dict(TINY_JSON)
VERSION = 3  # of the learner before the step
LR = 0.01
LENGTHS = ((1, 9, 4), (12, 2, 5), (7, 7, 3), (6, 11, 8))  # response tokens by group and rollout
# All rewards of the second group are equal.
REWARDS = ((1.0, -1.0, -1.0), (0.5, 0.5, 0.5), (1.0, 1.0, -1.0), (-1.0, 1.0, -1.3))
TEMPERATURES = (1.0, 0.7, 1.3, 0.7)
TRUNCATED = ((0, 1), (3, 1))  # group and rollout


def randomise(decoder: Decoder) -> None:
    """Weights large enough that the logits differ from token to token."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def tiny_decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(TINY)
    randomise(decoder)
    return decoder


def synthetic_groups(*, noise: float = 0.4, versions: tuple[int, int] = (0, 4)) -> list[Group]:
    """Groups of random tokens.

    Behaviour logprobs are those of the decoder plus `noise`; the versions of the tokens are drawn
    from the range `versions`.
    """
    decoder, random = tiny_decoder(), np.random.default_rng(5)
    groups = []
    for index, (lengths, rewards, temperature) in enumerate(
        zip(LENGTHS, REWARDS, TEMPERATURES, strict=True)
    ):
        prompt = Prompt(index, "", random.integers(0, 23, 2 + index, dtype=np.int32), "")
        rollouts = []
        for sibling, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
            ids = random.integers(0, 23, length, dtype=np.int32)
            logprobs, _ = dense_logprobs(decoder, prompt.token_ids, ids, temperature)
            gap = noise * random.standard_normal(length).astype(np.float32)
            token_versions = np.sort(random.integers(*versions, length, dtype=np.int32))
            completion = Completion(
                ids,
                logprobs.detach().numpy() + gap,
                token_versions,
                int(token_versions[0]),
                FinishReason.LENGTH if (index, sibling) in TRUNCATED else FinishReason.STOP,
            )
            rollouts.append(Rollout(completion, "", float(reward > 0), reward, None))
        groups.append(Group(index, prompt, tuple(rollouts), "first", temperature))
    return groups


def rank_of(
    *,
    algorithm: Mapping[str, Any] | None = None,
    kind: type[LearnerRank] = LearnerRank,
    version: int = VERSION,
    activations: torch.dtype = torch.float32,
    device: str = "cpu",
    **learner: Any,
) -> LearnerRank:
    knobs = {"lr": LR, "warmup_steps": 0, "weight_decay": 0.1, "grad_clip": 0.5} | learner
    decoder = tiny_decoder().to(device)
    decoder.activations = activations
    rank = kind(
        decoder,
        algorithm=AlgorithmConfig(**(algorithm or {})),
        learner=LearnerConfig(**knobs),
        version=version,
    )
    if rank._reference is not None:
        for kept, weight in zip(rank._reference.shards, reference().parameters(), strict=True):
            kept.copy_(weight.detach())
    return rank


def reference() -> Decoder:
    """A reference policy near the first one, so that the KL term of a first step is not 0."""
    decoder = tiny_decoder()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder


class PassBeforeEveryMinibatch(LearnerRank):
    """A reference: proximal logprobs by an extra pass over every microbatch of the step."""

    def _recompute(self, batches: Sequence[Microbatch], *, first: bool) -> dict[int, Tensor]:
        if not first or self._algorithm.proximal != "recompute":
            return super()._recompute(batches, first=first)
        with torch.no_grad():
            return {id(batch): self._forward(batch)[0] for batch in batches}


def sequences_of(
    groups: Sequence[Group], *, normalize_std: bool = True, overlong_filtering: bool = False
) -> list[TrainingSequence]:
    """The training sequences of whole groups."""
    share = share_of([GroupFacts.of(group) for group in groups])
    return training_sequences(
        groups, share.groups, normalize_std=normalize_std, overlong_filtering=overlong_filtering
    )


def share_of(groups: Sequence[GroupFacts], max_tokens: int = 10**9) -> RankShare:
    """The plan for a single rank."""
    (share,) = share_minibatch(groups, num_ranks=1, max_tokens=max_tokens, pair_cost=0.0)
    return share


def microbatches_of(sequences: Sequence[TrainingSequence], max_tokens: int) -> list[Microbatch]:
    """The microbatches of a single rank for sequences of whole groups, in the groups' order."""
    groups = []
    for _, members in groupby(sequences, key=lambda each: each.group):
        siblings = [*members]
        lengths = tuple(len(each.completion.token_ids) for each in siblings)
        rewards = (0.0,) * len(siblings)
        prompt_tokens = len(siblings[0].prompt_ids)
        groups.append(GroupFacts(0, "", 0, 1, prompt_tokens, lengths, rewards, rewards, ()))
    return pack_share(sequences, share_of(groups, max_tokens))


class PromptPerRollout(LearnerRank):
    """A reference: every rollout is packed with a prompt of its own."""

    def _sequences(self, groups: Sequence[Group], share: RankShare) -> list[TrainingSequence]:
        shared = super()._sequences(groups, share)
        return [replace(each, group=each.sequence_id) for each in shared]


@dataclass
class StepOutcome:
    """What a step leaves behind."""

    metrics: dict[str, float]
    weights: dict[str, Tensor]
    # AdamW's: after the first update (1 - beta1) times the clipped gradient.
    first_moments: list[Tensor]


def outcome(rank: LearnerRank, groups: Sequence[Group]) -> StepOutcome:
    metrics = summarise(rank.step(groups))
    parameters = dict(rank.decoder.named_parameters())
    return StepOutcome(
        metrics,
        {name: parameter.detach().clone() for name, parameter in parameters.items()},
        [tensor for moment, _, tensor in rank._optimizer.moments() if moment == "exp_avg"],
    )


def dense_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain causal softmax attention over one sequence, `[T, H, D]`."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), value)


def dense_logprobs(
    decoder: Decoder,
    prompt_ids: NDArray[np.int32],
    response_ids: NDArray[np.int32],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """log-softmax(logits / T) of each response token, and the entropies."""
    ids = torch.tensor([*prompt_ids, *response_ids])
    hidden = decoder(ids, torch.arange(len(ids)), dense_attention)
    table = (decoder.logits(hidden) / temperature).log_softmax(-1)[len(prompt_ids) - 1 : -1]
    chosen = table[torch.arange(len(response_ids)), ids[len(prompt_ids) :]]
    return chosen, -(table.exp() * table).sum(-1)


class Naive:
    """The step from its formulas: rollouts one by one, a mean over all tokens, torch's AdamW."""

    def __init__(self, *, algorithm: Mapping[str, Any] | None = None, **learner: Any) -> None:
        rank = rank_of(algorithm=algorithm, **learner)
        self.algorithm, self.learner, self.decoder = rank._algorithm, rank._learner, rank.decoder
        self.reference = reference()
        matrices = [parameter for parameter in self.decoder.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in self.decoder.parameters() if parameter.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999))

    def step(
        self, groups: Sequence[Group], *, kept_minibatches: int | None = None
    ) -> dict[str, float]:
        """Trains, and returns loss and gradient norm as the metrics have them.

        `kept_minibatches`: trains on the first so many minibatches only.
        """
        rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
        advantages = [advantage for group in groups for advantage in self.advantages(group)]
        # Before the first minibatch.
        proximal = [self.logprobs(*pair)[0].detach() for pair in rollouts]
        losses, norms, num_tokens = 0.0, [], 0
        for part in self.minibatches(groups)[:kept_minibatches]:
            keep = dict(
                zip(
                    part,
                    self.keep(
                        [rollouts[index] for index in part],
                        [advantages[index] for index in part],
                        [proximal[index] for index in part],
                    ),
                    strict=True,
                )
            )
            live = [index for index in part if self.in_loss(rollouts[index][1])]
            count = sum(rollouts[index][1].num_tokens for index in live)
            total, bonus, kl = torch.zeros(()), torch.zeros(()), torch.zeros(())
            for index in live:
                share = self.share(rollouts[index][1], count, len(live))
                total = total + share * self.rollout_loss(
                    *rollouts[index], advantages[index], proximal[index], keep[index]
                )
                bonus = bonus + share * self.logprobs(*rollouts[index])[1].sum()
                kl = kl + share * self.kl(*rollouts[index])
            extra = self.algorithm.kl_coef * kl - self.algorithm.entropy_bonus * bonus
            ((total + extra) / count).backward()
            norms.append(self.update())
            losses, num_tokens = losses + float(total.detach()), num_tokens + count
        return {
            "loss": losses / num_tokens,
            "grad_norm": sum(norms) / len(norms),
            "loss_tokens": num_tokens,
        }

    def minibatches(self, groups: Sequence[Group]) -> list[list[int]]:
        """The rollouts of each minibatch: whole groups, about as many in each."""
        count, size = self.learner.num_minibatches, len(groups[0].rollouts)
        bounds = [len(groups) * number // count * size for number in range(count + 1)]
        return [[*range(first, last)] for first, last in pairwise(bounds)]

    def share(self, rollout: Rollout, num_tokens: int, num_rollouts: int) -> float:
        """What the tokens of a rollout weigh: 1, or so that all rollouts weigh the same."""
        if self.algorithm.loss_mean == "token":
            return 1.0
        return num_tokens / num_rollouts / rollout.num_tokens

    def update(self) -> float:
        """Clips the gradient and updates; returns the gradient's norm before clipping."""
        gradients = [each.grad for each in self.decoder.parameters() if each.grad is not None]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, self.learner.grad_clip / max(norm, 1e-6)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def logprobs(self, group: Group, rollout: Rollout) -> tuple[Tensor, Tensor]:
        return dense_logprobs(
            self.decoder, group.prompt.token_ids, rollout.completion.token_ids, group.temperature
        )

    def in_loss(self, rollout: Rollout) -> bool:
        truncated = rollout.completion.finish_reason is FinishReason.LENGTH
        return not (self.algorithm.overlong_filtering and truncated)

    def advantages(self, group: Group) -> list[float]:
        rewards = np.array([rollout.reward for rollout in group.rollouts])
        scale = rewards.std(ddof=1) + 1e-6 if self.algorithm.normalize_std else 1.0
        return [float(each) for each in (rewards - rewards.mean()) / scale]

    def keep(
        self,
        rollouts: Sequence[tuple[Group, Rollout]],
        advantages: Sequence[float],
        proximal: Sequence[Tensor],
    ) -> list[Tensor]:
        """M2PO's mask.

        Of the tokens that moved in the direction of their advantage, drops the largest squared log
        ratios until the mean of the rest fits.
        """
        ratios = [
            near.numpy() - rollout.completion.behaviour_logprobs
            for (_, rollout), near in zip(rollouts, proximal, strict=True)
        ]
        keep = [torch.ones(len(ratio), dtype=torch.bool) for ratio in ratios]
        if self.algorithm.correction != "m2po":
            return keep
        moved = [
            (float(square), number, token)
            for number, (ratio, advantage) in enumerate(zip(ratios, advantages, strict=True))
            for token, square in enumerate(ratio**2)
            if ratio[token] * advantage > 0 and self.in_loss(rollouts[number][1])
        ]
        moved.sort()
        while moved and sum(square for square, *_ in moved) / len(moved) > 0.04:
            _, number, token = moved.pop()
            keep[number][token] = False
        return keep

    def proximal(
        self, current: Tensor, start: Tensor, behaviour: Tensor, versions: NDArray[np.int32]
    ) -> Tensor:
        match self.algorithm.proximal:
            case "recompute":
                return start
            case "current":
                return current.detach()
            case "behaviour":
                return behaviour
        staleness = np.maximum(VERSION - versions, 1)
        share = torch.tensor((staleness - 1) / staleness).float()
        return behaviour + share * (current.detach() - behaviour)

    def rollout_loss(
        self, group: Group, rollout: Rollout, advantage: float, start: Tensor, keep: Tensor
    ) -> Tensor:
        """The sum over the tokens of one rollout."""
        knobs, current = self.algorithm, self.logprobs(group, rollout)[0]
        behaviour = torch.from_numpy(rollout.completion.behaviour_logprobs)
        proximal = self.proximal(current, start, behaviour, rollout.completion.weight_versions)
        mismatch, drift = proximal - behaviour, current - proximal
        if knobs.objective == "gspo":
            mismatch = mismatch.sum().expand(len(behaviour))
            drift = drift.mean().expand(len(behaviour))
        weight, ratio = mismatch.exp().clamp(max=knobs.correction_band[1]), drift.exp()
        if knobs.correction == "m2po":
            weight = torch.ones_like(weight)
        clipped = ratio.clamp(1 - knobs.clip_low, 1 + knobs.clip_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        if knobs.objective == "cispo":
            gain = clipped.detach() * advantage * current
        if knobs.sequence_band is not None:
            floor, cap = knobs.sequence_band
            assert floor is not None
            assert cap is not None
            whole = float((proximal - behaviour).mean().exp())
            weight = weight * (floor <= whole <= cap)
        return -(weight * keep * gain).sum()

    def kl(self, group: Group, rollout: Rollout) -> Tensor | float:
        """The sum of the KL estimates over the tokens of one rollout."""
        if not self.algorithm.kl_coef:
            return 0.0
        given = (group.prompt.token_ids, rollout.completion.token_ids, group.temperature)
        gap = self.logprobs(group, rollout)[0] - dense_logprobs(self.reference, *given)[0].detach()
        forms = {"k1": gap, "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}
        return forms[self.algorithm.kl_estimator].sum()
