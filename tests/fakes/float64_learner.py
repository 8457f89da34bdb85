"""The learner's step once more, in float64 and by plain loops, for tests.

It shares no code with the decoder, the loss, the gradients or the optimizer: only the sizes of a
`ModelConfig` and the names of the weights. One sequence at a time, one head at a time, one expert
at a time; AdamW from its formula. The objective is the default one (dapo, proximal recompute,
truncated behaviour weights), with the mean over tokens or responses, overlong filtering and a KL
term (k3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dapo_async.config import AlgorithmConfig
from dapo_async.model import ModelConfig
from dapo_async.types import FinishReason, Group, Rollout

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Weights = dict[str, Tensor]


def normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * scale


def rotated(x: Tensor, theta: float) -> Tensor:
    """`x [T, d]` at the positions 0 … T − 1."""
    half = x.shape[1] // 2
    angles = torch.tensor(
        [
            [place * theta ** (-2 * pair / x.shape[1]) for pair in range(half)]
            for place in range(len(x))
        ],
        dtype=torch.float64,
    )
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        dim=1,
    )


def attention(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    def project(kind: str, head: int) -> Tensor:
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        y = x @ weights[f"{name}.{kind}_proj.weight"][rows].T
        if config.qkv_bias:
            y = y + weights[f"{name}.{kind}_proj.bias"][rows]
        if config.qk_norm and kind != "v":
            y = normed(y, weights[f"{name}.{kind}_norm.weight"], config.rms_norm_eps)
        return y if kind == "v" else rotated(y, config.rope.theta)

    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    heads = []
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        query, key, value = project("q", head), project("k", shared), project("v", shared)
        scores = (query @ key.T / math.sqrt(config.head_dim)).masked_fill(future, -math.inf)
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ value)
    return torch.cat(heads, dim=1) @ weights[f"{name}.o_proj.weight"].T


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = x @ gate.T
    return (gated / (1 + (-gated).exp()) * (x @ up.T)) @ down.T


def experts(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    scores = (x @ weights[f"{name}.gate.weight"].T).exp()
    shares = scores / scores.sum(-1, keepdim=True)
    inner, rows = config.expert_size, []
    gate_up, down = (
        weights[f"{name}.experts.gate_up_proj"],
        weights[f"{name}.experts.down_proj"],
    )
    for token in range(len(x)):
        order = sorted(
            range(config.num_experts), key=lambda each: -float(shares[token, each].detach())
        )
        chosen = order[: config.experts_per_token]
        total = sum(shares[token, each] for each in chosen) if config.norm_topk else 1.0
        outputs = []
        for each in chosen:
            own = gate_up[2 * inner * each : 2 * inner * (each + 1)]
            out = down[config.hidden_size * each : config.hidden_size * (each + 1)]
            outputs.append(
                shares[token, each] / total * swiglu(x[token], own[:inner], own[inner:], out)
            )
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows)


def logprobs(
    config: ModelConfig, weights: Weights, group: Group, rollout: Rollout
) -> tuple[Tensor, Tensor]:
    """Of each response token at the group's temperature, and the entropies."""
    ids = [int(each) for each in (*group.prompt.token_ids, *rollout.completion.token_ids)]
    x = torch.stack([weights["model.embed_tokens.weight"][each] for each in ids])
    for layer in range(config.num_layers):
        name, eps = f"model.layers.{layer}", config.rms_norm_eps
        before = normed(x, weights[f"{name}.input_layernorm.weight"], eps)
        x = x + attention(config, weights, f"{name}.self_attn", before)
        before = normed(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
        if layer in config.mixture_layers:
            x = x + experts(config, weights, f"{name}.mlp", before)
        else:
            parts = (weights[f"{name}.mlp.{each}_proj.weight"] for each in ("gate", "up", "down"))
            x = x + swiglu(before, *parts)
    x = normed(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    logits = x @ weights[head].T / group.temperature
    table = logits - logits.exp().sum(-1, keepdim=True).log()
    first = len(group.prompt.token_ids)
    chosen = torch.stack([table[place - 1, ids[place]] for place in range(first, len(ids))])
    entropies = -(table.exp() * table).sum(-1)[first - 1 : len(ids) - 1]
    return chosen, entropies


def advantages(group: Group) -> list[float]:
    rewards = [rollout.reward for rollout in group.rollouts]
    mean = sum(rewards) / len(rewards)
    variance = sum((each - mean) ** 2 for each in rewards) / (len(rewards) - 1)
    return [(each - mean) / (math.sqrt(variance) + 1e-6) for each in rewards]


@dataclass
class Float64Learner:
    """Weights, moments and the step."""

    config: ModelConfig
    weights: Weights
    algorithm: AlgorithmConfig
    lr: float
    weight_decay: float
    grad_clip: float
    num_minibatches: int = 1
    reference: Weights = field(init=False)  # of the KL term: the weights at the start
    moments: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    num_updates: int = 0

    def __post_init__(self) -> None:
        self.weights = {name: each.detach().double() for name, each in self.weights.items()}
        self.reference = {name: each.clone() for name, each in self.weights.items()}
        self.moments = {
            name: (torch.zeros_like(each), torch.zeros_like(each))
            for name, each in self.weights.items()
        }

    def step(self, groups: Sequence[Group]) -> dict[str, float]:
        """Trains on the minibatches; returns loss, gradient norm and entropy as a step has them."""
        start = {
            (group.group_id, number): logprobs(self.config, self.weights, group, rollout)[0]
            for group in groups
            for number, rollout in enumerate(group.rollouts)
        }
        size = len(groups) // self.num_minibatches
        loss, norms, entropy, num_tokens = 0.0, 0.0, 0.0, 0
        for first in range(0, len(groups), size):
            of_one = self._minibatch(groups[first : first + size], start)
            loss, norms = loss + of_one[0], norms + of_one[1] / self.num_minibatches
            entropy, num_tokens = entropy + of_one[2], num_tokens + of_one[3]
        return {"loss": loss / num_tokens, "grad_norm": norms, "entropy": entropy / num_tokens}

    def _minibatch(
        self, groups: Sequence[Group], start: Mapping[tuple[int, int], Tensor]
    ) -> tuple[float, float, float, int]:
        """One update. Returns sums over its tokens: loss without the KL term, and entropy."""
        weights = {name: each.clone().requires_grad_() for name, each in self.weights.items()}
        live = [
            (group, number, rollout, advantage)
            for group in groups
            for number, (rollout, advantage) in enumerate(
                zip(group.rollouts, advantages(group), strict=True)
            )
            if not (
                self.algorithm.overlong_filtering
                and rollout.completion.finish_reason is FinishReason.LENGTH
            )
        ]
        count = sum(rollout.num_tokens for _, _, rollout, _ in live)
        objective, total, entropy = torch.zeros((), dtype=torch.float64), 0.0, 0.0
        for group, number, rollout, advantage in live:
            current, entropies = logprobs(self.config, weights, group, rollout)
            loss = self._token_losses(current, start[group.group_id, number], rollout, advantage)
            share = 1.0
            if self.algorithm.loss_mean == "sequence":
                share = count / len(live) / rollout.num_tokens
            extra = torch.zeros_like(loss)
            if self.algorithm.kl_coef:
                frozen = logprobs(self.config, self.reference, group, rollout)[0]
                gap = current - frozen
                extra = self.algorithm.kl_coef * ((-gap).exp() - 1 + gap)
            objective = objective + share * (loss + extra).sum() / max(1, count)
            total += share * float(loss.detach().sum())
            entropy += float(entropies.detach().sum())
        if live:
            objective.backward()
        gradients = {
            name: torch.zeros_like(each) if each.grad is None else each.grad
            for name, each in weights.items()
        }
        return total, self._update(gradients), entropy, count

    def _token_losses(
        self, current: Tensor, proximal: Tensor, rollout: Rollout, advantage: float
    ) -> Tensor:
        low, high = 1 - self.algorithm.clip_low, 1 + self.algorithm.clip_high
        floor, cap = self.algorithm.correction_band
        losses = []
        for place, behaviour in enumerate(rollout.completion.behaviour_logprobs):
            weight = math.exp(float(proximal[place]) - float(behaviour))
            weight = min(max(weight, floor or 0.0), math.inf if cap is None else cap)
            ratio = (current[place] - proximal[place]).exp()
            clipped = ratio.clamp(low, high)
            losses.append(-weight * torch.minimum(ratio * advantage, clipped * advantage))
        return torch.stack(losses)

    def _update(self, gradients: Weights) -> float:
        """Clipping and AdamW; returns the norm before."""
        self.num_updates += 1
        norm = math.sqrt(sum(float((each * each).sum()) for each in gradients.values()))
        scale = min(1.0, self.grad_clip / (norm + 1e-6))
        for name, gradient in gradients.items():
            clipped, (mean, square) = gradient * scale, self.moments[name]
            mean = BETA1 * mean + (1 - BETA1) * clipped
            square = BETA2 * square + (1 - BETA2) * clipped * clipped
            self.moments[name] = mean, square
            decay = self.weight_decay if gradient.ndim >= 2 else 0.0
            change = (mean / (1 - BETA1**self.num_updates)) / (
                (square / (1 - BETA2**self.num_updates)).sqrt() + EPS
            )
            before = self.weights[name]
            self.weights[name] = before - self.lr * decay * before - self.lr * change
        return norm
