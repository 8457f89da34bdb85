"""The native engine (`rollout.engine=torch`): generates with the learner's own decoder.

It runs on CPU and CUDA. On CUDA it is a reference for numbers and tests, without CUDA graphs and
paged KV; SGLang is the fast engine there.

engine    TorchEngine: continuous batching, one decode step per call, no threads
thread    ThreadedEngine: a TorchEngine in a thread of its own, behind the `Engine` protocol
slots     the table of running sequences, one row per slot
kv_cache  keys and values of the running sequences, and attention over them
sampling  tokens from probabilities, with noise that depends on (seed, group, sibling, token)
"""
