"""The Ray actors: thin shells around the packages below. Each runs in a process of its own.

learner      one learner rank
rollout      one engine and its worker
replay       the replay buffer, the prompts and the payloads
evaluator    an engine of its own for evaluations beside training
engine_host  what rollout and evaluator share
sglang_host  an SGLang server within a rollout actor
reports      what actors tell the driver once per step
"""
