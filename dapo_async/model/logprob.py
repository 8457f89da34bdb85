"""Log-probabilities and entropy of chosen tokens, without holding all logits at once; the vocabulary may be split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_async.model.linear import float_matmul
from dapo_async.model.mesh import ALONE, Axis

CHUNK_NUMBERS = 2**24  # 64 MiB of float32
CUDA_CHUNK_NUMBERS = 2**28  # 1 GiB: for each chunk the whole weight is read again


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    *,
    chunk_tokens: int | None = None,
    tp: Axis = ALONE,
    vocab_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropy of each distribution; gradients flow through both.

    `hidden [N, D]`, `weight [V, D]`, `targets [N]`, `temperature [N]` > 0 → `logprobs [N]`, `entropies [N]` in nats, float32. Logits exist for
    `chunk_tokens` at once (None: as many as make 2^24 numbers, on CUDA 2^28), in two buffers: the backward pass computes them again, chunk by chunk.
    With a `tp` axis `weight` has this rank's rows, from `vocab_start` on, and the results are the same on every rank of it, for one exchange of four
    numbers per token in the forward pass and none in the backward pass, however many chunks there are. The gradient of `hidden` is this rank's
    share of it then: whoever gathered the hidden states adds the shares up (`gather_tokens`).
    """
    chunk_tokens = chunk_tokens or max(
        1, (CUDA_CHUNK_NUMBERS if weight.is_cuda else CHUNK_NUMBERS) // len(weight)
    )
    logprobs, entropies = _TokenLogprobs.apply(
        hidden, weight, targets - vocab_start, temperature, chunk_tokens, tp
    )
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    """With logits l, their maximum m, S = Σ exp(l − m) and log Z = m + log S over the whole vocabulary, p = exp(l − log Z):

        logprob = l_target − log Z          ∂/∂l_v = [v = target] − p_v
        entropy = log S − Σ p·(l − m)       ∂/∂l_v = −p_v (log p_v + entropy)

    Of each shard m, S, Σ exp(l − m)·(l − m) and l_target (0 where another shard has it) are enough to know all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        chunk_tokens: int,
        tp: Axis,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            _statistics(logits, targets[rows])
            for rows, logits in _chunks(hidden, _factor(weight), temperature, chunk_tokens)
        ]
        tops, sums, weighted, chosen = tp.stack(torch.cat(parts, dim=1)).unbind(
            1
        )  # each [ranks, N]
        top = tops.amax(0)
        share = (tops - top).exp()
        total = (share * sums).sum(0)
        log_z = top + total.log()
        entropies = total.log() - (share * (weighted + sums * (tops - top))).sum(0) / total
        ctx.save_for_backward(hidden, weight, targets, temperature, log_z, entropies)
        ctx.chunk_tokens = chunk_tokens
        ctx.set_materialize_grads(False)
        return chosen.sum(0) - log_z, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logprobs: Tensor | None, of_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperature, log_z, entropies = ctx.saved_tensors
        of_hidden, of_weight = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=torch.float32),
        )
        factor = _factor(weight)
        for rows, logits in _chunks(hidden, factor, temperature, ctx.chunk_tokens):
            log_p = logits.sub_(log_z[rows, None])
            p = log_p.exp()
            gradient = log_p  # its buffer
            if of_entropies is None:
                gradient.zero_()
            else:
                gradient.add_(entropies[rows, None]).mul_(p).mul_(-of_entropies[rows, None])
            if of_logprobs is not None:
                gradient.sub_(p.mul_(of_logprobs[rows, None]))
                mine, index = _mine(targets[rows], logits)
                gradient.scatter_add_(1, index, of_logprobs[rows, None].masked_fill(~mine, 0.0))
            gradient.div_(temperature[rows, None])
            of_hidden[rows] = float_matmul(gradient, factor).to(hidden.dtype)
            if hidden.is_cuda and hidden.dtype is not torch.float32:
                of_weight.add_(float_matmul(gradient.t(), hidden[rows]))
            else:
                of_weight.addmm_(gradient.t(), hidden[rows].float())
        return of_hidden, of_weight.to(weight.dtype), None, None, None, None


def _factor(weight: Tensor) -> Tensor:
    """As `float_matmul` wants it, converted once for all chunks."""
    return weight if weight.is_cuda else weight.float()


def _chunks(
    hidden: Tensor, weight: Tensor, temperature: Tensor, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens, and their logits / temperature `[n, V]` in float32; without any token one empty chunk."""
    for start in range(0, max(1, len(hidden)), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        yield rows, float_matmul(hidden[rows], weight.t()).div_(temperature[rows, None])


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """`[4, n]` of this rank's columns: m, Σ exp(l − m), Σ exp(l − m)·(l − m), and the target's logit or 0. Overwrites the logits."""
    top = logits.amax(-1)
    mine, index = _mine(targets, logits)
    chosen = logits.gather(1, index).masked_fill(~mine, 0.0).squeeze(1)
    shifted = logits.sub_(top[:, None])
    powers = shifted.exp()
    return torch.stack((top, powers.sum(-1), shifted.mul_(powers).sum(-1), chosen))


def _mine(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, 1]` each: whether this rank has the target's column, and which one (0 where it has not)."""
    mine = ((targets >= 0) & (targets < logits.shape[-1]))[:, None]
    return mine, targets[:, None].masked_fill(~mine, 0)
