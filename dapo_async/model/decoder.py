"""The decoder: embeddings, the layers of its family, the head; parameters carry their Hugging Face names and orientation.

It works on packed tokens `[T]` and knows nothing of sequences: an attention strategy does (`PackedAttention`, the engine's cached one).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from dapo_async.model.config import ModelConfig
from dapo_async.model.families import FAMILIES
from dapo_async.model.layers import MLP, Attention, RMSNorm, SelfAttention
from dapo_async.model.linear import Fused, Linear, float_matmul, product
from dapo_async.model.logprob import token_logprobs
from dapo_async.model.mesh import ALONE, Axis
from dapo_async.model.parallel import gather_tokens, local, scatter_tokens


class Embedding(nn.Embedding):
    """torch's, of this rank's share of the vocabulary; tokens of other ranks' shares add nothing here. Gives this rank's tokens."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        self.tp, self.share = tp, tp.share(config.vocab_size)
        super().__init__(config.vocab_size, config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.tp.size == 1:
            return embedding(token_ids, weight)
        mine = (token_ids >= self.share.start) & (token_ids < self.share.stop)
        of_share = embedding((token_ids - self.share.start).masked_fill(~mine, 0), weight)
        return scatter_tokens(of_share * mine[:, None], self.tp)


class Backbone(nn.Module):
    """Everything below the head; named `model` in the state dict, as Hugging Face does."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, tp)
        block = FAMILIES[config.family].block
        self.layers = nn.ModuleList(block(config, layer, tp) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model on packed tokens; with a `tp` axis, this rank's part of one, once `shard_decoder` has split its parameters."""

    rope_cos: Tensor  # [max_positions, 1, head_dim], float32
    rope_sin: Tensor  # with the first half negated, as `rotate` wants it

    def __init__(self, config: ModelConfig, tp: Axis = ALONE) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.activations: torch.dtype | None = None  # None: in the weights' own precision
        self.model = Backbone(config, tp)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = config.rope.tables(config.head_dim, config.max_positions)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`, or this rank's rows of it: the embedding's own weight where the two are tied."""
        return local(
            self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
        )

    def fuse(self) -> None:
        """Lays the weights that share an input side by side, for inference only: fewer and larger products. Done once, it outlives updates."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.fused = Fused(module.q_proj, module.k_proj, module.v_proj)
            elif isinstance(module, MLP):
                module.fused = Fused(module.gate_proj, module.up_proj)

    def recompute(self, num_layers: int) -> None:
        """So many layers keep their input only while gradients are asked for, and compute the rest again (activation checkpointing). Called once."""
        for block in [*self.model.layers][:num_layers]:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden states after the last norm, `[T, D]`, of packed `token_ids [T]` at `positions [T]`; the same on every rank of the `tp` axis."""
        x = self.model.embed_tokens(token_ids)
        x = x if self.activations is None else x.to(self.activations)
        cos, sin = self.rope_cos[positions].to(x.dtype), self.rope_sin[positions].to(x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, attention)
        return gather_tokens(self.model.norm(x), self.tp, len(token_ids))

    def score(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        *,
        predictors: Tensor,
        targets: Tensor,
        temperatures: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """log-softmax(logits / temperature) of `targets [N]`, each predicted by the token at `predictors [N]`, and the entropies, float32 `[N]`.

        With a `tp` axis every rank of it gets the same; called by all ranks of the mesh alike.
        """
        hidden = Decoder.forward(self, token_ids, positions, attention)[predictors]
        weight = self.head_weight.to(hidden.dtype)
        start = self.model.embed_tokens.share.start
        return token_logprobs(hidden, weight, targets, temperatures, tp=self.tp, vocab_start=start)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` in float32 whatever the weights' dtype (ScaleRL: a float32 head is worth 0.52 → 0.61 in pass rate)."""
        weight = self.head_weight
        return (
            float_matmul(hidden, weight.t())
            if weight.is_cuda
            else product(hidden.float(), weight.float())
        )
