"""The softmax of a chunk of logits and its gradient, in torch: what the head takes on a CPU.

`fused_head.py` computes the same on a GPU, and is tested against this. With logits l over the whole
vocabulary:

    m = max l, S = Σ exp(l − m), log Z = m + log S, p = exp(l − log Z):

        logprob = l_target − log Z          ∂/∂l_v = [v = target] − p_v
        entropy = log S − Σ p·(l − m)       ∂/∂l_v = −p_v (log p_v + entropy)

Four numbers of each shard of the vocabulary determine both: m, S, Σ exp(l − m)·(l − m), and
l_target (0 if another shard has the target). `logprob.py` calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """`[4, n]` float32 of l = logits / temperature: m, Σ exp(l − m), Σ exp(l − m)·(l − m), and
    l_target or 0.

    `logits [n, V]` float32, `targets [n]` (any other number: another shard has it), `temperature
    [n]`. Overwrites the logits.
    """
    scaled = logits.div_(temperature[:, None])
    top = scaled.amax(-1)
    mine, index = _mine(targets, scaled)
    chosen = scaled.gather(1, index).masked_fill(~mine, 0.0).squeeze(1)
    shifted = scaled.sub_(top[:, None])
    powers = shifted.exp()
    return torch.stack((top, powers.sum(-1), shifted.mul_(powers).sum(-1), chosen))


def gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    log_z: Tensor,
    entropies: Tensor,
    *,
    of_logprobs: Tensor | None,
    of_entropies: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits, `[n, V]` in `dtype`, from those of logprobs and entropies `[n]`.

    Overwrites the logits.
    """
    log_p = logits.div_(temperature[:, None]).sub_(log_z[:, None])
    p = log_p.exp()
    result = log_p  # reuses its buffer
    if of_entropies is None:
        result.zero_()
    else:
        result.add_(entropies[:, None]).mul_(p).mul_(-of_entropies[:, None])
    if of_logprobs is not None:
        result.sub_(p.mul_(of_logprobs[:, None]))
        mine, index = _mine(targets, result)
        result.scatter_add_(1, index, of_logprobs[:, None].masked_fill(~mine, 0.0))
    return result.div_(temperature[:, None]).to(dtype)


def _mine(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, 1]` each: whether this shard has the target's column, and its index, or 0."""
    mine = ((targets >= 0) & (targets < logits.shape[-1]))[:, None]
    return mine, targets[:, None].masked_fill(~mine, 0)
