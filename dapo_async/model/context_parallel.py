"""Context parallelism: the ranks of the `cp` axis share the tokens of one microbatch (Ulysses).

Each rank has a slice of the packed tokens, everywhere but in attention. There it has all tokens and
a part of the heads (DeepSpeed-Ulysses, 2309.14509):

    queries, keys, values of my tokens, all heads ──exchange──▶ of all tokens, my heads
    attention of my heads                         ──exchange──▶ of my tokens, all heads

Slices are equal, and the last ones end in padding: tokens without a predictor, in no sequence. A
rank scores the response tokens whose predictors are in its slice; then all ranks of the axis get
the scores of all, so that losses and metrics are computed as without the axis. The gradient of a
parameter covers this rank's tokens; it is summed as over data-parallel ranks.

The decoder calls these functions. `tensor_parallel.py` divides the slice once more over `tp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dapo_async.model.attention import take_rows
from dapo_async.model.head_split import HeadSplit
from dapo_async.model.layers import Attention
from dapo_async.model.mesh import Axis
from dapo_async.model.transfer import send


def own_tokens(values: Tensor, cp: Axis) -> Tensor:
    """This rank's slice `[⌈T / cp⌉]` of `values [T]`, with zeros as padding."""
    size = -(-len(values) // cp.size)
    mine = values[cp.rank * size : (cp.rank + 1) * size]
    return pad(mine, (0, size - len(mine)))


def own_targets(predictors: Tensor, num_tokens: int, cp: Axis) -> Tensor:
    """The places in `predictors [N]` that are in this rank's slice of `num_tokens`.

    In host memory: on a device the host would have to wait for their number.
    """
    return (predictors // -(-num_tokens // cp.size) == cp.rank).nonzero().squeeze(1)


def whole_scores(scores: Tensor, own: Tensor, num_targets: int, cp: Axis) -> Tensor:
    """`scores [n, …]` of the targets `own [n]` -> `[num_targets, …]` of all, on every rank.

    A gradient goes back to the rank that made the score: the other ranks have the same gradient,
    because they compute the same from the scores.
    """
    return _whole_scores(scores, own, num_targets, cp)


class ExchangedAttention:
    """`attention`, which sees all tokens, for a decoder that has a slice of them.

    Called with `query [n, H, D]`, `key, value [n, KV, D]` of this rank's slice.
    """

    def __init__(self, attention: Attention, cp: Axis, *, num_tokens: int) -> None:
        self._attention, self._cp, self._num_tokens = attention, cp, num_tokens
        self._kv_heads: Tensor | None = None  # `HeadSplit.kv_heads` on the device

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ranks, num_heads = self._cp.size, query.shape[1]
        split = HeadSplit.of(num_heads, key.shape[1], ranks)
        if split.kv_heads is not None:
            if self._kv_heads is None:  # all layers are divided alike
                self._kv_heads = send(torch.tensor(split.kv_heads), key.device)
            heads = self._kv_heads
            key, value = (
                take_rows(each.transpose(0, 1), heads).transpose(0, 1) for each in (key, value)
            )
        query = pad(query, (0, 0, 0, ranks * split.queries - num_heads))
        sent = [each.unflatten(1, (ranks, -1)).transpose(0, 1) for each in (query, key, value)]
        received = _exchange(torch.cat(sent, dim=2), self._cp).flatten(0, 1)[: self._num_tokens]
        mine = received.split((split.queries, split.keys, split.keys), dim=1)
        mixed = self._attention(layer, *mine)
        missing = ranks * len(query) - self._num_tokens
        by_slice = pad(mixed, (0, 0, 0, 0, 0, missing)).unflatten(0, (ranks, -1))
        return _exchange(by_slice, self._cp).transpose(0, 1).flatten(1, 2)[:, :num_heads]


class _Exchange(torch.autograd.Function):
    """All-to-all of the rows of `x [cp, …]`. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cp: Axis) -> Tensor:
        ctx.cp = cp
        return cp.exchange(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.cp.exchange(gradient), None


class _WholeScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, own: Tensor, num_targets: int, cp: Axis) -> Tensor:
        ctx.save_for_backward(own)
        whole = scores.new_zeros((num_targets, *scores.shape[1:]))
        return cp.sum(whole.index_copy_(0, own, scores))  # all other numbers are 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return gradient.index_select(0, own), None, None, None


_exchange: Callable[[Tensor, Axis], Tensor] = _Exchange.apply
_whole_scores: Callable[[Tensor, Tensor, int, Axis], Tensor] = _WholeScores.apply
