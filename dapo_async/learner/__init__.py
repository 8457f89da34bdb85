"""The learner: trains on whole groups and returns the sums and counts of each step.

The learner actor in `runtime/` drives it.

    batch_plan deals the rollouts of a minibatch to ranks and passes
    batching   groups -> advantages -> training sequences -> packed microbatches
    rank       one rank's step: proximal logprobs, losses, one update per minibatch
    options    the options of the loss, from the config
    memory_choice
               what `auto` means: recomputation, ZeRO stage, tokens of a pass
    kept_weights
               copies of weights for other policies: the start of the step, the reference
    optimizer  AdamW on this rank's parts of the parameters, warm-up
    gradients  summed over the ranks, clipped by their global norm
    metrics    all metrics except those of the loss
    mismatch   how far the engine's logprobs are from the learner's for the same weights
    state      the learner's part of a checkpoint, which any number of ranks can read; its tensors
               are `parts`, its files are read and written by `state_files`
    profiling  a profiler's trace of a step
    rerun      the learner alone on the recorded batches of a run
"""

from typing import TYPE_CHECKING

from dapo_async.learner.options import (
    loss_options,
    needs_reference,
    needs_start_logprobs,
)
from dapo_async.utils.lazy import lazy_names

if TYPE_CHECKING:  # these modules import torch
    from dapo_async.learner.profiling import profiled
    from dapo_async.learner.rank import LearnerRank
    from dapo_async.learner.state import (
        RankState,
        check_state,
        read_whole_state,
        read_whole_weights,
        save_state,
    )
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "profiling": ("profiled",),
            "rank": ("LearnerRank",),
            "state": (
                "RankState",
                "check_state",
                "read_whole_state",
                "read_whole_weights",
                "save_state",
            ),
        },
    )

__all__ = [
    "LearnerRank",
    "RankState",
    "check_state",
    "loss_options",
    "needs_reference",
    "needs_start_logprobs",
    "profiled",
    "read_whole_state",
    "read_whole_weights",
    "save_state",
]
