"""Divides the sums of a step once, at the end (token-mean exactness).

In: the sums of `diagnostics` over all microbatches and ranks. Out: the metrics of the step. The
driver calls it, so it must not import torch.
"""

from __future__ import annotations

from dapo_async.types import StepMetrics


def summarise(metrics: StepMetrics) -> dict[str, float]:
    """`metrics.flat()` and the effective sample sizes, which need the complete sums.

    ESS = 1 / mean((x / mean x)²) = (mean x)² / mean x², in (0, 1]: `behaviour_ess` of the raw token
    ratio ρ, `behaviour_weight_ess` of the applied weight w. An ESS of 0 / 0 is left out.
    """
    flat = metrics.flat()
    second_moments = {
        "behaviour_ess": ("behaviour_ratio", flat.get("behaviour_chi2", -1.0) + 1.0),
        "behaviour_weight_ess": ("behaviour_weight", flat.get("behaviour_weight_squared", 0.0)),
    }
    return flat | {
        name: flat[mean] ** 2 / square
        for name, (mean, square) in second_moments.items()
        if square > 0
    }
