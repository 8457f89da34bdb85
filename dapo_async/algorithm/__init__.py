"""The mathematics of training, in pure torch: shaped rewards and three kinds of logprobs come in, a loss and its diagnostics leave.

The learner calls this room and nothing else does. In the order of a step:

    group_advantages       rewards of a group  ->  one advantage per rollout
    proximal_from          how π_prox is had: a forward pass, the current policy, A-3PO's interpolation, or the behaviour policy
    second_moment_mask     M2PO: which tokens to keep, once per step, before the first minibatch
    sequence_mean_weights  GRPO's mean over responses instead of tokens, as one weight per token
    policy_loss            per microbatch: the corrected, clipped loss and what it did, as sums
    step_metrics           those sums as the currency that adds across microbatches and ranks
    summarise              divided once, at the end

Nothing here knows configs, processes or devices; every function takes packed `[T]` tensors and floats.
"""

from dapo_async.algorithm.advantages import group_advantages
from dapo_async.algorithm.corrections import second_moment_mask
from dapo_async.algorithm.diagnostics import step_metrics, summarise
from dapo_async.algorithm.loss import policy_loss, sequence_mean_weights
from dapo_async.algorithm.objectives import CORRECTION_LEVELS, OBJECTIVES
from dapo_async.algorithm.options import CORRECTIONS, check_loss_options
from dapo_async.algorithm.proximal import PROXIMAL_MODES, proximal_from

__all__ = [
    "CORRECTIONS",
    "CORRECTION_LEVELS",
    "OBJECTIVES",
    "PROXIMAL_MODES",
    "check_loss_options",
    "group_advantages",
    "policy_loss",
    "proximal_from",
    "second_moment_mask",
    "sequence_mean_weights",
    "step_metrics",
    "summarise",
]
