"""Static key/value slots and the attention strategies on them that the torch engine hands to the decoder.

One slot holds one sequence; the engine keeps running slots at the front, so that decoding reads one contiguous view `[:n, :, :longest]` and
idle slots cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dapo_async.model import ModelConfig, PackedAttention

_ROUND_TOKENS = (
    16  # key lengths are multiples of this: aligned masks for CUDA's kernels, and fewer shapes
)


class KVCache:
    """Keys and values of all layers and slots, and which of them each slot may attend to."""

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
        # One index for both writes is half the work: all vectors of a layer in a row, and where those of each slot and head start.
        self._vectors = [
            self.kv[layer].view(-1, config.head_dim) for layer in range(config.num_layers)
        ]
        self._starts = torch.arange(
            0, 2 * num_slots * config.num_kv_heads * padded, padded, device=device
        ).view(2, num_slots, config.num_kv_heads)
        self.layers = [
            (self.kv[layer, 0], self.kv[layer, 1]) for layer in range(config.num_layers)
        ]  # each [S, KV, L, D]
        self.mask = torch.full(
            (num_slots, padded), float("-inf"), dtype=dtype, device=device
        )  # added to the scores: 0 where visible

    def entries(self, positions: Tensor) -> Tensor:
        """Where the tokens at `positions [n]` of the first n slots go: `[2 · n · KV]` for `write`."""
        return (self._starts[:, : len(positions)] + positions[:, None]).view(-1)

    def write(self, layer: int, entries: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores one token per slot, `key, value [n, KV, D]`."""
        self._vectors[layer].index_copy_(
            0, entries, torch.cat((key, value)).view(-1, key.shape[-1])
        )

    def fill(self, rows: slice, prefix: Tensor) -> None:
        """Starts the slots `rows` with the same entries: `prefix [layers, 2, KV, P, D]`."""
        length = prefix.shape[3]
        self.kv[:, :, rows, :, :length] = prefix[:, :, None]
        self.mask[rows] = float("-inf")
        self.mask[rows, :length] = 0.0

    def move(self, source: slice | Tensor, target: slice | Tensor, *, length: int) -> None:
        """Copies the first `length` entries and the masks of slots to other slots."""
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]
        self.mask[target] = self.mask[source]


class PrefillAttention:
    """Causal attention within packed sequences that also keeps their keys and values."""

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
        return [part.transpose(2, 3) for part in self._kv.split(self._packed.lengths, dim=2)]


class DecodeAttention:
    """One query token for each of the first slots, over all that these slots hold, itself included."""

    def __init__(self, cache: KVCache, *, positions: Tensor, longest: int) -> None:
        """`positions [n]` of the new tokens of slots 0 … n − 1; the longest slot holds `longest` entries with its new one."""
        self._cache = cache
        self.positions = positions
        self._entries = cache.entries(positions)
        self._length = -(-longest // _ROUND_TOKENS) * _ROUND_TOKENS
        cache.mask[torch.arange(len(positions), device=positions.device), positions] = 0.0

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache, length = self._cache, self._length
        cache.write(layer, self._entries, key, value)
        num_rows, num_heads, head_dim = query.shape
        keys, values = (tensor[:num_rows, :, :length] for tensor in cache.layers[layer])
        # The query heads that share a key head stand in for query positions: no key is repeated.
        heads, mask = (
            query.view(num_rows, keys.shape[1], -1, head_dim),
            cache.mask[:num_rows, None, None, :length],
        )
        if query.is_cuda:
            mixed = scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
        else:  # for so few queries plain products are 1.3 times as fast as SDPA's kernel
            scores = (heads * head_dim**-0.5) @ keys.transpose(2, 3)
            mixed = scores.add_(mask).softmax(-1) @ values
        return mixed.reshape(num_rows, num_heads, head_dim)


class MixedAttention:
    """Several strategies side by side in one pass through the decoder: the first tokens belong to the first one, and so on."""

    def __init__(self, parts: Sequence[DecodeAttention | PrefillAttention]) -> None:
        self._parts = parts
        self._sizes = [len(part.positions) for part in parts]
        self.positions = torch.cat([part.positions for part in parts])

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = zip(*(tensor.split(self._sizes) for tensor in (query, key, value)), strict=True)
        return torch.cat([part(layer, *own) for part, own in zip(self._parts, tokens, strict=True)])
