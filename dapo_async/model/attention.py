"""Attention over packed sequences, used by the learner and by the native engine's prefill.

On CUDA in half precision: the kernel of `varlen.py`. On CPU, and in float32: one SDPA call per run
of neighbours with equal lengths, without padding or masks. Sort sequences by length, so that short
ones share a call. Sequences may share their first tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from dapo_async.model.transfer import send
from dapo_async.model.varlen import Limits, varlen_kernel


class PackedAttention:
    """Causal attention within each of the packed sequences.

    `attention(layer, query [T, H, D], key [T, KV, D], value [T, KV, D]) -> [T, H, D]`.

    Without `shared` the sequences follow each other, and their `lengths` add up to T. With
    `shared`, a sequence may begin with tokens that an earlier sequence has already, such as the
    prompt of its group: `shared[i]` are their places in 0 … T − 1. Only the other tokens of the
    sequence, its own, are packed. A shared token has the same position and the same past in each of
    its sequences, so it is computed once.

    Keys and values of shared tokens are gathered for every sequence that has them. This is cheap
    beside the MLP. Their gradients are added up in float32. Attention then works on S tokens, the
    sum of the `lengths`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        shared: Sequence[range] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        pairs = [*zip(lengths, shared or [range(0)] * len(lengths), strict=True)]
        assert all(length >= len(prefix) for length, prefix in pairs)
        # Without a token of its own, a sequence asks for nothing.
        pairs = [(length, prefix) for length, prefix in pairs if length > len(prefix) or not prefix]
        self.lengths = tuple(length for length, _ in pairs)
        self._own = tuple(length - len(prefix) for length, prefix in pairs)
        self._rows, self._places = None, None
        if any(prefix for _, prefix in pairs):
            rows, places = _rows(pairs)
            self._rows, self._places = send(rows, self.device), send(places, self.device)
        # (count, length) of neighbours with equal lengths
        self._runs = [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @cached_property
    def _limits(self) -> Limits:
        offsets = _offsets(self._own, self.device), _offsets(self.lengths, self.device)
        return (*offsets, max(self._own, default=0), max(self.lengths, default=0))

    @property
    def positions(self) -> Tensor:
        """`[T]` position of each token within its sequence."""
        parts = [torch.arange(length) for length in self.lengths]
        every = send(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long), self.device)
        return every if self._places is None else every[self._places]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._rows is not None:
            key, value = take_rows(key, self._rows), take_rows(value, self._rows)
        if self.device.type == "cuda" and value.dtype is not torch.float32:
            return self._varlen(query, key, value)  # its kernels support half precision only
        if self._rows is None or self._places is None:
            return self._square(query, key, value)
        # The extra queries of shared tokens cost little; their results are left out.
        mixed = self._square(query.index_select(0, self._rows), key, value)
        return mixed.index_select(0, self._places)

    def _square(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One SDPA call per run of equal lengths, with a query for each of the S keys."""
        # Split once: the backward pass of a slice would fill and add a gradient of all S tokens.
        sizes = [count * length for count, length in self._runs]
        gqa = key.shape[1] != query.shape[1]
        outputs = []
        parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        for run, qkv in zip(self._runs, parts, strict=True):
            q, k, v = (part.unflatten(0, run).transpose(1, 2) for part in qkv)
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query [T, H, D]` of the own tokens; `key, value [S, KV, D]` of all tokens.

        With fewer queries than keys the kernels align the causal mask to the last key. So the own
        tokens, which end their sequence, attend to the shared ones and to their own past.
        """
        return varlen_kernel().call(query, key, value, self._limits)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`. Gradients of a row that is taken several times are added up in float32."""
    apply: Callable[[Tensor, Tensor], Tensor] = _TakeRows.apply
    return apply(x, rows)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(ctx.shape, dtype=dtype)
        return total.index_add_(0, rows, gradient.to(dtype)).to(gradient.dtype), None


def _rows(sequences: Sequence[tuple[int, range]]) -> tuple[Tensor, Tensor]:
    """Which packed token each of the S tokens is `[S]`, and where each packed one is in it `[T]`.

    `sequences`: the length of each, and the packed tokens that it begins with.
    """
    rows, places, num_packed, start = [], [], 0, 0
    for length, prefix in sequences:
        own = length - len(prefix)
        assert prefix.stop <= num_packed, "shared tokens must belong to an earlier sequence"
        rows += [
            torch.arange(prefix.start, prefix.stop),
            torch.arange(num_packed, num_packed + own),
        ]
        places.append(torch.arange(start + len(prefix), start + length))
        num_packed, start = num_packed + own, start + length
    return torch.cat(rows), torch.cat(places)


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return send(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), device)
