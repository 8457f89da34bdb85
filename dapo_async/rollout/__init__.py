"""Generation: group requests and weights come in, completions leave.

Every token of a completion has a behaviour logprob and a weight version.

engine      the `Engine` protocol, without torch, so that it imports fast
native      the engine on the learner's own decoder: `ThreadedEngine(TorchEngine(...), clock)`
sglang      the engine on an SGLang server
slot_meter  the time of each slot: occupied, without credit, tail or sync
worker      keeps an engine full as long as there are credits
"""

from dapo_async.rollout.engine import (
    Aborted,
    Engine,
    EngineFault,
    GroupRequest,
    SamplingParams,
    SlotUse,
    UpdateReport,
    WeightUpdate,
)

__all__ = [
    "Aborted",
    "Engine",
    "EngineFault",
    "GroupRequest",
    "SamplingParams",
    "SlotUse",
    "UpdateReport",
    "WeightUpdate",
]
