"""The learner (L2): whole groups come in, updated weights and the sums and counts of one step leave. Driven by the learner actor in `runtime/`.

batching   groups -> advantages -> rows -> minibatches of equal row counts -> packed microbatches
optimizer  AdamW, warm-up, gradient clipping
rank       one rank's step: proximal logprobs, the loss of each microbatch, one update per minibatch
gradients  summed over data-parallel ranks, clipped over all shards
state      what a checkpoint keeps: whole tensors, for any number of ranks
"""

from dapo_async.learner.rank import LearnerRank

__all__ = ["LearnerRank"]
