"""The learner (L2): whole groups come in, updated weights and the sums and counts of one step leave. Driven by the learner actor in `runtime/`.

batching   groups -> advantages -> rows -> minibatches of equal row counts -> packed microbatches
optimizer  AdamW, warm-up, gradient clipping
rank       one rank's step: proximal logprobs, the loss of each microbatch, one update per minibatch
gradients  summed over data-parallel ranks, clipped over all shards
mismatch   how far the engine's logprobs are from the learner's where both mean the same weights
state      what a checkpoint keeps: whole tensors, for any number of ranks
profiling  a profiler's trace of a step
"""

from dapo_async.learner.profiling import profiled
from dapo_async.learner.rank import LearnerRank

__all__ = ["LearnerRank", "profiled"]
