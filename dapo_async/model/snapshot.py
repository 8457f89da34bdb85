"""What the learner publishes: one version of the weights, and a probe for the handshake.

An engine with the same weights must give the learner's answer to the probe. The learner takes
snapshots; `weights/` sends them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.model.attention import PackedAttention
from dapo_async.model.context_parallel import own_targets
from dapo_async.model.decoder import Decoder
from dapo_async.model.gather import gather_weights
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import reshard


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies of the weights, which no later step changes, and the learner's answer to a probe."""

    version: int
    weights: Mapping[str, Tensor]
    probe_ids: NDArray[np.int32]  # [P]
    probe_logprobs: NDArray[np.float32]  # [P - 1] of every probe token after the first


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


@torch.no_grad()
def take_snapshot(
    decoder: Decoder,
    *,
    version: int,
    probe_tokens: int,
    dtype: torch.dtype = torch.float32,
    mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
) -> Snapshot:
    """Copies the weights, whole and in the engines' dtype, and answers a new random probe prompt.

    The learner computes with weights rounded to that dtype, so an engine with the same weights
    gives the same answer up to the rounding of its kernels. Every rank of the mesh calls it; only
    the snapshot of the first rank has weights.
    """
    length = min(probe_tokens, decoder.config.max_positions)
    random = np.random.default_rng(secrets.randbits(64))
    drawn = random.integers(0, decoder.config.vocab_size, length)
    # Every rank draws; the sum keeps the ids of the first rank.
    ids = torch.as_tensor(drawn, device=decoder.rope_cos.device) * int(mesh.is_first)
    probe_ids = mesh.every.sum(ids).cpu().numpy().astype(np.int32)
    weights = gather_weights(decoder, mesh, dtype)
    return Snapshot(version, weights, probe_ids, score_tokens(decoder, probe_ids))
