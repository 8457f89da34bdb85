"""How far the engine's logprobs are from the learner's where both mean the same weights: what is left is kernels, precision and stale KV."""

from __future__ import annotations

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
    cap: float,
    floor: float | None,
) -> StepMetrics:
    """Over the tokens in the loss that were sampled by the learner's own version, in nats: `proximal_logprobs [N]` against the behaviour's.

    `mismatch*` are of rollouts that began under that version: d = log π_prox − log π_beh, mean and largest |d|, the k3 estimate of the KL divergence
    (mean of e^d − d − 1, as π_beh sampled), and the share of ratios e^d outside the correction's band. `kv_gap*` are of rollouts that began under
    older weights: their KV was computed anew, or (`keep_kv`) is still that of the older ones.
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
            outside = (ratios > cap) | (ratios < (floor or 0.0))
            sums["mismatch_k3"] = (float((ratios - gaps - 1.0).sum()), count)
            sums["mismatch_outside_fraction"] = (float(outside.sum()), count)
    return StepMetrics(sums, maxima)
