"""One decoder for the learner and the native engine, and its weights in Hugging Face folders.

In: token ids and an attention strategy. Out: hidden states, logprobs, entropies. Called by
`learner/`, `rollout/native/` and `weights/`. Because learner and engine share the decoder, the
importance ratio is 1 up to rounding at staleness 0 (on-policy identity).

    config           sizes and switches of a model; the supported families
    decoder, layers, linear, rotary, attention, varlen
                     the forward pass on packed tokens
    cost, peak       FLOPs and bytes of a model; what a device can do at most
    memory           predicts the memory of a learner rank
    logprob          logprobs and entropies from hidden states, chunk by chunk
    mesh             ranks, process groups, collectives
    tensor_parallel  token exchange inside a layer
    context_parallel, head_split
                     tokens of a microbatch split over ranks, heads exchanged for attention
    parallel         parameters split over the mesh
    gather           where each rank's parts of the parameters lie; units and buckets of weights
    shard_copy       a copy of this rank's parts; whole weights of those of all ranks, unit by unit
    host_copy        tensors that leave their device for a while
    snapshot         weights and probe of one version, as they are published
    content          a 64-bit sum over all weights, equal for every layout
    transfer         copies to a device that the host does not wait for
    special_tokens   stop tokens, begin of text and padding, from all files of a folder
    weight_files     which files of a folder are the model
    hf, download     loads and writes folders of models; the Hugging Face hub
"""

from typing import TYPE_CHECKING

from dapo_async.model.config import ModelConfig, special_tokens
from dapo_async.model.download import download_model
from dapo_async.model.positions import with_positions
from dapo_async.model.special_tokens import SpecialTokens
from dapo_async.model.weight_files import (
    WeightFiles,
    find_weights,
    folder_for_sglang,
    read_weights,
    weight_paths,
)
from dapo_async.utils.lazy import lazy_names

if TYPE_CHECKING:  # these modules import torch
    from dapo_async.model.attention import PackedAttention
    from dapo_async.model.content import checksum, checksum_of_parts
    from dapo_async.model.context_parallel import own_targets
    from dapo_async.model.decoder import Decoder
    from dapo_async.model.gather import Layout, buckets
    from dapo_async.model.hf import (
        build_decoder,
        export_folder,
        fill,
        load_decoder,
        save_weights,
    )
    from dapo_async.model.host_copy import HostCopy
    from dapo_async.model.logprob import token_logprobs
    from dapo_async.model.memory import RankMemory, predict_memory
    from dapo_async.model.mesh import (
        ALONE,
        Axis,
        Mesh,
        build_mesh,
        join_store,
        open_store,
        process_group,
    )
    from dapo_async.model.parallel import (
        begin_pass,
        is_split,
        keep_gathered,
        part_of,
        reshard,
        shard_of,
    )
    from dapo_async.model.shard_copy import ShardCopy
    from dapo_async.model.snapshot import Snapshot, score_tokens, take_snapshot
    from dapo_async.model.transfer import send
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "attention": ("PackedAttention",),
            "content": ("checksum", "checksum_of_parts"),
            "context_parallel": ("own_targets",),
            "transfer": ("send",),
            "decoder": ("Decoder",),
            "gather": ("Layout", "buckets"),
            "hf": ("build_decoder", "export_folder", "fill", "load_decoder", "save_weights"),
            "host_copy": ("HostCopy",),
            "logprob": ("token_logprobs",),
            "memory": ("RankMemory", "predict_memory"),
            "mesh": (
                "ALONE",
                "Axis",
                "Mesh",
                "build_mesh",
                "join_store",
                "open_store",
                "process_group",
            ),
            "parallel": (
                "begin_pass",
                "is_split",
                "keep_gathered",
                "part_of",
                "reshard",
                "shard_of",
            ),
            "shard_copy": ("ShardCopy",),
            "snapshot": ("Snapshot", "score_tokens", "take_snapshot"),
        },
    )

__all__ = [
    "ALONE",
    "Axis",
    "Decoder",
    "HostCopy",
    "Layout",
    "Mesh",
    "ModelConfig",
    "PackedAttention",
    "RankMemory",
    "ShardCopy",
    "Snapshot",
    "SpecialTokens",
    "WeightFiles",
    "begin_pass",
    "buckets",
    "build_decoder",
    "build_mesh",
    "checksum",
    "checksum_of_parts",
    "download_model",
    "export_folder",
    "fill",
    "find_weights",
    "folder_for_sglang",
    "is_split",
    "join_store",
    "keep_gathered",
    "load_decoder",
    "open_store",
    "own_targets",
    "part_of",
    "predict_memory",
    "process_group",
    "read_weights",
    "reshard",
    "save_weights",
    "score_tokens",
    "send",
    "shard_of",
    "special_tokens",
    "take_snapshot",
    "token_logprobs",
    "weight_paths",
    "with_positions",
]
