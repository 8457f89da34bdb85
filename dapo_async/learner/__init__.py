"""The learner (L2): whole groups come in, updated weights and the sums and counts of one step leave. Driven by the learner actor in `runtime/`.

batching   groups -> advantages -> rows -> minibatches of equal row counts -> packed microbatches
optimizer  AdamW on this rank's parts of the parameters, warm-up
rank       one rank's step: proximal logprobs, the loss of each microbatch, one update per minibatch
gradients  summed over the ranks, clipped over all parts
mismatch   how far the engine's logprobs are from the learner's where both mean the same weights
state      what a checkpoint keeps: each rank its parts, for any number of ranks to go on from
memory     what a rank will hold, by part, before it is started
profiling  a profiler's trace of a step
"""

from dapo_async.learner.memory import Memory, predict_memory
from dapo_async.learner.profiling import profiled
from dapo_async.learner.rank import LearnerRank
from dapo_async.learner.state import FrozenState, read_state, read_weights, save_state

__all__ = [
    "FrozenState",
    "LearnerRank",
    "Memory",
    "predict_memory",
    "profiled",
    "read_state",
    "read_weights",
    "save_state",
]
