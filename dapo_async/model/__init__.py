"""One decoder for the learner and the torch engine (L1): Hugging Face weights in and out, packed and cached attention, token logprobs.

In: token ids and an attention strategy. Out: hidden states, logprobs, entropies. Called by `learner/` and `rollout/native/engine.py`.
Sharing the decoder is what makes the importance ratio 1 up to rounding at staleness 0 (law 3).
"""

from dapo_async.model.attention import PackedAttention
from dapo_async.model.buckets import buckets
from dapo_async.model.config import ModelConfig
from dapo_async.model.decoder import Decoder
from dapo_async.model.gather import gather_weights
from dapo_async.model.hf import (
    build_decoder,
    check_weights,
    export_folder,
    fill,
    load_decoder,
    read_weights,
    save_weights,
)
from dapo_async.model.logprob import token_logprobs
from dapo_async.model.mesh import (
    ALONE,
    Axis,
    Mesh,
    build_mesh,
    join_store,
    open_store,
    process_group,
)
from dapo_async.model.parallel import is_split, part_of, shard_of
from dapo_async.model.snapshot import Snapshot, checksum, score_tokens, take_snapshot

__all__ = [
    "ALONE",
    "Axis",
    "Decoder",
    "Mesh",
    "ModelConfig",
    "PackedAttention",
    "Snapshot",
    "buckets",
    "build_decoder",
    "build_mesh",
    "check_weights",
    "checksum",
    "export_folder",
    "fill",
    "gather_weights",
    "is_split",
    "join_store",
    "load_decoder",
    "open_store",
    "part_of",
    "process_group",
    "read_weights",
    "save_weights",
    "score_tokens",
    "shard_of",
    "take_snapshot",
    "token_logprobs",
]
