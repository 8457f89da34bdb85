"""One decoder for the learner and the torch engine (L1): Hugging Face weights in and out, packed and cached attention, token logprobs.

In: token ids and an attention strategy. Out: hidden states, logprobs, entropies. Called by `learner/` and `rollout/torch_engine.py`.
Sharing the decoder is what makes the importance ratio 1 up to rounding at staleness 0 (law 3).
"""

from dapo_async.model.attention import PackedAttention
from dapo_async.model.config import ModelConfig
from dapo_async.model.decoder import Decoder
from dapo_async.model.hf import check_weights, export_folder, load_decoder, read_weights, save_weights
from dapo_async.model.logprob import token_logprobs
from dapo_async.model.parallel import ALONE, Axis, Mesh, buckets, build_mesh, gather_shards, join_store, open_store, process_group, split_dim
from dapo_async.model.snapshot import Snapshot, checksum, gather_weights, score_tokens, take_snapshot

__all__ = [
    "ALONE",
    "Axis",
    "Decoder",
    "Mesh",
    "ModelConfig",
    "PackedAttention",
    "Snapshot",
    "buckets",
    "build_mesh",
    "check_weights",
    "checksum",
    "export_folder",
    "gather_shards",
    "gather_weights",
    "join_store",
    "load_decoder",
    "open_store",
    "process_group",
    "read_weights",
    "save_weights",
    "score_tokens",
    "split_dim",
    "take_snapshot",
    "token_logprobs",
]
