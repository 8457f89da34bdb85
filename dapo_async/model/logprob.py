"""Logprobs and entropies of chosen tokens, computed in chunks: all logits never exist at once.

The vocabulary may be split over ranks. Called by `Decoder.score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_async.model.linear import float_matmul
from dapo_async.model.mesh import ALONE, Axis

CHUNK_NUMBERS = 2**24  # 64 MiB of float32
CUDA_CHUNK_NUMBERS = 2**28  # 1 GiB: larger, because each chunk reads the whole weight again


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
    """log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropies.

    `hidden [N, D]`, `weight [V, D]`, `targets [N]`, `temperature [N]` > 0 → `logprobs [N]`,
    `entropies [N]` in nats, float32. Gradients flow through both.

    Logits exist for `chunk_tokens` tokens at once (None: as many as make 2^24 numbers, on CUDA
    2^28), in two buffers. The backward pass computes them again, chunk by chunk.

    With a `tp` axis, `weight` has this rank's rows, which start at `vocab_start`. Every rank gets
    the same results. The forward pass exchanges four numbers per token once, for any number of
    chunks; the backward pass exchanges nothing. The gradient of `hidden` is then this rank's share:
    `gather_tokens`, which gathered the hidden states, sums the shares.
    """
    numbers = CUDA_CHUNK_NUMBERS if weight.is_cuda else CHUNK_NUMBERS
    chunk_tokens = chunk_tokens or max(1, numbers // len(weight))
    apply: Callable[..., tuple[Tensor, Tensor]] = _TokenLogprobs.apply
    return apply(hidden, weight, targets - vocab_start, temperature, chunk_tokens, tp)


class _TokenLogprobs(torch.autograd.Function):
    """The formulas, with logits l over the whole vocabulary.

    m = max l, S = Σ exp(l − m), log Z = m + log S, p = exp(l − log Z):

        logprob = l_target − log Z          ∂/∂l_v = [v = target] − p_v
        entropy = log S − Σ p·(l − m)       ∂/∂l_v = −p_v (log p_v + entropy)

    Four numbers of each shard determine both: m, S, Σ exp(l − m)·(l − m), and l_target (0 if
    another shard has the target).
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
        chunks = _chunks(hidden, _factor(weight), temperature, chunk_tokens)
        own = torch.cat([_statistics(logits, targets[rows]) for rows, logits in chunks], dim=1)
        tops, sums, weighted, chosen = tp.stack(own).unbind(1)  # each [ranks, N]
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
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        factor = _factor(weight)
        for rows, logits in _chunks(hidden, factor, temperature, ctx.chunk_tokens):
            log_p = logits.sub_(log_z[rows, None])
            p = log_p.exp()
            gradient = log_p  # reuses its buffer
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
    """The weight as `float_matmul` takes it, converted once for all chunks."""
    return weight if weight.is_cuda else weight.float()


def _chunks(
    hidden: Tensor, weight: Tensor, temperature: Tensor, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of a chunk and their logits / temperature `[n, V]` in float32.

    Without any token there is one empty chunk.
    """
    for start in range(0, max(1, len(hidden)), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        yield rows, float_matmul(hidden[rows], weight.t()).div_(temperature[rows, None])


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """`[4, n]` of this rank's columns: m, Σ exp(l − m), Σ exp(l − m)·(l − m), l_target or 0.

    Overwrites the logits.
    """
    top = logits.amax(-1)
    mine, index = _mine(targets, logits)
    chosen = logits.gather(1, index).masked_fill(~mine, 0.0).squeeze(1)
    shifted = logits.sub_(top[:, None])
    powers = shifted.exp()
    return torch.stack((top, powers.sum(-1), shifted.mul_(powers).sum(-1), chosen))


def _mine(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, 1]` each: whether this rank has the target's column, and its index (0 if it has not)."""
    mine = ((targets >= 0) & (targets < logits.shape[-1]))[:, None]
    return mine, targets[:, None].masked_fill(~mine, 0)
