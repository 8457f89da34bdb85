"""The decoder: embeddings, the layers of its family, the head; parameters carry their Hugging Face names and orientation.

It works on packed tokens `[T]` and knows nothing of sequences: an attention strategy does (`PackedAttention`, the engine's cached one).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dapo_async.model.config import ModelConfig
from dapo_async.model.families import FAMILIES
from dapo_async.model.layers import MLP, Attention, RMSNorm, SelfAttention
from dapo_async.model.linear import Fused, Linear, product
from dapo_async.model.parallel import ALONE, Axis, reduce_from


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
        block = FAMILIES[config.family].block
        self.layers = nn.ModuleList(block(config, layer, tp) for layer in range(config.num_layers))
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
