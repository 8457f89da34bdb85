"""The proximal policy π_prox.

The learner calls `proximal_from` for every microbatch and passes the result to the loss.
"""

from __future__ import annotations

from torch import Tensor

from dapo_async.algorithm.options import check_name

PROXIMAL_MODES = ("recompute", "current", "interpolate", "behaviour")


def proximal_from(
    mode: str,
    *,
    current_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    recomputed_logprobs: Tensor | None = None,
    learner_version: int | None = None,
    behaviour_versions: Tensor | None = None,
) -> Tensor:
    """log π_prox [T], without gradient.

    recompute    `recomputed_logprobs`: of the weights before the first update of the step
    current      log π_θ: exact if the step has one minibatch; the clip never acts
    interpolate  A-3PO (2512.06547): log μ + α (log π_θ − log μ) with
                 α = clamp((v_θ − 1 − v_μ) / (v_θ − v_μ), 0, 1), v_θ = `learner_version` and
                 v_μ = `behaviour_versions` [T]; α = 0 where v_μ ≥ v_θ, because the proximal policy
                 itself has sampled these tokens
    behaviour    log μ: the coupled ratio π_θ/μ of plain PPO, whose behaviour weight is 1

    All tensors [T]. Raises ValueError on an unknown mode or a missing input.
    """
    check_name("proximal", mode, PROXIMAL_MODES)
    current, behaviour = current_logprobs.detach(), behaviour_logprobs.detach()
    if mode == "current":
        return current
    if mode == "behaviour":
        return behaviour
    if mode == "recompute":
        if recomputed_logprobs is None:
            raise ValueError(
                "proximal recompute needs recomputed_logprobs; give the learner's logprobs from "
                "before the first minibatch"
            )
        return recomputed_logprobs.detach()
    if learner_version is None or behaviour_versions is None:
        raise ValueError(
            "proximal interpolate needs learner_version and behaviour_versions; "
            "give the weight version of every token"
        )
    staleness = learner_version - behaviour_versions.to(current.dtype)
    # A staleness of 0 (or less, where masked) gives −1/1, hence 0 after the clamp.
    share = ((staleness - 1) / staleness.clamp(min=1)).clamp(0, 1)
    return behaviour + share * (current - behaviour)
