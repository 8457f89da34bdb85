"""Attention over packed sequences: the strategy that the learner and the engine's prefill hand to the decoder.

On CUDA: flash-attn's varlen kernel where it is installed, else torch's own (`torch.nn.attention.varlen`); neither has been run on a GPU yet.
On CPU, and in float32: one SDPA call per run of equally long neighbours, so sort sequences by length: nothing is padded or masked, short sequences
share a call.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention:
    """Causal attention within each of the sequences packed one after the other.

    Called as `attention(layer, query [T, H, D], key [T, KV, D], value [T, KV, D]) -> [T, H, D]` with `T = sum(lengths)`.
    """

    def __init__(self, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(lengths)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self._offsets = torch.tensor([0, *lengths], device=self.device).cumsum(
                0, dtype=torch.int32
            )
            self._max_length = max(lengths, default=0)

    @property
    def positions(self) -> Tensor:
        """`[T]` position of each token within its sequence."""
        parts = [torch.arange(length, device=self.device) for length in self.lengths]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=self.device)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if (
            self.device.type == "cuda" and value.dtype is not torch.float32
        ):  # the kernels know half precision only
            return self._varlen(query, key, value)
        outputs, start = [], 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            end = start + count * length
            shape = (count, length, -1, query.shape[-1])
            q, k, v = (
                tensor[start:end].view(shape).transpose(1, 2) for tensor in (query, key, value)
            )
            out = scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
            )
            outputs.append(out.transpose(1, 2).reshape(end - start, *query.shape[1:]))
            start = end
        return torch.cat(outputs)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]  # the extra [flash]

            offsets, longest = self._offsets, self._max_length
            out: Tensor = flash_attn_varlen_func(
                query, key, value, offsets, offsets, longest, longest, causal=True
            )
            return out
        from torch.nn.attention.varlen import varlen_attn  # CUDA only: has no CPU backend

        # Its arguments changed from one torch to the next.
        known = inspect.signature(varlen_attn).parameters
        causal: dict[str, Any] = (
            {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        )
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1 and "enable_gqa" in known:
            causal["enable_gqa"] = True
        elif repeats > 1:
            key, value = (
                key.repeat_interleave(repeats, dim=1),
                value.repeat_interleave(repeats, dim=1),
            )
        packed = varlen_attn(
            query,
            key,
            value,
            self._offsets,
            self._offsets,
            self._max_length,
            self._max_length,
            **causal,
        )
        assert isinstance(packed, Tensor)
        return packed
