"""Generation (L2): group requests and weights in, completions with behaviour logprobs and versions per token out.

`engine.py` is what every engine promises; `ThreadedEngine(TorchEngine(...), clock)` is the one on the learner's own decoder, on CPU and CUDA.
"""

from dapo_async.rollout.engine import Aborted, Engine, EngineFault, GroupRequest, SamplingParams, SlotUse, UpdateReport, WeightUpdate
from dapo_async.rollout.engine_thread import ThreadedEngine
from dapo_async.rollout.torch_engine import TorchEngine

__all__ = [
    "Aborted",
    "Engine",
    "EngineFault",
    "GroupRequest",
    "SamplingParams",
    "SlotUse",
    "ThreadedEngine",
    "TorchEngine",
    "UpdateReport",
    "WeightUpdate",
]
