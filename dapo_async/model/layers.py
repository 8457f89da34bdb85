"""One layer of the decoder, or this rank's shard of it: rotary attention, SwiGLU, RMS norms.

Parameters have their Hugging Face names.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from dapo_async.model.config import ModelConfig
from dapo_async.model.linear import Linear
from dapo_async.model.mesh import Axis
from dapo_async.model.mixture import Mixture, Routing
from dapo_async.model.tensor_parallel import gather_tokens, local, scatter_tokens


class Attention(Protocol):
    """Mixes tokens: `(layer, query [T, H, D], key [T, KV, D], value [T, KV, D]) -> [T, H, D]`.

    Queries and keys are already rotated.
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension."""
    return rms_norm(x, weight.shape, weight, eps)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys."""
    both = rotate(torch.cat((query, key), dim=1), cos, sin)
    query, key = both.split((query.shape[1], key.shape[1]), dim=1)
    return query, key


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return silu(gate) * up


class RMSNorm(nn.Module):
    """RMS norm over the last dimension in the input's precision; sums squares in float32."""

    formula = staticmethod(normed)  # `kernels.py` replaces it in an instance, and those below

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, local(self.weight).to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x [T, heads, D]` in the half-split layout of Llama and Qwen.

    `cos, sin [T, 1, D]`, with the sines of the first half negated.
    """
    return torch.addcmul(x * cos, _swapped(x), sin)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in place, for inference."""
    swapped = _swapped(x)
    return x.mul_(cos).addcmul_(swapped, sin)


def _swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


class SelfAttention(nn.Module):
    """Attention over this rank's heads.

    Query heads are split over the ranks. Key-value heads are split too if there are enough of them;
    otherwise each rank computes the one head that its queries need.
    """

    rotated = staticmethod(rotated)

    def __init__(self, config: ModelConfig, layer: int, tp: Axis) -> None:
        super().__init__()
        self.layer, self.head_dim, self.tp = layer, config.head_dim, tp
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = _head_norm(config)
        self.k_norm = _head_norm(config)
        if config.num_kv_heads < tp.size:
            head = tp.rank * config.num_kv_heads // tp.size
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            self.k_proj.rows = self.v_proj.rows = rows

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = gather_tokens(x, self.tp, len(cos))
        heads = (x.shape[0], -1, self.head_dim)
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (part.view(heads) for part in projected)
        query, key = self.rotated(self.q_norm(query), self.k_norm(key), cos, sin)
        mixed = attention(self.layer, query, key, value)
        return scatter_tokens(self.o_proj(mixed.reshape(x.shape[0], -1)), self.tp)


def _head_norm(config: ModelConfig) -> nn.Module:
    return RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()


class MLP(nn.Module):
    """SwiGLU with its inner dimension split over the ranks."""

    swiglu = staticmethod(swiglu)

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_tokens(x, self.tp)
        inner = self.swiglu(self.gate_proj(x), self.up_proj(x))
        return scatter_tokens(self.down_proj(inner), self.tp)


class Block(nn.Module):
    """One layer. In and out: this rank's tokens `x [⌈T / tp⌉, D]`.

    `cos, sin [T, 1, D]` are those of all tokens.
    """

    def __init__(self, config: ModelConfig, layer: int, tp: Axis) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer, tp)
        self.mlp = self._make_mlp(config, layer, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y

    def _make_mlp(self, config: ModelConfig, layer: int, tp: Axis) -> nn.Module:
        return MLP(config, tp)


class SparseBlock(Block):
    """One layer with experts."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        routing: Routing | None = None,
    ) -> Tensor:
        """`routing`: gives the experts, or tells afterwards which were used."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention)
        normed = self.post_attention_layernorm(x)
        y: Tensor = x + self.mlp(normed, routing or Routing(), num_tokens=len(cos))
        return y

    def _make_mlp(self, config: ModelConfig, layer: int, tp: Axis) -> nn.Module:
        return Mixture(config, layer, tp)
