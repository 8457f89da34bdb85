"""Keys and values in static slots, and the attention over them that the native engine uses.

One slot holds one sequence. The engine keeps the running slots at the front: decoding reads one
contiguous view `[:n, :, :longest]`, and idle slots cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dapo_async.model import ModelConfig, PackedAttention

# Key lengths are multiples of this: aligned masks for CUDA's kernels, and fewer shapes.
_ROUND_TOKENS = 16


class KVCache:
    """Keys and values of all layers and slots."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        padded = -(-max_len // _ROUND_TOKENS) * _ROUND_TOKENS
        shape = (config.num_layers, 2, num_slots, config.num_kv_heads, padded, config.head_dim)
        # Zeros, not empty memory: masked entries get weight 0, and 0 · NaN would be NaN.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [(layer[0], layer[1]) for layer in self.kv]  # each [S, KV, L, D]
        self.heads = [layer.flatten(1, 2).unbind() for layer in self.kv]  # each [S · KV, L, D]
        # One index writes keys and values at once, which halves the work: all vectors of a layer
        # in one row, and where the vectors of each slot and head start in it.
        self._vectors = [layer.view(-1, config.head_dim) for layer in self.kv]
        starts = torch.arange(0, self._vectors[0].shape[0], padded, device=device)
        self._starts = starts.view(2, num_slots, config.num_kv_heads)
        self._columns = torch.arange(padded, device=device)
        self._hidden = torch.tensor(float("-inf"), dtype=dtype, device=device)
        self._visible = torch.zeros((), dtype=dtype, device=device)

    def entries(self, positions: Tensor) -> Tensor:
        """The index that `write` needs for tokens at `positions [n]` of slots 0 … n − 1.

        Shape `[2 · n · KV]`.
        """
        return (self._starts[:, : len(positions)] + positions[:, None]).view(-1)

    def mask(self, positions: Tensor, length: int) -> Tensor:
        """What is added to the scores: 0 up to `positions [n]`, else −inf, `[n, length]`."""
        later = self._columns[:length] > positions[:, None]
        return torch.where(later, self._hidden, self._visible)

    def write(self, layer: int, entries: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores one token per slot, `key, value [n, KV, D]`."""
        vectors = torch.cat((key, value)).view(-1, key.shape[-1])
        self._vectors[layer].index_copy_(0, entries, vectors)

    def fill(self, rows: slice, prefix: Tensor) -> None:
        """Starts the slots `rows` with the same entries: `prefix [layers, 2, KV, P, D]`."""
        length = prefix.shape[3]
        self.kv[:, :, rows, :, :length] = prefix[:, :, None]

    def move(self, source: slice | Tensor, target: slice | Tensor, *, length: int) -> None:
        """Copies the first `length` entries of slots to other slots."""
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]


class PrefillAttention:
    """Causal attention within packed sequences; keeps their keys and values."""

    def __init__(self, cache: KVCache, *, lengths: Sequence[int]) -> None:
        """Equally long neighbours share a kernel call."""
        self._packed = PackedAttention(lengths, device=cache.kv.device)
        self.positions = self._packed.positions
        num_layers, _, _, num_heads, _, head_dim = cache.kv.shape
        self._kv = cache.kv.new_empty(num_layers, 2, sum(lengths), num_heads, head_dim)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._kv[layer, 0], self._kv[layer, 1] = key, value
        return self._packed(layer, query, key, value)

    def prefixes(self) -> list[Tensor]:
        """Keys and values of each sequence, `[layers, 2, KV, length, D]`, after the pass."""
        parts = torch.split(self._kv, list(self._packed.lengths), dim=2)
        return [part.transpose(2, 3) for part in parts]


class DecodeAttention:
    """One query token for each of the first slots, over all entries of its slot and itself."""

    def __init__(self, cache: KVCache, *, positions: Tensor, longest: int) -> None:
        """`positions [n]`: of the new tokens of slots 0 … n − 1.

        `longest`: entries of the longest of these slots, its new token included.
        """
        self._cache = cache
        self.positions = positions
        self._entries = cache.entries(positions)
        self._length = -(-longest // _ROUND_TOKENS) * _ROUND_TOKENS
        self._mask = cache.mask(positions, self._length)
        num_kv_heads = cache.kv.shape[3]
        # One row of the mask per slot and key head, as in the batched products.
        self._rows = len(positions) * num_kv_heads
        self._masks = self._mask[:, None].expand(-1, num_kv_heads, -1).reshape(self._rows, 1, -1)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache, length = self._cache, self._length
        cache.write(layer, self._entries, key, value)
        num_rows, num_heads, head_dim = query.shape
        # Query heads that share a key head take the place of query positions: no key is repeated.
        if query.is_cuda:
            keys, values = (each[:num_rows, :, :length] for each in cache.layers[layer])
            heads = query.view(num_rows, keys.shape[1], -1, head_dim)
            mask = self._mask[:, None, None]
            mixed = scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
        else:  # with so few queries plain products are 1.3 times as fast as SDPA's kernel
            keys, values = (each[: self._rows, :length] for each in cache.heads[layer])
            heads = query.reshape(self._rows, -1, head_dim)
            scale = head_dim**-0.5
            scores = torch.baddbmm(self._masks, heads, keys.transpose(1, 2), alpha=scale)
            mixed = torch.bmm(scores.softmax(-1), values)
        return mixed.reshape(num_rows, num_heads, head_dim)


class MixedAttention:
    """Several attentions in one pass: the first tokens belong to the first part, and so on."""

    def __init__(self, parts: Sequence[DecodeAttention | PrefillAttention]) -> None:
        self._parts = parts
        self._sizes = [len(part.positions) for part in parts]
        self.positions = torch.cat([part.positions for part in parts])

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        split = (torch.split(tensor, self._sizes) for tensor in (query, key, value))
        tokens = zip(*split, strict=True)
        return torch.cat([part(layer, *own) for part, own in zip(self._parts, tokens, strict=True)])
