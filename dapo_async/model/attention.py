"""Attention over packed sequences, used by the learner and by the native engine's prefill.

On CUDA in half precision: flash-attn's varlen kernel if it is installed, else torch's own
(`torch.nn.attention.varlen`); both have not run on a GPU yet. On CPU, and in float32: one SDPA call
per run of neighbours with equal lengths, without padding or masks. Sort sequences by length, so
that short ones share a call.
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
    """Causal attention within each of the packed sequences, whose lengths add up to T.

    `attention(layer, query [T, H, D], key [T, KV, D], value [T, KV, D]) -> [T, H, D]`.
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
        if self.device.type == "cuda" and value.dtype is not torch.float32:
            return self._varlen(query, key, value)  # its kernels support half precision only
        outputs, start = [], 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            end = start + count * length
            shape = (count, length, -1, query.shape[-1])
            q, k, v = (each[start:end].view(shape).transpose(1, 2) for each in (query, key, value))
            gqa = k.shape[1] != q.shape[1]
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            outputs.append(out.transpose(1, 2).reshape(end - start, *query.shape[1:]))
            start = end
        return torch.cat(outputs)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not importlib.util.find_spec("flash_attn"):
            return self._torch_varlen(query, key, value)
        # The extra [flash].
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        offsets, longest = self._offsets, self._max_length
        packed: Tensor = flash_attn_varlen_func(
            query, key, value, offsets, offsets, longest, longest, causal=True
        )
        return packed

    def _torch_varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # has no CPU backend

        # The names of its arguments differ between torch versions.
        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = (
            {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        )
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif repeats > 1:
            key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        offsets, longest = self._offsets, self._max_length
        packed = varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)
        assert isinstance(packed, Tensor)
        return packed
