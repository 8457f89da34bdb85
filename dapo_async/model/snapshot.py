"""What the learner publishes: one version of the weights, frozen, with a probe that an engine must answer alike (law 5)."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.model.attention import PackedAttention
from dapo_async.model.decoder import Decoder
from dapo_async.model.gather import gather_weights
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import release


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Weights that no later step changes. `probe_logprobs [P - 1]` are the learner's for the tokens of `probe_ids [P]` after the first."""

    version: int
    weights: Mapping[str, Tensor]
    probe_ids: NDArray[np.int32]
    probe_logprobs: NDArray[np.float32]


@torch.no_grad()
def score_tokens(decoder: Decoder, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """log-softmax(logits) of each token after the first, `[P] -> [P - 1]`, by one fresh forward pass; on all ranks of its mesh alike."""
    device = decoder.rope_cos.device
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=device)
    attention = PackedAttention([len(ids)], device=device)
    predictors = torch.arange(len(ids) - 1, device=device)
    ones = torch.ones(len(ids) - 1, device=device)
    logprobs, _ = decoder.score(
        ids,
        attention.positions,
        attention,
        predictors=predictors,
        targets=ids[1:],
        temperatures=ones,
    )
    release(decoder)
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
    """Copies the weights, whole and in the engines' dtype (`gather_weights`), and answers a probe prompt of random tokens, seen by nobody before.

    The answer is that of the learner's own policy, which computes with its weights rounded to that dtype: an engine with the same weights gives it
    up to the rounding of its kernels. Every rank of the mesh calls it; only the first one's has weights.
    """
    length = min(probe_tokens, decoder.config.max_positions)
    nonce = np.random.default_rng(secrets.randbits(64)).integers(
        0, decoder.config.vocab_size, length
    )
    ids = torch.as_tensor(nonce, device=decoder.rope_cos.device) * int(mesh.is_first)
    probe_ids = mesh.every.sum(ids).cpu().numpy().astype(np.int32)  # the first rank's
    return Snapshot(
        version, gather_weights(decoder, mesh, dtype), probe_ids, score_tokens(decoder, probe_ids)
    )


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly when every bit of every weight is."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
