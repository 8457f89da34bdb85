"""Evaluation of a model through any engine (L3): prompts in, accuracies out. Nothing here needs Ray.

greedy     held-out accuracy of a run: one response per prompt; called by the engines' hosts
estimates  avg@k, pass@k, maj@k of many responses per prompt, with bootstrap intervals
sampled    k responses per prompt through one or several engines, judged as they come
record     which problems are done: a file that a later try goes on with, and the result
engines    the torch engine, or SGLang servers, for an evaluation alone
command    `dapo-async eval`: all of it, from a config to a JSON file

The door knows `greedy` alone, which is what a run needs.
"""

from dapo_async.evaluate.greedy import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
