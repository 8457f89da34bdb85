"""Log-probabilities and entropy of chosen tokens, without holding all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden.float() @ weight.float().t()) / temperature[:, None]
    log_z = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_z
    detached = logits.detach()
    shifted = detached - log_z.detach()[:, None]
    return logprobs, -(shifted.exp() * shifted).sum(-1)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, *, chunk_tokens: int = 1024) -> tuple[Tensor, Tensor]:
    """log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropy of each distribution (detached).

    `hidden [N, D]`, `weight [V, D]`, `targets [N]`, `temperature [N]` > 0 → `logprobs [N]`, `entropies [N]` in nats, float32. With more than
    one chunk the logits of a chunk are computed again in the backward pass, so that at most `chunk_tokens × V` of them exist at once.
    """
    if len(hidden) <= chunk_tokens:
        return _chunk(hidden, weight, targets, temperature)
    chunks = zip(*(tensor.split(chunk_tokens) for tensor in (hidden, targets, temperature)), strict=True)
    parts = [checkpoint(_chunk, h, weight, t, temp, use_reentrant=False) for h, t, temp in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
