"""Synthetic groups for a tiny random decoder, and the learner's step written down naively: one dense forward per rollout, nothing packed or cut."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from dapo_async.algorithm import summarise
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.model import Decoder, ModelConfig
from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout

TINY_JSON = {
    "model_type": "qwen2", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
TINY = ModelConfig.from_dict(TINY_JSON)
VERSION = 3  # of the learner before the step
LR = 0.01
LENGTHS = ((1, 9, 4), (12, 2, 5), (7, 7, 3), (6, 11, 8))  # response tokens per group and rollout
REWARDS = (
    (1.0, -1.0, -1.0),
    (0.5, 0.5, 0.5),
    (1.0, 1.0, -1.0),
    (-1.0, 1.0, -1.3),
)  # the second group has nothing to compare
TEMPERATURES = (1.0, 0.7, 1.3, 0.7)
TRUNCATED = ((0, 1), (3, 1))  # group and rollout


def tiny_decoder(seed=0):
    """Weights large enough that the logits differ from token to token."""
    torch.manual_seed(seed)
    decoder = Decoder(TINY)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    return decoder


def synthetic_groups(*, noise=0.4, versions=(0, 4)):
    """Random tokens; behaviour logprobs are those of the decoder but for `noise`, versions per token from a range up to the learner's."""
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
            behaviour = logprobs.detach().numpy() + noise * random.standard_normal(length).astype(
                np.float32
            )
            token_versions = np.sort(random.integers(*versions, length, dtype=np.int32))
            finish = FinishReason.LENGTH if (index, sibling) in TRUNCATED else FinishReason.STOP
            rollouts.append(
                Rollout(
                    Completion(ids, behaviour, token_versions, int(token_versions[0]), finish),
                    "",
                    float(reward > 0),
                    reward,
                    None,
                )
            )
        groups.append(Group(index, prompt, tuple(rollouts), "first", temperature))
    return groups


def rank_of(
    *, algorithm=None, kind=LearnerRank, version=VERSION, activations=torch.float32, **learner
):
    knobs = {"lr": LR, "warmup_steps": 0, "weight_decay": 0.1, "grad_clip": 0.5} | learner
    decoder = tiny_decoder()
    decoder.activations = activations
    return kind(
        decoder,
        algorithm=AlgorithmConfig(**(algorithm or {})),
        learner=LearnerConfig(**knobs),
        seed=0,
        version=version,
    )


@dataclass
class Outcome:
    """All that a step leaves behind."""

    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]
    first_moments: list[
        torch.Tensor
    ]  # AdamW's: (1 - beta1) x the clipped gradient after the first update


def outcome(rank, groups):
    metrics = summarise(rank.step(groups))
    weights = {
        name: parameter.detach().clone() for name, parameter in rank.decoder.named_parameters()
    }
    return Outcome(
        metrics,
        weights,
        [tensor for moment, _, tensor in rank._optimizer.moments() if moment == "exp_avg"],
    )


def dense_attention(layer, query, key, value):
    """Plain causal softmax attention over one sequence: `[T, H, D]`, with shared key and value heads spelt out."""
    key, value = (
        tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)
        for tensor in (key, value)
    )
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), value)


def dense_logprobs(decoder, prompt_ids, response_ids, temperature):
    """log-softmax(logits / T) of each response token, and the entropies."""
    ids = torch.tensor([*prompt_ids, *response_ids])
    hidden = decoder(ids, torch.arange(len(ids)), dense_attention)
    table = (decoder.logits(hidden) / temperature).log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return table[torch.arange(len(response_ids)), ids[len(prompt_ids) :]], -(
        table.exp() * table
    ).sum(-1)


class Naive:
    """The same step from its formulas: rollouts one by one, a mean over all tokens, torch's AdamW."""

    def __init__(self, *, algorithm=None, **learner) -> None:
        rank = rank_of(algorithm=algorithm, **learner)
        self.algorithm, self.learner, self.decoder = rank._algorithm, rank._learner, rank.decoder
        matrices = [parameter for parameter in self.decoder.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in self.decoder.parameters() if parameter.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999))

    def step(self, groups, *, kept_minibatches=None):
        """Trains; `kept_minibatches`: only the first so many. Returns loss and gradient norm as the metrics have them."""
        rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
        advantages = [advantage for group in groups for advantage in self.advantages(group)]
        proximal = [
            self.logprobs(*pair)[0].detach() for pair in rollouts
        ]  # before the first minibatch
        keep = self.keep(rollouts, advantages, proximal)
        order, num_minibatches = np.arange(len(rollouts)), self.learner.num_minibatches
        if num_minibatches > 1:
            order = np.random.default_rng((0, VERSION)).permutation(
                len(rollouts)
            )  # keyed by seed and step
        losses, norms, num_tokens = 0.0, [], 0
        for part in np.split(order, num_minibatches)[:kept_minibatches]:
            live = [index for index in part if self.in_loss(rollouts[index][1])]
            count = sum(rollouts[index][1].num_tokens for index in live)
            # Summed over tokens and divided by their count; or the mean over rollouts of each one's own mean, which only has to be scaled alike.
            shares = dict.fromkeys(live, 1.0)
            if self.algorithm.loss_mean == "sequence":
                shares = {
                    index: count / len(live) / rollouts[index][1].num_tokens for index in live
                }
            parts = [
                shares[index]
                * self.rollout_loss(
                    *rollouts[index], advantages[index], proximal[index], keep[index]
                )
                for index in live
            ]
            bonus = self.algorithm.entropy_bonus * sum(
                shares[index] * self.logprobs(*rollouts[index])[1].sum() for index in live
            )
            ((sum(parts) - bonus) / count).backward()
            gradients = [parameter.grad for parameter in self.decoder.parameters()]
            norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
            for gradient in gradients:
                gradient.mul_(min(1.0, self.learner.grad_clip / max(norms[-1], 1e-6)))
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses, num_tokens = losses + float(sum(parts).detach()), num_tokens + count
        return {
            "loss": losses / num_tokens,
            "grad_norm": sum(norms) / len(norms),
            "loss_tokens": num_tokens,
        }

    def logprobs(self, group, rollout):
        return dense_logprobs(
            self.decoder, group.prompt.token_ids, rollout.completion.token_ids, group.temperature
        )

    def in_loss(self, rollout) -> bool:
        return not (
            self.algorithm.overlong_filtering
            and rollout.completion.finish_reason is FinishReason.LENGTH
        )

    def advantages(self, group):
        rewards = np.array([rollout.reward for rollout in group.rollouts])
        scale = rewards.std(ddof=1) + 1e-6 if self.algorithm.normalize_std else 1.0
        return (rewards - rewards.mean()) / scale

    def keep(self, rollouts, advantages, proximal):
        """M2PO: of the tokens that moved the way of their advantage, the largest squared log ratios go until the mean of the rest fits."""
        ratios = [
            near.numpy() - rollout.completion.behaviour_logprobs
            for (_, rollout), near in zip(rollouts, proximal, strict=True)
        ]
        keep = [torch.ones(len(ratio), dtype=torch.bool) for ratio in ratios]
        if self.algorithm.second_moment is None:
            return keep
        moved = [
            (float(square), number, token)
            for number, (ratio, advantage) in enumerate(zip(ratios, advantages, strict=True))
            for token, square in enumerate(ratio**2)
            if ratio[token] * advantage > 0 and self.in_loss(rollouts[number][1])
        ]
        moved.sort()
        while (
            moved
            and sum(square for square, *_ in moved) / len(moved) > self.algorithm.second_moment
        ):
            _, number, token = moved.pop()
            keep[number][token] = False
        return keep

    def proximal(self, current, start, behaviour, versions):
        match self.algorithm.proximal:
            case "recompute":
                return start
            case "current":
                return current.detach()
            case "behaviour":
                return behaviour
        staleness = np.maximum(VERSION - versions, 1)
        return behaviour + torch.tensor((staleness - 1) / staleness).float() * (
            current.detach() - behaviour
        )

    def rollout_loss(self, group, rollout, advantage, start, keep):
        """Sum over the tokens of one rollout."""
        knobs, current = self.algorithm, self.logprobs(group, rollout)[0]
        behaviour = torch.from_numpy(rollout.completion.behaviour_logprobs)
        proximal = self.proximal(current, start, behaviour, rollout.completion.weight_versions)
        mismatch, drift = proximal - behaviour, current - proximal
        if knobs.objective == "gspo":
            mismatch, drift = (
                mismatch.sum().expand(len(behaviour)),
                drift.mean().expand(len(behaviour)),
            )
        weight, ratio = mismatch.exp().clamp(max=knobs.correction_cap), drift.exp()
        clipped = ratio.clamp(1 - knobs.clip_low, 1 + knobs.clip_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        if knobs.objective == "cispo":
            gain = clipped.detach() * advantage * current
        return -(weight * keep * gain).sum()
