"""Generation (L2): group requests and weights in, completions with behaviour logprobs and versions per token out.

`engine.py` is what every engine promises, without torch, so that whoever only speaks of engines starts in a second. The one on the learner's own
decoder, on CPU and CUDA, is `engine_thread.ThreadedEngine(torch_engine.TorchEngine(...), clock)`.
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
