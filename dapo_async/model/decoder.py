"""The decoder: embeddings, rotary attention, SwiGLU, RMS norms; parameters carry their Hugging Face names and orientation.

It works on packed tokens `[T]` and knows nothing of sequences: an attention strategy does (`PackedAttention`, the engine's cached one).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from torch.utils.checkpoint import checkpoint

from dapo_async.model.config import ModelConfig
from dapo_async.model.linear import Fused, Linear, product
from dapo_async.model.parallel import ALONE, Axis, copy_to, reduce_from


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


class Embedding(nn.Embedding):
    """torch's, of this rank's share of the vocabulary; tokens of other ranks' shares add nothing here."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        self.tp, self.share = tp, tp.share(config.vocab_size)
        super().__init__(self.share.stop - self.share.start, config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return super().forward(token_ids)
        mine = (token_ids >= self.share.start) & (token_ids < self.share.stop)
        local = super().forward((token_ids - self.share.start).masked_fill(~mine, 0))
        return reduce_from(local * mine[:, None], self.tp)


class Backbone(nn.Module):
    """Everything below the head; named `model` in the state dict, as Hugging Face does."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, tp)
        self.layers = nn.ModuleList(Block(config, layer, tp) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model on packed tokens; with a `tp` axis, this rank's shard of one. Every rank sees the whole hidden states."""

    rope_cos: Tensor  # [max_positions, 1, head_dim], float32
    rope_sin: Tensor  # with the first half negated, as `rotate` wants it

    def __init__(self, config: ModelConfig, tp: Axis = ALONE) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.recompute_layers = 0  # so many layers keep their input only while gradients are asked for (activation checkpointing)
        self.model = Backbone(config, tp)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, self.model.embed_tokens.num_embeddings, bias=False)
        cos, sin = config.rope.tables(config.head_dim, config.max_positions)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`, or this rank's rows of it: the embedding's own weight where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def fuse(self) -> None:
        """Lays the weights that share an input side by side, for inference only: fewer and larger products. Done once, it outlives updates."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.fused = Fused(module.q_proj, module.k_proj, module.v_proj)
            elif isinstance(module, MLP):
                module.fused = Fused(module.gate_proj, module.up_proj)

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden states after the last norm, `[T, D]`, of packed `token_ids [T]` at `positions [T]`."""
        x = self.model.embed_tokens(token_ids)
        cos, sin = self.rope_cos[positions].to(x.dtype), self.rope_sin[positions].to(x.dtype)
        recomputed = self.recompute_layers if torch.is_grad_enabled() else 0
        for number, block in enumerate(self.model.layers):
            if number < recomputed:
                x = checkpoint(block, x, cos, sin, attention, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, attention)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` in float32 whatever the weights' dtype (ScaleRL: a float32 head is worth 0.52 → 0.61 in pass rate)."""
        return product(hidden.float(), self.head_weight.float())
