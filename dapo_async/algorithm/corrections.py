"""Corrections for tokens that another policy has sampled: behaviour weights and M2PO's mask.

The loss calls `behaviour_weight` once per microbatch; the learner calls `second_moment_mask` once
per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_async.algorithm.ratios import Sequences, bounded


@dataclass(frozen=True, slots=True)
class BehaviourWeight:
    """The corrected π_prox/π_beh of every token. All [T], no gradient."""

    weight: Tensor
    above_cap: Tensor  # bool: the ratio was above the cap
    below_floor: Tensor  # bool: the ratio was below the floor


def behaviour_weight(
    log_ratio: Tensor,
    *,
    correction: str,
    level: str,
    cap: float | None,
    floor: float | None,
    sequences: Sequences | None = None,
) -> BehaviourWeight:
    """The weight w of each token, from log_ratio = log π_prox − log π_beh [T].

    log_ratio is 0 where masked and has no gradient.

    ratio, by level:  token          π_prox/π_beh of the token
                      sequence       the product of its sequence's token ratios
                      sequence_mean  their geometric mean, exp(mean log-ratio)
    w, by correction: truncate       clamp(ratio, floor, cap): no token is lost (truncated
                                     importance sampling)
                      mask           ratio where floor ≤ ratio ≤ cap, else 0 (IcePop, 2510.18855)
                      none           1

    Cap and floor bound the ratio itself, never its logarithm or its inverse; None is no bound.
    Without both, w is the plain importance weight. A nan ratio stays nan and is not dropped.
    """
    if correction == "none":
        untouched = torch.zeros_like(log_ratio, dtype=torch.bool)
        return BehaviourWeight(torch.ones_like(log_ratio), untouched, untouched)
    if level != "token":
        assert sequences is not None, "sequence levels need sequences; the loss checks this"
        log_ratio = sequences.sum(log_ratio) if level == "sequence" else sequences.mean(log_ratio)
    ratio = bounded(log_ratio).exp()
    lowest, highest = 0.0 if floor is None else floor, math.inf if cap is None else cap
    above_cap, below_floor = ratio > highest, ratio < lowest
    if correction == "truncate":
        weight = ratio.clamp(lowest, highest)
    else:
        weight = ratio.masked_fill(above_cap | below_floor, 0.0)
    return BehaviourWeight(weight, above_cap, below_floor)


def outside_sequence_band(
    log_ratio: Tensor, sequences: Sequences, band: tuple[float | None, float | None]
) -> Tensor:
    """Which tokens [T] belong to a sequence that is rejected as a whole, bool.

    That is so if the geometric mean of its token ratios π_prox/π_beh, exp(mean log-ratio), is
    outside `band` (floor, cap; None is no edge). Source: geometric rejection, verl. `log_ratio` [T]
    is 0 where masked. A nan ratio is not rejected, so that a broken logprob shows.
    """
    floor, cap = band
    ratio = bounded(sequences.mean(log_ratio)).exp()
    return (ratio > (math.inf if cap is None else cap)) | (ratio < (floor or 0.0))


def second_moment_mask(
    proximal_logprobs: Tensor,
    *,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    threshold: float = 0.04,
) -> Tensor:
    """M2PO (2510.01161): keeps tokens so that the second moment of the log-ratio stays in bounds.

    With ρ = π_prox/π_beh, the candidates are the tokens that have already moved in the direction of
    their advantage: (A > 0, ρ > 1) or (A < 0, ρ < 1). Of these the largest (log ρ)² are dropped
    until the mean of the others is at most `threshold`. All other tokens are kept.

    All [T]. Returns keep [T] bool for `LossInputs.keep`; dropped tokens still count in the loss's
    denominator. The cut is by value: equal squares at the cut are dropped together, so the result
    does not depend on the packing. It depends on every token given: call it once per step, before
    the first minibatch, on the tokens of all ranks (token-mean exactness). Raises ValueError on a
    threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the second-moment threshold ({threshold}) must be positive; set 0.04")
    log_ratio = proximal_logprobs.detach() - behaviour_logprobs.detach()
    candidate = mask.bool() & (log_ratio * advantages > 0)
    squares = log_ratio.double().square().masked_fill(~candidate, math.inf)
    ordered = squares.sort().values
    # The mean of the smallest k grows with k. So the number of means within the threshold is the
    # number of candidates to keep.
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    num_kept = (means <= threshold).sum()
    padded = torch.nn.functional.pad(ordered, (0, 1), value=math.inf)
    smallest_dropped = padded.index_select(0, num_kept.reshape(1))
    return ~candidate | (squares < smallest_dropped)
