"""The mathematics of training in pure torch: advantages, the loss, and its diagnostics.

Input: shaped rewards and three kinds of logprobs, as packed `[T]` tensors. Output: a loss,
and sums for its metrics. Only the learner calls it. In the order of a step:

    group_advantages       rewards of a group -> one advantage per rollout
    proximal_from          π_prox by the chosen mode: an extra forward pass, the current policy,
                           A-3PO's interpolation, or the behaviour policy
    second_moment_mask     M2PO: the tokens to keep, once per step, before the first minibatch
    sequence_mean_weights  GRPO's mean over responses, as one weight per token
    microbatch_loss        LossInputs, LossOptions -> the corrected, clipped loss and its sums
    policy_loss            the same with plain arguments, for use from outside
    step_metrics           those sums as StepMetrics, which add up over microbatches and ranks;
                           sums_and_counts: the same of numbers on the host
    summarise              the sums divided once, at the end

Nothing here depends on configs, processes or devices.
"""

from typing import TYPE_CHECKING

from dapo_async.algorithm.objectives import CORRECTION_LEVELS, OBJECTIVES
from dapo_async.algorithm.options import CORRECTIONS, LossInputs, LossOptions
from dapo_async.algorithm.summary import summarise
from dapo_async.utils.lazy import lazy_names

if TYPE_CHECKING:  # these modules import torch
    from dapo_async.algorithm.advantages import group_advantages
    from dapo_async.algorithm.corrections import second_moment_mask
    from dapo_async.algorithm.diagnostics import step_metrics, sums_and_counts
    from dapo_async.algorithm.loss import microbatch_loss, policy_loss, sequence_mean_weights
    from dapo_async.algorithm.proximal import PROXIMAL_MODES, proximal_from
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "advantages": ("group_advantages",),
            "corrections": ("second_moment_mask",),
            "diagnostics": ("step_metrics", "sums_and_counts"),
            "loss": ("microbatch_loss", "policy_loss", "sequence_mean_weights"),
            "proximal": ("PROXIMAL_MODES", "proximal_from"),
        },
    )

__all__ = [
    "CORRECTIONS",
    "CORRECTION_LEVELS",
    "OBJECTIVES",
    "PROXIMAL_MODES",
    "LossInputs",
    "LossOptions",
    "group_advantages",
    "microbatch_loss",
    "policy_loss",
    "proximal_from",
    "second_moment_mask",
    "sequence_mean_weights",
    "step_metrics",
    "summarise",
    "sums_and_counts",
]
