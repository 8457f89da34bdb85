"""What the loss did, as sums that add up over microbatches and ranks.

`microbatch_loss` fills one dict per microbatch. The learner turns each into a StepMetrics and adds
them. `summary` divides them once, at the end (token-mean exactness). The key says how an entry adds
up:

    num_tokens   the unmasked tokens, the count that everything else is divided by
    X_tokens     how many of them a rule touched   ->  X_fraction
    X_sum        a sum over them                   ->  X, the mean
    X_max        a maximum over them               ->  X_max

Rules: clip_low, clip_high, dual_clip (the clips of the objective); weight_truncated, weight_floored
(correction truncate); weight_rejected (correction mask); sequence_rejected (`sequence_band`);
dropped (`keep`).

Values, with ρ = π_prox/π_beh and u = π_θ/π_prox per token: behaviour_kl_k1 = −log ρ,
behaviour_kl_k3 = ρ − 1 − log ρ, behaviour_chi2 = ρ² − 1, behaviour_ratio = ρ; current_kl_k1 and
current_kl_k3 are the same of u; behaviour_weight is w after the correction; loss is the loss of the
token; reference_kl, with a KL term only, is its estimate (`ratios.kl_estimate`). Estimators k1 and
k3: Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dapo_async.algorithm.corrections import BehaviourWeight
from dapo_async.algorithm.ratios import bounded
from dapo_async.types import StepMetrics


@torch.no_grad()
def loss_diagnostics(
    token_loss: Tensor,
    *,
    drift: Tensor,
    mismatch: Tensor,
    corrected: BehaviourWeight,
    correction: str,
    clips: Mapping[str, Tensor],
    live: Tensor,
    kept: Tensor,
    rejected: Tensor,
) -> dict[str, Tensor]:
    """Sums over the unmasked tokens of one microbatch, in two reductions for all of them.

    drift = log π_θ/π_prox, mismatch = log π_prox/π_beh; `clips` are the bool masks of the
    objective's rules. Every tensor is [T] and finite where masked.
    """
    zero = torch.zeros_like(live)
    truncates, masks = correction == "truncate", correction == "mask"
    rules = ("clip_low", "clip_high", "dual_clip")
    weight, log_rho, log_u = corrected.weight, bounded(mismatch), bounded(drift)
    rho, u = log_rho.exp(), log_u.exp()
    summed = {
        "num_tokens": live,
        **{f"{rule}_tokens": clips.get(rule, zero) for rule in rules},
        "weight_truncated_tokens": corrected.above_cap if truncates else zero,
        "weight_floored_tokens": corrected.below_floor if truncates else zero,
        "weight_rejected_tokens": corrected.above_cap | corrected.below_floor if masks else zero,
        "sequence_rejected_tokens": rejected,
        "dropped_tokens": ~kept,
        "loss_sum": token_loss,
        "behaviour_kl_k1_sum": -log_rho,
        "behaviour_kl_k3_sum": rho - 1 - log_rho,
        "behaviour_chi2_sum": rho.square() - 1,
        "behaviour_ratio_sum": rho,
        "behaviour_weight_sum": weight,
        "behaviour_weight_squared_sum": weight.square(),
        "current_kl_k1_sum": -log_u,
        "current_kl_k3_sum": u - 1 - log_u,
    }
    largest = {
        "behaviour_weight_max": weight,
        "behaviour_log_ratio_max": mismatch.abs(),
        "current_log_ratio_max": drift.abs(),
    }
    unmasked = live.to(weight.dtype)
    sums = (torch.stack([row.to(weight.dtype) for row in summed.values()]) * unmasked).sum(1)
    # Padded by one 0, so that the maximum over no token is 0.
    maxima = torch.nn.functional.pad(torch.stack([*largest.values()]) * unmasked, (0, 1)).amax(1)
    return dict(zip([*summed, *largest], [*sums.unbind(), *maxima.unbind()], strict=True))


def step_metrics(diagnostics: Mapping[str, Tensor]) -> StepMetrics:
    """The diagnostics of one microbatch as sums and counts, in one transfer from the device."""
    values = torch.stack([*diagnostics.values()]).tolist()
    return sums_and_counts(dict(zip(diagnostics, values, strict=True)))


def sums_and_counts(diagnostics: Mapping[str, float]) -> StepMetrics:
    """`step_metrics` of numbers that were transferred already; their keys say how they add up."""
    num_tokens = diagnostics["num_tokens"]
    sums, maxima = {}, {}
    for name, value in diagnostics.items():
        if name == "num_tokens":
            continue
        if name.endswith("_max"):
            maxima[name] = value
        elif name.endswith("_tokens"):
            sums[name.removesuffix("_tokens") + "_fraction"] = (value, num_tokens)
        else:
            sums[name.removesuffix("_sum")] = (value, num_tokens)
    return StepMetrics(sums=sums, maxima=maxima, totals={"loss_tokens": num_tokens})
