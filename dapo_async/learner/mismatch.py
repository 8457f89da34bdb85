"""How far the engine's logprobs are from the learner's for the same weights.

What differs are kernels, precision and stale KV. The learner rank calls it for every microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dapo_async.learner.batching import Microbatch
from dapo_async.types import StepMetrics

KINDS = ("mismatch", "kv_gap")


@torch.no_grad()
def mismatch_sums(
    batch: Microbatch,
    proximal_logprobs: Tensor,
    *,
    learner_version: int,
    cap: float | None,
    floor: float | None,
) -> dict[str, Tensor]:
    """Compares `proximal_logprobs [N]` with the behaviour logprobs, in nats.

    Only tokens in the loss count that the learner's own version has sampled.

    `mismatch*` cover rollouts that began under this version, with d = log π_prox − log π_beh: the
    sum and the largest |d|, the k3 estimate of the KL divergence (e^d − d − 1, as π_beh sampled),
    and the number of ratios e^d outside the correction's band. `kv_gap*` cover rollouts that began
    under older weights: their KV was computed anew, or (`keep_kv`) is still the old one.
    """
    fresh = batch.mask & (batch.behaviour_versions == learner_version)
    began_fresh = batch.prefill_versions == learner_version
    gaps = (proximal_logprobs - batch.behaviour_logprobs).double()
    sums: dict[str, Tensor] = {}
    for kind, chosen in zip(KINDS, (fresh & began_fresh, fresh & ~began_fresh), strict=True):
        sizes = gaps.abs().masked_fill(~chosen, 0.0)
        sums |= {
            f"{kind}_count": chosen.sum(),
            f"{kind}_sum": sizes.sum(),
            f"{kind}_max": sizes.max(),
        }
    gaps = gaps.masked_fill(~(fresh & began_fresh), 0.0)
    ratios, highest = gaps.exp(), math.inf if cap is None else cap
    outside = ((ratios > highest) | (ratios < (floor or 0.0))) & fresh & began_fresh
    return sums | {"mismatch_k3": (ratios - gaps - 1.0).sum(), "mismatch_outside": outside.sum()}


def mismatch_metrics(sums: Mapping[str, float]) -> StepMetrics:
    """`mismatch_sums` of one microbatch as sums and counts. A kind without a token is left out."""
    means: dict[str, tuple[float, float]] = {}
    maxima: dict[str, float] = {}
    for kind in KINDS:
        count = sums[f"{kind}_count"]
        if count:
            means[kind] = (sums[f"{kind}_sum"], count)
            maxima[f"{kind}_max"] = sums[f"{kind}_max"]
    if count := sums["mismatch_count"]:
        means["mismatch_k3"] = (sums["mismatch_k3"], count)
        means["mismatch_outside_fraction"] = (sums["mismatch_outside"], count)
    return StepMetrics(means, maxima)
