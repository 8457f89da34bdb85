"""How far the engine's logprobs are from the learner's for the same weights.

What differs are kernels, precision and stale KV. The learner rank calls it for every microbatch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dapo_async.learner.batching import Microbatch
from dapo_async.types import StepMetrics


@torch.no_grad()
def mismatch_metrics(
    batch: Microbatch,
    proximal_logprobs: Tensor,
    *,
    learner_version: int,
    cap: float | None,
    floor: float | None,
) -> StepMetrics:
    """Compares `proximal_logprobs [N]` with the behaviour logprobs, in nats.

    Only tokens in the loss count that the learner's own version has sampled.

    `mismatch*` cover rollouts that began under this version, with d = log π_prox − log π_beh: the
    mean and largest |d|, the k3 estimate of the KL divergence (mean of e^d − d − 1, as π_beh
    sampled), and the share of ratios e^d outside the correction's band. `kv_gap*` cover rollouts
    that began under older weights: their KV was computed anew, or (`keep_kv`) is still the old one.
    """
    fresh = batch.mask & (batch.behaviour_versions == learner_version)
    began_fresh = batch.prefill_versions == learner_version
    sums: dict[str, tuple[float, float]] = {}
    maxima: dict[str, float] = {}
    for name, chosen in (("mismatch", fresh & began_fresh), ("kv_gap", fresh & ~began_fresh)):
        gaps = (proximal_logprobs - batch.behaviour_logprobs)[chosen].double()
        count = float(len(gaps))
        if not count:
            continue
        ratios = gaps.exp()
        sums[name] = (float(gaps.abs().sum()), count)
        maxima[f"{name}_max"] = float(gaps.abs().max())
        if name == "mismatch":
            highest = math.inf if cap is None else cap
            outside = (ratios > highest) | (ratios < (floor or 0.0))
            sums["mismatch_k3"] = (float((ratios - gaps - 1.0).sum()), count)
            sums["mismatch_outside_fraction"] = (float(outside.sum()), count)
    return StepMetrics(sums, maxima)
