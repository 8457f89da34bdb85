"""Evaluation of a model with any engine, without Ray. Input: prompts. Output: accuracies.

greedy     held-out accuracy of a run: one response per prompt
estimates  avg@k, pass@k and maj@k with bootstrap intervals
sampled    k responses per prompt through one or several engines
record     the finished problems of an evaluation on disk, and its result
engines    the torch engine or SGLang servers for an evaluation without a run
command    `dapo-async eval`

The package exports only `greedy`, because a run needs nothing else.
"""

from dapo_async.evaluate.greedy import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
