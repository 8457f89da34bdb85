"""The surrogate of each objective, per token: what `policy_loss` weighs, negates and sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_async.algorithm.ratios import Sequences, bounded


@dataclass(frozen=True, slots=True)
class Surrogate:
    """To be maximised, with gradient; and which tokens each clip acted on (bool). All [T]."""

    value: Tensor
    clips: dict[str, Tensor]


def surrogate(
    objective: str,
    *,
    current: Tensor,
    drift: Tensor,
    advantage: Tensor,
    sequences: Sequences | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Surrogate:
    """The objective's surrogate from current = log π_θ and drift = log π_θ/π_prox, both with gradient; `sequences` for gspo."""
    if objective == "cispo":
        return cispo_surrogate(current, drift=drift, advantage=advantage, clip_low=clip_low, clip_high=clip_high)
    if objective == "gspo":
        assert sequences is not None, "gspo needs sequences; policy_loss checks this"
        ratio = sequence_ratio(current, drift=drift, sequences=sequences)
    else:
        ratio = bounded(drift).exp()
    return clipped_surrogate(ratio, advantage=advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def clipped_surrogate(ratio: Tensor, *, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None) -> Surrogate:
    """min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A), and for A < 0 at least dual_clip·A."""
    value = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    clips = {
        "clip_low": (advantage < 0) & (ratio < 1 - clip_low),
        "clip_high": (advantage > 0) & (ratio > 1 + clip_high),
    }
    if dual_clip is not None:
        value = torch.where(advantage < 0, torch.maximum(value, dual_clip * advantage), value)
        clips["dual_clip"] = (advantage < 0) & (ratio > dual_clip)
    return Surrogate(value, clips)


def sequence_ratio(current: Tensor, *, drift: Tensor, sequences: Sequences) -> Tensor:
    """GSPO's token form sg(s)·π_θ/sg(π_θ) with s = exp(mean of `drift` over the sequence): each token has the value s and a gradient of its own."""
    return bounded(current - current.detach() + sequences.mean(drift.detach())).exp()


def cispo_surrogate(current: Tensor, *, drift: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """sg(clip(u))·A·log π_θ, `drift` = log u: the clip bounds a token's weight but never silences it, so it counts whatever the sign of A."""
    ratio = bounded(drift.detach()).exp()
    value = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage * current
    return Surrogate(value, {"clip_low": ratio < 1 - clip_low, "clip_high": ratio > 1 + clip_high})
