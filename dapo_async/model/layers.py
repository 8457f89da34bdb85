"""One layer of the decoder, or this rank's shard of it: rotary attention, SwiGLU, RMS norms. Parameters carry their Hugging Face names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from dapo_async.model.linear import Fused, Linear
from dapo_async.model.parallel import ALONE, Axis, copy_to, reduce_from

if TYPE_CHECKING:
    from dapo_async.model.config import ModelConfig


class Attention(Protocol):
    """Mixes tokens: `(layer, query [T, H, D], key [T, KV, D], value [T, KV, D]) -> [T, H, D]`; queries and keys are already rotated."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    """`split`: its input is a shard of heads, so that its gradient is a sum over the tensor-parallel axis."""

    def __init__(self, size: int, eps: float, *, split: Axis = ALONE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.split = eps, split

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, copy_to(self.weight, self.split), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x [T, heads, D]` in the half-split layout of the Llama and Qwen families.

    `cos, sin [T, 1, D]`, with the sines of the first half negated.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, tp: Axis) -> None:
        super().__init__()
        self.layer, self.head_dim, self.tp = layer, config.head_dim, tp
        self.fused: Fused | None = None
        query_size, kv_size = config.num_heads // tp.size * config.head_dim, config.num_kv_heads // tp.size * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, split=tp) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, split=tp) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = copy_to(x, self.tp)
        heads = (x.shape[0], -1, self.head_dim)
        projected = self.fused(x) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (part.view(heads) for part in projected)
        both = rotate(torch.cat((self.q_norm(query), self.k_norm(key)), dim=1), cos, sin)
        query, key = both.split((query.shape[1], key.shape[1]), dim=1)
        mixed = attention(self.layer, query, key, value)
        return reduce_from(self.o_proj(mixed.reshape(x.shape[0], -1)), self.tp)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.fused: Fused | None = None
        self.tp, size = tp, config.intermediate_size // tp.size
        self.gate_proj = Linear(config.hidden_size, size, bias=False)
        self.up_proj = Linear(config.hidden_size, size, bias=False)
        self.down_proj = Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to(x, self.tp)
        gate, up = self.fused(x) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return reduce_from(self.down_proj(silu(gate) * up), self.tp)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, tp: Axis) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer, tp)
        self.mlp = MLP(config, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention)
        return x + self.mlp(self.post_attention_layernorm(x))
