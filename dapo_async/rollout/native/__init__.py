"""The engine on the learner's own decoder, on CPU and CUDA.

engine    weights and group requests in, completions out
thread    the engine in a thread of its own, behind the `Engine` protocol
slots     which sequence is in which slot
kv_cache  keys and values of the running sequences
sampling  tokens from logits, with noise keyed by position
"""
