"""The objectives, as values per token that the loss weights, negates and sums.

A new objective is a function of `Terms` and an entry in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_async.algorithm.ratios import Sequences, bounded

if TYPE_CHECKING:  # preflight checks the options of the loss without torch
    from torch import Tensor

CORRECTION_LEVELS = ("token", "sequence", "sequence_mean")


@dataclass(frozen=True, slots=True)
class Terms:
    """The arguments of an objective. Tensors are [T]; both logarithms have gradients."""

    current: Tensor  # log π_θ
    drift: Tensor  # log π_θ/π_prox
    advantage: Tensor
    sequences: Sequences | None  # which tokens form a sequence, if the objective needs it
    clip_low: float
    clip_high: float
    dual_clip: float | None


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The value of an objective. All [T]."""

    value: Tensor  # to be maximised, with gradient
    clips: dict[str, Tensor]  # bool: the tokens that each clip acted on


@dataclass(frozen=True, slots=True)
class Objective:
    """A formula, and the options of the loss that it supports."""

    surrogate: Callable[[Terms], Surrogate]
    correction_levels: tuple[str, ...] = CORRECTION_LEVELS  # the first one is the default
    of_sequences: bool = False  # needs whole sequences
    dual_clip: bool = True


def dapo(terms: Terms) -> Surrogate:
    """min(u·A, clip(u, 1 − clip_low, 1 + clip_high)·A) of the token's ratio u = π_θ/π_prox."""
    return _clipped(bounded(terms.drift).exp(), terms)


def gspo(terms: Terms) -> Surrogate:
    """The same with sg(s)·π_θ/sg(π_θ) in place of u; s = exp(mean of log u over the sequence).

    Each token has the value s and a gradient of its own.
    """
    assert terms.sequences is not None, "gspo needs sequences; the loss checks this"
    mean = terms.sequences.mean(terms.drift.detach())
    return _clipped(bounded(terms.current - terms.current.detach() + mean).exp(), terms)


def cispo(terms: Terms) -> Surrogate:
    """sg(clip(u))·A·log π_θ.

    The clip bounds a token's weight but keeps its gradient. So the clip counts tokens of both signs
    of A.
    """
    ratio = bounded(terms.drift.detach()).exp()
    low, high = 1 - terms.clip_low, 1 + terms.clip_high
    return Surrogate(
        ratio.clamp(low, high) * terms.advantage * terms.current,
        {"clip_low": ratio < low, "clip_high": ratio > high},
    )


def _clipped(ratio: Tensor, terms: Terms) -> Surrogate:
    """min(r·A, clip(r)·A); for A < 0 at least dual_clip·A."""
    advantage, low, high = terms.advantage, 1 - terms.clip_low, 1 + terms.clip_high
    value = (ratio * advantage).minimum(ratio.clamp(low, high) * advantage)
    clips = {
        "clip_low": (advantage < 0) & (ratio < low),
        "clip_high": (advantage > 0) & (ratio > high),
    }
    if terms.dual_clip is not None:
        value = value.maximum(terms.dual_clip * advantage).where(advantage < 0, value)
        clips["dual_clip"] = (advantage < 0) & (ratio > terms.dual_clip)
    return Surrogate(value, clips)


OBJECTIVES = {
    "dapo": Objective(dapo),
    "gspo": Objective(gspo, correction_levels=("sequence", "sequence_mean"), of_sequences=True),
    "cispo": Objective(cispo, dual_clip=False),
}
