"""Log-probabilities and entropy of chosen tokens, without holding all logits at once; the vocabulary may be split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dapo_async.model.parallel import ALONE, Axis, copy_to, reduce_from


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, *, chunk_tokens: int = 1024, tp: Axis = ALONE, vocab_start: int = 0
) -> tuple[Tensor, Tensor]:
    """log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropy of each distribution (detached).

    `hidden [N, D]`, `weight [V, D]`, `targets [N]`, `temperature [N]` > 0 → `logprobs [N]`, `entropies [N]` in nats, float32. With more than
    one chunk the logits of a chunk are computed again in the backward pass, so that at most `chunk_tokens × V` of them exist at once.
    With a `tp` axis `weight` has this rank's rows, from `vocab_start` on; the results are the same on every rank of it.
    """
    hidden = copy_to(hidden, tp)

    def chunk(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        part, rows, wanted, divisor = tensors
        logits = (part.float() @ rows.float().t()) / divisor[:, None]
        return _dense(logits, wanted) if tp.size == 1 else _split(logits, wanted - vocab_start, tp)

    if len(hidden) <= chunk_tokens:
        return chunk(hidden, weight, targets, temperature)
    chunks = zip(*(tensor.split(chunk_tokens) for tensor in (hidden, targets, temperature)), strict=True)
    parts = [checkpoint(chunk, h, weight, t, temp, use_reentrant=False) for h, t, temp in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _dense(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_z = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_z
    shifted = logits.detach() - log_z.detach()[:, None]
    return logprobs, -(shifted.exp() * shifted).sum(-1)


def _split(logits: Tensor, targets: Tensor, tp: Axis) -> tuple[Tensor, Tensor]:
    """The same from this rank's columns `[n, V / tp]`; `targets` count from its first column. Two collectives: the maxima, then three sums.

    log Z = m + log Σ exp(l − m);  entropy = log Z − Σ exp(l − m)·l / Σ exp(l − m).
    """
    top = tp.max(logits.detach().amax(-1))
    powers = (logits - top[:, None]).exp()
    mine = (targets >= 0) & (targets < logits.shape[-1])
    chosen = logits.gather(-1, targets.masked_fill(~mine, 0)[:, None]).squeeze(-1) * mine
    total, chosen, weighted = reduce_from(torch.stack((powers.sum(-1), chosen, (powers * logits).detach().sum(-1))), tp).unbind()
    log_z = top + total.log()
    return chosen - log_z, (log_z - weighted / total).detach()
