"""Generation. Input: group requests and weights. Output: completions.

Every token of a completion has a behaviour logprob and a weight version.

engine      the `Engine` protocol; it does not import torch, so that its import is fast
native      the engine on the learner's own decoder: `ThreadedEngine(TorchEngine(...), clock)`
sglang      the engine on an SGLang server
slot_meter  the time of an engine and of each slot, by state
kv_meter    the memory for keys and values, averaged over time
slot_control  the number of slots with `rollout.num_slots: auto`
worker      sends groups to an engine as long as there are credits and empty slots
"""

from dapo_async.rollout.engine import (
    Aborted,
    Engine,
    EngineFault,
    EngineWork,
    GroupRequest,
    KVUse,
    SamplingParams,
    SiblingsEnded,
    SiblingTimes,
    SlotUse,
    TimeUse,
    UpdateReport,
    WeightUpdate,
    ignore_ends,
)

__all__ = [
    "Aborted",
    "Engine",
    "EngineFault",
    "EngineWork",
    "GroupRequest",
    "KVUse",
    "SamplingParams",
    "SiblingTimes",
    "SiblingsEnded",
    "SlotUse",
    "TimeUse",
    "UpdateReport",
    "WeightUpdate",
    "ignore_ends",
]
