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
from dapo_async.model.logprob import token_logprobs
from dapo_async.model.parallel import gather_shards


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Weights that no later step changes. `probe_logprobs [P - 1]` are the learner's for the tokens of `probe_ids [P]` after the first."""

    version: int
    weights: Mapping[str, Tensor]
    probe_ids: NDArray[np.int32]
    probe_logprobs: NDArray[np.float32]


@torch.no_grad()
def score_tokens(decoder: Decoder, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """log-softmax(logits) of each token after the first, `[P] -> [P - 1]`, by one fresh forward pass."""
    device = decoder.head_weight.device
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=device)
    attention = PackedAttention([len(ids)], device=device)
    hidden = decoder(ids, attention.positions, attention)
    ones = torch.ones(len(ids) - 1, device=device)
    logprobs, _ = token_logprobs(hidden[:-1], decoder.head_weight, ids[1:], ones)
    return logprobs.cpu().numpy()


@torch.no_grad()
def gather_weights(decoder: Decoder, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Copies of all weights in `dtype`, whole: every rank of the decoder's tensor-parallel axis has to call it, only the first keeps them."""
    copies = {name: parameter.detach().to(dtype, copy=True) for name, parameter in decoder.named_parameters()}
    return gather_shards(copies, decoder.tp)


@torch.no_grad()
def take_snapshot(decoder: Decoder, *, version: int, probe_tokens: int, dtype: torch.dtype = torch.float32) -> Snapshot:
    """Copies the weights, whole and in the engines' dtype (`gather_weights`), and answers a probe prompt of random tokens, seen by nobody before.

    The answer is that of the copies: an engine with the same weights gives it up to the rounding of its kernels, whatever the dtype.
    """
    weights = gather_weights(decoder, dtype)
    nonce = np.random.default_rng(secrets.randbits(64))
    probe_ids = nonce.integers(0, decoder.config.vocab_size, min(probe_tokens, decoder.config.max_positions), dtype=np.int32)
    with torch.device("meta"):
        copies = Decoder(decoder.config)
    copies.load_state_dict(weights, assign=True)
    copies.rope_cos, copies.rope_sin = decoder.rope_cos, decoder.rope_sin
    return Snapshot(version, weights, probe_ids, score_tokens(copies, probe_ids))


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly when every bit of every weight is."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
