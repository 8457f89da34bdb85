"""Logprobs and entropies of chosen tokens, computed in chunks: all logits never exist at once.

The vocabulary may be split over ranks. Called by `Decoder.score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_async.model import head_softmax
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
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropies.

    `hidden [N, D]`, `weight [V, D]`, `targets [N]`, `temperature [N]` > 0 → `logprobs [N]`,
    `entropies [N]` in nats, float32. Gradients flow through both.

    Logits exist for `chunk_tokens` tokens at once (None: as many as make 2^24 numbers, on CUDA
    2^28), in two buffers. The backward pass computes them again, chunk by chunk. `fused`: by the
    kernels of `fused_head.py`, on CUDA; the same numbers up to rounding.

    With a `tp` axis, `weight` has this rank's rows, which start at `vocab_start`. Every rank gets
    the same results. The forward pass exchanges four numbers per token once, for any number of
    chunks; the backward pass exchanges nothing. The gradient of `hidden` is then this rank's share:
    `gather_tokens`, which gathered the hidden states, sums the shares.
    """
    numbers = CUDA_CHUNK_NUMBERS if weight.is_cuda else CHUNK_NUMBERS
    chunk_tokens = chunk_tokens or max(1, numbers // len(weight))
    apply: Callable[..., tuple[Tensor, Tensor]] = _TokenLogprobs.apply
    softmax = _fused_head() if fused else head_softmax
    return apply(hidden, weight, targets - vocab_start, temperature, chunk_tokens, tp, softmax)


def _fused_head() -> Softmax:
    from dapo_async.model import fused_head  # needs Triton

    return fused_head


class Softmax(Protocol):
    """Of a chunk of logits: `head_softmax` and `fused_head`."""

    def statistics(self, logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor: ...

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: Tensor,
        log_z: Tensor,
        entropies: Tensor,
        *,
        of_logprobs: Tensor | None,
        of_entropies: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor: ...


class _TokenLogprobs(torch.autograd.Function):
    """The formulas are in `head_softmax.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        chunk_tokens: int,
        tp: Axis,
        softmax: Softmax,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            softmax.statistics(logits, targets[rows], temperature[rows])
            for rows, logits in _chunks(hidden, _factor(weight), chunk_tokens)
        ]
        own = torch.cat(parts, dim=1)
        tops, sums, weighted, chosen = tp.stack(own).unbind(1)  # each [ranks, N]
        top = tops.amax(0)
        share = (tops - top).exp()
        total = (share * sums).sum(0)
        log_z = top + total.log()
        entropies = total.log() - (share * (weighted + sums * (tops - top))).sum(0) / total
        ctx.save_for_backward(hidden, weight, targets, temperature, log_z, entropies)
        ctx.chunk_tokens, ctx.softmax = chunk_tokens, softmax
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
        # What `float_matmul` would round it to anyway, for both products.
        dtype = factor.dtype if factor.dtype is torch.bfloat16 else torch.float32
        for rows, logits in _chunks(hidden, factor, ctx.chunk_tokens):
            gradient = ctx.softmax.gradient(
                logits,
                targets[rows],
                temperature[rows],
                log_z[rows],
                entropies[rows],
                of_logprobs=None if of_logprobs is None else of_logprobs[rows],
                of_entropies=None if of_entropies is None else of_entropies[rows],
                dtype=dtype,
            )
            of_hidden[rows] = float_matmul(gradient, factor).to(hidden.dtype)
            if hidden.is_cuda and hidden.dtype is not torch.float32:
                of_weight.add_(float_matmul(gradient.t(), hidden[rows]))
            else:
                of_weight.addmm_(gradient.t(), hidden[rows].float())
            del logits, gradient  # before the next chunk is computed
        return of_hidden, of_weight.to(weight.dtype), None, None, None, None, None


def _factor(weight: Tensor) -> Tensor:
    """The weight as `float_matmul` takes it, converted once for all chunks."""
    return weight if weight.is_cuda else weight.float()


def _chunks(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of a chunk and their logits `[n, V]` in float32.

    Without any token there is one empty chunk.
    """
    for start in range(0, max(1, len(hidden)), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        yield rows, float_matmul(hidden[rows], weight.t())
