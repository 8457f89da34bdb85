"""The Ray actors: thin classes around the packages of lower levels. Each one is a process.

learner      one learner rank
rollout      one engine and its worker
replay       the replay buffer, the prompts and the payloads
evaluator    an engine of its own for evaluations beside training
engine_host  what rollout and evaluator share
sglang_host  an SGLang server within a rollout actor
once         calls that are made again over a broken connection
reports      what actors send to the driver once per step
"""
