"""What the learner publishes: one version of the weights, and a probe for the handshake.

An engine with the same weights must give the learner's answer to the probe. The learner takes
snapshots; `weights/` sends them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dapo_async.model.attention import PackedAttention
from dapo_async.model.config import ModelConfig
from dapo_async.model.context_parallel import own_targets
from dapo_async.model.decoder import Decoder
from dapo_async.model.gather import Layout
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import reshard
from dapo_async.model.shard_copy import ShardCopy


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of this rank's shards, which no later step changes, and a probe prompt."""

    version: int
    copy: ShardCopy
    probe_ids: NDArray[np.int32]  # [P]


@torch.no_grad()
def score_tokens(decoder: Decoder, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """log-softmax(logits) of each token after the first, `[P] -> [P - 1]`, by one forward pass.

    All ranks of the decoder's mesh call it and get the same.
    """
    device = decoder.rope_cos.device
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=device)
    attention = PackedAttention([len(ids)], device=device)
    predictors = torch.arange(len(ids) - 1)
    own = own_targets(predictors, len(ids), decoder.cp) if decoder.cp.size > 1 else None
    ones = torch.ones(len(ids) - 1, device=device)
    logprobs, _ = decoder.score(
        ids,
        attention.positions,
        attention,
        predictors=predictors.to(device),
        targets=ids[1:],
        temperatures=ones,
        own=None if own is None else own.to(device),
    )
    reshard(decoder)
    return logprobs.cpu().numpy()


def probe_of(config: ModelConfig, length: int, *, nonce: str) -> NDArray[np.int32]:
    """A probe prompt `[P]`: random, and the same for equal nonces, on each rank and after a restart
    of the learner. At most `length` tokens."""
    seed = int.from_bytes(hashlib.sha256(nonce.encode()).digest(), "big")
    size = min(length, config.max_positions)
    return np.random.default_rng(seed).integers(0, config.vocab_size, size).astype(np.int32)


def take_snapshot(
    decoder: Decoder,
    *,
    version: int,
    probe_tokens: int,
    nonce: str = "",
    dtype: torch.dtype = torch.float32,
    mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
    layout: Layout | None = None,
    over: ShardCopy | None = None,
) -> Snapshot:
    """Copies this rank's shards in the engines' dtype. The learner computes with weights rounded to
    that dtype, so an engine with the same weights gives its answer to the probe, up to the rounding
    of its kernels.

    `nonce`: what no engine has seen; the probe depends on it and on the version. Every rank of the
    mesh calls it. `layout`: None makes it anew. `over`: an older copy that nobody reads any more.
    """
    copy = ShardCopy.of(decoder, layout or Layout.of(decoder, mesh), dtype, over=over)
    probe_ids = probe_of(decoder.config, probe_tokens, nonce=f"{nonce} {version}")
    return Snapshot(version, copy, probe_ids)
