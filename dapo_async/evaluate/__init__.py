"""Evaluation of a model with any engine, without Ray. Input: prompts. Output: accuracies.

held_out   held-out accuracy of a run: k responses per prompt
estimates  avg@k, pass@k and maj@k with bootstrap intervals
sampled    k responses per prompt through one or several engines
record     the finished problems of an evaluation on disk, and its result
engines    the torch engine or SGLang servers for an evaluation without a run
command    `dapo-async eval`

The package exports only `held_out`, because a run needs nothing else.
"""

from dapo_async.evaluate.held_out import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
